"""Fine-tuning from end to end: labelled data, runs that start from weights, and the metrics of tasks."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
import sklearn.metrics

from tests.helpers import tiny
from tests.helpers.encoding import by_name
from xclip_jax import interop
from xclip_jax.commands import evaluate, export
from xclip_jax.config import schema
from xclip_jax.config.load import load_config
from xclip_jax.core.errors import UserError
from xclip_jax.data.readers import glue
from xclip_jax.evaluators import registry, tables
from xclip_jax.evaluators.probe import ClassifierEvaluator
from xclip_jax.train import build, trainer, weights

pytestmark = pytest.mark.long


def folder_of_classes(path, n=24, seed=0):
    """Three classes of noise around one brightness each."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(("bright", "dark", "grey")):
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            noise = rng.integers(0, 40, (20, 22, 3)) + (200, 0, 100)[label]
            PIL.Image.fromarray(noise.astype(np.uint8)).save(path / name / f"{i}.png")
    return path


COLA = "gj04\t1\t\tOur friends {i} won't buy this.\ngj04\t0\t*\tThey {i} drank the pub\n"


def glue_folder(path, task, n=12):
    path.mkdir(parents=True, exist_ok=True)
    text = "".join(COLA.format(i=i) for i in range(n))
    if task == "stsb":
        rows = [f'{i}\tg\tf\ty\t{i}\ts\ts\t{"ab"[i % 2] * 3} {i}\t"aaa {i}\t{5.0 * (1 - i % 2)}' for i in range(n)]
        head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
        text = "\n".join([head, *rows])
    for name in ("train", "dev"):
        (path / f"{name}.tsv").write_text(text + "\n")
    return path


def test_glue_of_files(tmp_path):
    (tmp_path / "dev_mismatched.tsv").write_text("sentence1\tsentence2\tgold_label\nA\tB\tcontradiction\n")
    texts, labels = glue.read_pairs("mnli_mismatched", "validation", str(tmp_path))
    assert texts == [["A", "B"]] and labels.tolist() == [2]
    for name, split, message in (("colla", "train", "'colla'.*'cola'"), ("cola", "test", "the GLUE split is 'test'")):
        with pytest.raises(UserError, match=message):
            glue.read_pairs(name, split, str(tmp_path))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    folder_of_classes(root / "train")
    folder_of_classes(root / "validation", 5, seed=1)
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run that was saved before its first step, whose towers are then fine-tuned."""
    return tiny.untrained(tmp_path_factory.mktemp("pretrained") / "run", "clip", model__txt__context_length=24)


def small(config, run, steps):
    """A config of configs/finetune.py for a test's time."""
    config.run, config.steps, config.model.dtype = str(run), steps, "float32"
    config.data.threads, config.optim.warmup, config.optim.lr = 2, 3, 1e-2
    config.eval.every, config.checkpoint.every, config.log.every, config.eval.batch = 0, 10, 1, 16
    config.data.color_jitter = 0.0  # brightness is what the test's classes differ in
    return config


def test_sizes_are_taken_over_from_weights(pretrained, tmp_path):
    c = load_config(f"finetune:data=tfds:imagenet2012,weights={pretrained}")
    assert (c.model.img.width, c.model.img.patch, c.model.txt.context_length, c.data.tokenizer) == (32, 8, 24, "bytes")
    columns = load_config("finetune:data=hf:lab/set?label=fine,examples=9,classes=3")
    assert columns.run == "runs/finetune-lab-set" and columns.data.sources == ("hf:lab/set?label=fine/train",)
    assert c.model.scan and c.objective.classify.classes == 1000  # how towers are computed stays the config's
    assert c.steps == 1_281_167 * 100 // 1024
    part = load_config("finetune:data=tfds:imagenet2012,train=train[:1%],examples=12811,classes=1000")
    assert part.steps == 12_811 * 100 // 1024
    with pytest.raises(UserError, match="imagenet2012"):  # a part has another number, which only the data tell
        load_config(f"finetune:data=tfds:imagenet2012,train=train[:1%],dir={tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_config(f"finetune:weights={tmp_path}")


@pytest.fixture(scope="module")
def tuned(images, pretrained, tmp_path_factory):
    """A run that has learned the images, and its results."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    arg = f"data=folder:{images},batch={tiny.BATCH},epochs=7,weights={pretrained}"
    c = small(load_config(f"finetune:{arg}"), run, 30)
    assert c.objective.classify.classes == 3 and c.objective.classify.mixup == 0.8 and c.model.img.width == 32
    return run, trainer.run(c)


def test_images_are_learned_and_evaluated(images, tuned):
    run, results = tuned
    name = f"visual/finetuned/folder:{images}/validation"
    assert results[f"{name}/finetuned/top1"] >= 90 and results[f"{name}/n"] == 15
    found = evaluate.evaluate(str(run), f"finetuned/folder:{images}/validation")
    assert found["results"][0]["value"] == results[f"{name}/finetuned/top1"]
    with pytest.raises(UserError, match=r"does not compare images with texts: .*evaluate probe/SET or finetuned/SET"):
        evaluate.evaluate(str(run), f"folder:{images}/validation")


def test_export_keeps_the_classes(images, tuned, tmp_path):
    """By name: of a set with another class both the run and its export say so, and score none."""
    run, out, spec = tuned[0], tmp_path / "out", f"finetuned/folder:{images}/validation"
    export.export(str(run), str(out), to="safetensors")
    assert weights.load(str(out)).classes == weights.load(str(run)).classes == ("bright", "dark", "grey")
    by_run, by_export = (evaluate.evaluate(str(path), spec)["results"] for path in (run, out))
    assert [x["value"] for x in by_run] == [x["value"] for x in by_export]
    folder_of_classes(tmp_path / "other", 2)
    (tmp_path / "other" / "grey").rename(tmp_path / "other" / "white")
    for path in (run, out):
        with pytest.raises(UserError, match="has the class 'white'"):
            evaluate.evaluate(str(path), f"finetuned/folder:{tmp_path}/other")
    card = (out / export.CARD).read_text()
    assert "xclip-jax evaluate --checkpoint out --suite finetuned/folder:PATH" in card
    assert "| source | items | share |" in card and "Classes, 3 in all: `bright`, `dark`, `grey`." in card
    assert "| image |" in card and "| text |" not in card and "Texts:" not in card and "zero_shot" not in card
    # Exported again, from the export.
    export.export(str(out), str(tmp_path / "again"), to="safetensors")
    assert weights.load(str(tmp_path / "again")).classes == ("bright", "dark", "grey")
    # A set is evaluated by position, with a warning, where nothing names the classes.
    content = json.loads((out / interop.CONFIG).read_text())
    del content["classes"]
    (out / interop.CONFIG).write_text(json.dumps(content))
    assert weights.load(str(out)).classes is None
    # A new run takes the classifier over only if it is one of its own classes.
    config = small(load_config(f"finetune:data=folder:{images},batch={tiny.BATCH},weights={run}"), tmp_path / "new", 5)
    abstract = build.build(schema.resolve(config), jax.devices()[:1]).abstract
    for classes, heads in ((("bright", "dark", "grey"), 2), (("bright", "dark", "white"), 0), (None, 0)):
        tensors, _ = weights.read_initial(schema.resolve(config), abstract, classes)
        assert len([name for name in tensors if "classif" in name]) == heads


def test_numbers_of_glue_are_learned(pretrained, tmp_path):
    folder = glue_folder(tmp_path / "s", "stsb", 24)
    arg = f"data=glue:stsb@{folder},batch={tiny.BATCH},weights={pretrained}"
    c = small(load_config(f"finetune:{arg}"), tmp_path / "run", 40)
    assert c.objective.classify.classes == 1 and c.data.tokenizer == "bytes"
    results = trainer.run(c)
    name = f"textual/finetuned/glue:stsb@{folder}/validation"
    assert results[f"{name}/finetuned/spearman"] > 80, results


class FakeEncoder:
    classes = None
    similarities = ()

    def __init__(self, logits):
        self.logits = logits

    def texts(self, variables, texts, features):
        return {} if self.logits is None else {"class_logits": np.asarray(self.logits, np.float32)[: len(texts)]}


def test_metrics_of_a_task_with_two_classes(tmp_path):
    folder = glue_folder(tmp_path / "c", "cola", 50)
    data = registry.load(f"finetuned/glue:cola@{folder}/validation", 8)
    assert data.card.metric == "finetuned/matthews" and len(data.items) == 100
    logits = data.labels[:, None] * np.array([-0.5, 0.5]) + np.random.default_rng(0).normal(size=(100, 2))
    results = ClassifierEvaluator(FakeEncoder(logits), data).measure(None)
    metrics, items = by_name(results)
    name, predicted = f"textual/{data.name}", logits.argmax(axis=1)
    found = {key: metrics[f"{name}/finetuned/{key}"] / 100 for key in ("top1", "mean_per_class", "f1", "matthews")}
    of_sklearn = ("accuracy_score", "balanced_accuracy_score", "f1_score", "matthews_corrcoef")
    expected = [getattr(sklearn.metrics, name)(data.labels, predicted) for name in of_sklearn]
    assert list(found.values()) == pytest.approx(expected)
    assert items.keys() == {f"{name}/finetuned/{key}" for key in found} and metrics[f"{name}/majority"] == 50
    assert "Matthews" in tables.render(results)
    for logits, message in ((None, "classifier 0"), (np.zeros((100, 3)), "classifier 3")):
        with pytest.raises(UserError, match=message):
            ClassifierEvaluator(FakeEncoder(logits), data).run(None)
