import csv
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import scipy.special
import sklearn.metrics
from etils import epath

from configs import finetune
from tests import tiny
from tests.encoding import by_name
from xclip_jax import evaluate
from xclip_jax.data import glue, loader, sources, transforms
from xclip_jax.errors import UserError
from xclip_jax.evaluators import registry, summary
from xclip_jax.evaluators.classification import ClassifierEvaluator
from xclip_jax.losses import classification
from xclip_jax.storage import write_json
from xclip_jax.train import build, optim, state, trainer
from xclip_jax.train.checkpoint import Checkpointer

# Losses.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_soft_targets(smoothing):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(9, 5)).astype(np.float32), rng.integers(0, 5, 9)
    target = classification.targets(jnp.asarray(labels), 5, smoothing)
    mine = classification.cross_entropy(jnp.asarray(logits), target)
    peer = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), label_smoothing=smoothing)
    assert float(mine) == pytest.approx(float(peer), rel=1e-5)
    share = rng.random((9, 1))
    mixed = share * np.asarray(target) + (1 - share) * np.asarray(target)[::-1]
    expected = -(mixed * scipy.special.log_softmax(logits, axis=1)).sum(axis=1).mean()
    assert float(classification.cross_entropy(logits, mixed)) == pytest.approx(expected, rel=1e-5)
    peer = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(mixed))
    assert expected == pytest.approx(float(peer), rel=1e-5)


def test_targets_equal_timms():
    mixup = pytest.importorskip("timm.data.mixup")
    torch = pytest.importorskip("torch")
    labels = np.array([2, 0, 1, 2])
    ones = classification.targets(jnp.asarray(labels), 3, 0.1)
    share = 0.3
    theirs = mixup.mixup_target(torch.tensor(labels), 3, share, 0.1)
    np.testing.assert_allclose(share * ones + (1 - share) * ones[::-1], theirs.numpy(), atol=1e-6)


# Mixup and cutmix.


def draw_mix(mixup, cutmix, n=400):
    draw = jax.jit(jax.vmap(lambda key: transforms.sample_mix(key, 2, 20, mixup, cutmix)))
    return jax.device_get(draw(jax.random.split(jax.random.key(1), n)))


def test_mixup_is_a_weighted_mean_and_its_share_is_beta():
    found = draw_mix(0.8, 0.0)
    assert (found["box"] == 0).all() and (found["share"] == found["weight"]).all()
    assert (found["share"][:, 0] == found["share"][:, 1]).all()  # one share a batch
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert found["share"].mean() == pytest.approx(0.5, abs=0.05)
    assert found["share"][:, 0].var() == pytest.approx(1 / (4 * 2.6), rel=0.15)
    images, others = (np.random.default_rng(i).normal(size=(2, 20, 20, 3)) for i in range(2))
    mixed = transforms.mix(images, others, {key: value[7] for key, value in found.items()})
    share = found["share"][7, 0]
    np.testing.assert_allclose(mixed, share * images + (1 - share) * others, rtol=1e-4, atol=1e-5)


def test_cutmix_pastes_a_box_and_the_share_is_what_is_left():
    found = draw_mix(0.0, 1.0)
    images, others = np.zeros((2, 20, 20, 3)), np.ones((2, 20, 20, 3))
    mixed = np.asarray(jax.vmap(lambda drawn: transforms.mix(images, others, drawn))(found))
    assert set(np.unique(mixed)) == {0, 1}
    np.testing.assert_allclose(1 - mixed.mean(axis=(2, 3, 4)), found["share"], atol=1e-6)
    for box, image in zip(found["box"][:50, 0], mixed[:50, 0], strict=True):
        top, bottom, left, right = box
        assert image[top:bottom, left:right].all() and image.sum() == 3 * (bottom - top) * (right - left)
    # Boxes that cross the border are cut, so more is left than the mean of Beta(1, 1).
    assert 0.6 < found["share"].mean() < 0.8


def test_half_of_the_batches_are_cut():
    cut = (draw_mix(0.8, 1.0)["weight"] == 1).mean()
    assert cut == pytest.approx(0.5, abs=0.08)


# Layer decay.


def layer_tree(scanned):
    """Shapes of a model with both kinds of blocks."""
    c = tiny.config("clip", model__img__depth=3, model__txt__depth=2)
    c.model.img["scan"] = scanned
    p = build.build(c, jax.devices()[:1])
    return p.abstract.params


@pytest.mark.parametrize("scanned", [False, True])
def test_layer_decay_is_beits(scanned):
    """BEiT numbers layers: 0 for patches, class token and positions, i + 1 for block i, the last for what follows."""
    params = layer_tree(scanned)
    scales = optim.layer_scales(params, 0.5)
    chex.assert_trees_all_equal_structs(scales, params)
    expected = {"patches": 0, "positions": 0, "cls": 0, "norm_pre": 0, "norm_post": 4}
    for name, layer in expected.items():
        assert set(jax.tree.leaves(scales["img"][name])) == {0.5 ** (4 - layer)}, name
    assert scales["txt"]["tokens"] == 0.5**3 and set(jax.tree.leaves(scales["proj_img"])) == {1.0}
    blocks = scales["img"]["transformer"]
    if scanned:
        for leaf, x in zip(jax.tree.leaves(blocks), jax.tree.leaves(params["img"]["transformer"]), strict=True):
            assert np.ravel(leaf).tolist() == [0.125, 0.25, 0.5] and np.ndim(leaf) == x.ndim
    else:
        assert [set(jax.tree.leaves(blocks[f"block_{i}"])) for i in range(3)] == [{0.125}, {0.25}, {0.5}]


def test_layer_decay_equals_timms():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=4)
    names = {id(x): name for name, x in model.named_parameters()}
    theirs = {
        names[id(x)]: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for x in group["params"]
    }
    mine = optim.layer_scales(layer_tree(False), 0.5)["img"]
    # All but the last norm, which timm counts to the last block, and BEiT to the head.
    assert theirs["head.weight"] == 1
    assert theirs["patch_embed.proj.weight"] == jax.tree.leaves(mine["patches"])[0]
    assert theirs["cls_token"] == mine["cls"] and theirs["pos_embed"] == mine["positions"]
    for i in range(3):
        assert {theirs[f"blocks.{i}.attn.qkv.weight"]} == set(jax.tree.leaves(mine["transformer"][f"block_{i}"]))


def test_layer_decay_scales_the_update_with_its_weight_decay():
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), layer_tree(False))
    options = {"lr": 0.1, "schedule": "constant", "weight_decay": 0.3}
    plain, decayed = (optim.make_optimizer(optim.OptimConfig(**options, layer_decay=d), 10) for d in (1.0, 0.5))
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    one, other = (jax.jit(lambda tx=tx: tx.update(grads, tx.init(params), params)[0])() for tx in (plain, decayed))
    scales = optim.layer_scales(params, 0.5)
    chex.assert_trees_all_close(other, jax.tree.map(lambda x, s: x * s, one, scales), rtol=1e-6)


# The objective.

IMAGES = {
    "objective__classify__classes": 3,
    "objective__classify__smoothing": 0.1,
    "objective__classify__mixup": 0.8,
    "objective__classify__cutmix": 1.0,
    "optim__layer_decay": 0.65,
    "model__img__drop_path": 0.3,
}
TEXTS = {"objective__classify__tower": "txt", "objective__classify__classes": 2}


def make(devices=8, **changes):
    return build.build(tiny.config("classify", objective__classify__head_std=0.3, **changes), jax.devices()[:devices])


def batch(p, seed=0):
    whole = tiny.batch(seed, eot=p.tokenizer.eot_id)
    whole["label"] = np.random.default_rng(seed).integers(0, p.objective.classes, tiny.BATCH, dtype=np.int32)
    return {field: whole[field] for field in p.objective.fields}


def gradients(p):
    catch = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, _, params=None: (grads, grads)
    )
    step = p.make_step(catch)
    s = state.create(p.init, p.abstract).replace(opt_state=None)
    s, metrics = jax.jit(step)(s, loader.to_global(batch(p), p.mesh))
    return jax.device_get(metrics), jax.device_get(s.opt_state)


def test_one_device_against_eight_and_one_part_against_two():
    images = IMAGES | {"model__img__depth": 2}
    one, grads_1 = gradients(make(1, **images))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads_1))
    assert largest > 1e-3
    for other in (make(8, **images, optim__microbatches=n) for n in (1, 2)):
        found, grads = gradients(other)
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-5)
        chex.assert_trees_all_close(grads, grads_1, rtol=1e-5, atol=1e-5 * largest)


def test_the_model_has_one_tower_and_a_classifier():
    assert set(make(1, **IMAGES).abstract.params) == {"img", "classifier"}
    assert set(make(1, **TEXTS).abstract.params) == {"txt", "classifier"}


def test_mixed_images_and_labels_belong_together():
    """The step's loss is the cross-entropy of the model's logits on mixed images and equally mixed labels."""
    p = make(1, **IMAGES | {"data__flip_prob": 0.0, "data__color_jitter": 0.0, "model__img__drop_path": 0.0})
    s, b = state.create(p.init, p.abstract), batch(p)
    metrics = jax.jit(lambda *args: p.step(*args)[1])(s, loader.to_global(b, p.mesh))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(s.seed), s.step), 1)
    drawn = transforms.sample_mix(key, tiny.BATCH, tiny.SIZE, 0.8, 1.0)
    pixels = transforms.normalize(jnp.asarray(b["image"]), *transforms.STATISTICS["imagenet"])
    mixed = transforms.mix(pixels, pixels[::-1], drawn)
    logits = np.asarray(jax.jit(lambda x: p.model.apply(s.variables(), x, None))(mixed)["logits"])
    target = 0.9 * np.eye(3)[b["label"]] + 0.1 / 3
    share = np.asarray(drawn["share"])[:, None]
    assert 0.01 < share[0, 0] < 0.99
    target = share * target + (1 - share) * target[::-1]
    expected = -(target * scipy.special.log_softmax(logits, axis=1)).sum(axis=1).mean()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["classify/top1"]) == pytest.approx((logits.argmax(axis=1) == b["label"]).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"objective\.classify\.classes is 0"),
        (TEXTS | {"objective__classify__tower": "both"}, r"tower is 'both'"),
        (TEXTS | {"objective__classify__mixup": 0.8}, "mixup and .cutmix are of images"),
    ],
)
def test_wrong_objectives(changes, message):
    with pytest.raises(UserError, match=message):
        make(1, **changes)


# Labelled data.


def folder_of_classes(path, n=24, seed=0):
    """Three classes of noise around one brightness each."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(("bright", "dark", "grey")):
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            noise = rng.integers(0, 40, (20, 22, 3)) + (200, 0, 100)[label]
            PIL.Image.fromarray(noise.astype(np.uint8)).save(path / name / f"{i}.png")
    return path


def test_a_folder_and_a_table_give_labelled_records(tmp_path):
    path = folder_of_classes(tmp_path / "a", 2)
    source = sources.open_labelled(f"folder:{path}")
    assert len(source) == 6 and source.names == ["bright", "dark", "grey"]
    assert source.labels().tolist() == [0, 0, 1, 1, 2, 2]
    assert source[3]["label"] == 1 and isinstance(source[3]["image"], bytes)
    assert source.describe(3)["file"].endswith("dark/1.png")
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], ["a/grey/0.png", "7"], ["a/dark/1.png", "0"]])
    table = sources.open_labelled(f"csv:{tmp_path / 't.csv'}")
    assert table.labels().tolist() == [1, 0] and table.names == ["0", "7"]
    with pytest.raises(UserError, match="has no labelled items; write folder:PATH"):
        sources.open_labelled("tar:x")
    c = tiny.config("classify", data__sources=(f"folder:{path}",)).data
    with pytest.raises(UserError, match=r"has 3 classes, expected 4"):
        loader.open_sources(loader.DataConfig(**c.to_dict()), 4)


COLA = "gj04\t1\t\tOur friends {i} won't buy this.\ngj04\t0\t*\tThey {i} drank the pub\n"


def glue_folder(path, task, n=12):
    path.mkdir(parents=True, exist_ok=True)
    if task == "cola":
        text = "".join(COLA.format(i=i) for i in range(n))
    elif task == "stsb":
        rows = [f'{i}\tg\tf\ty\t{i}\ts\ts\t{"ab"[i % 2] * 3} {i}\t"aaa {i}\t{5.0 * (1 - i % 2)}' for i in range(n)]
        head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
        text = "\n".join([head, *rows])
    else:
        rows = [f"{i}\tA {i}\tB\t{('entailment', 'neutral', 'contradiction')[i % 3]}" for i in range(n)]
        text = "index\tsentence1\tsentence2\tgold_label\n" + "\n".join(rows)
    for name in ("train", "dev", "dev_matched", "dev_mismatched"):
        (path / f"{name}.tsv").write_text(text + "\n")
    return path


def test_glue_of_files(tmp_path):
    texts, labels = glue.read("cola", "validation", str(glue_folder(tmp_path / "c", "cola")))
    assert texts[:2] == ["Our friends 0 won't buy this.", "They 0 drank the pub"] and labels[:2].tolist() == [1, 0]
    texts, labels = glue.read("stsb", "train", str(glue_folder(tmp_path / "s", "stsb")))
    assert texts[1] == 'bbb 1 "aaa 1' and labels[:2].tolist() == [5, 0] and labels.dtype == np.float32
    for name in ("mnli", "mnli_mismatched"):
        texts, labels = glue.read(name, "validation", str(glue_folder(tmp_path / "m", "mnli")))
        assert texts[2] == "A 2 B" and labels[:4].tolist() == [0, 1, 2, 0]
    with pytest.raises(UserError, match=r"'colla'.*'cola'"):
        glue.read("colla", "train", str(tmp_path))
    with pytest.raises(UserError, match="the GLUE split is 'test'"):
        glue.read("cola", "test", str(tmp_path))


def test_glue_of_tfds_has_the_files_labels():
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text.glue

    assert "tensorflow" not in __import__("sys").modules
    for name, task in glue.TASKS.items():
        builder = tfds.text.glue.Glue(config=name)
        features = builder.info.features
        assert set(task.features or task.columns) <= set(features), name
        if not task.labels:
            assert features["label"].np_dtype == np.float32
        elif task.labels != ("0", "1"):
            assert tuple(features["label"].names) == task.labels, name


# From end to end.


def losses(folder):
    lines = map(json.loads, (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    folder_of_classes(root / "train")
    folder_of_classes(root / "validation", 5, seed=1)
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run that was saved before its first step, whose towers are then fine-tuned."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    c = tiny.config("clip", run=run, model__txt__context_length=24)
    p = build.build(c, jax.devices()[:1])
    with Checkpointer(run) as checkpointer:
        checkpointer.save(state.create(p.init, p.abstract), {"samples": 0})
    write_json(epath.Path(run) / "config.json", {"config": c.to_dict(), "environment": {}})
    return c.run


def small(config, run, steps):
    """A config of configs/finetune.py for a test's time."""
    config.run, config.steps, config.model.dtype = str(run), steps, "float32"
    config.data.threads, config.optim.warmup, config.optim.lr = 2, 3, 1e-2
    config.eval.every, config.checkpoint.every, config.log.every, config.eval.batch = 0, 10, 1, 16
    config.data.color_jitter = 0.0  # brightness is what the test's classes differ in
    return config


def test_sizes_are_taken_over_from_weights(pretrained, tmp_path):
    c = finetune.get_config(f"data=tfds:imagenet2012,weights={pretrained}")
    assert (c.model.img.width, c.model.img.patch, c.model.txt.context_length, c.data.tokenizer) == (32, 8, 24, "bytes")
    assert c.model.img.scan and c.objective.classify.classes == 1000  # how towers are computed stays the config's
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        finetune.get_config(f"weights={tmp_path}")


class Stopped(Exception):
    pass


def test_images_are_learned_resumed_and_evaluated(images, pretrained, tmp_path, monkeypatch, capsys):
    arg = f"data=folder:{images},batch={tiny.BATCH},epochs=10,weights={pretrained}"
    c = small(finetune.get_config(arg), tmp_path / "run", 30)
    assert c.objective.classify.classes == 3 and c.objective.classify.mixup == 0.8 and c.model.img.width == 32
    results = trainer.run(c)
    name = f"visual/finetuned/folder:{images}/validation"
    assert results[f"{name}/finetuned/top1"] >= 90 and results[f"{name}/n"] == 15
    said = capsys.readouterr().out
    assert "fine-tuned, %" in said and "so initialised at random: classifier" in said and "WARNING" not in said
    found = evaluate.evaluate(str(c.run), f"finetuned/folder:{images}/validation")
    assert found["results"][0]["value"] == results[f"{name}/finetuned/top1"]
    with pytest.raises(UserError, match="has no txt tower; evaluate finetuned/SET"):
        evaluate.evaluate(str(c.run), f"folder:{images}/validation")
    # Cut off at step 17, gone on with from step 10: the same losses.
    again = small(finetune.get_config(arg), tmp_path / "again", 30)
    original, seen = loader.to_global, []

    def counted(batch, mesh):
        if len(seen) == 17:
            raise Stopped
        seen.append(batch)
        return original(batch, mesh)

    monkeypatch.setattr(loader, "to_global", counted)
    with pytest.raises(Stopped):
        trainer.run(again)
    monkeypatch.undo()
    trainer.run(again)
    assert losses(c.run) == losses(again.run) and len(losses(c.run)) == 30


def test_numbers_of_glue_are_learned(pretrained, tmp_path):
    folder = glue_folder(tmp_path / "s", "stsb", 24)
    arg = f"data=glue:stsb@{folder},batch={tiny.BATCH},weights={pretrained}"
    c = small(finetune.get_config(arg), tmp_path / "run", 40)
    assert c.objective.classify.classes == 1 and c.data.tokenizer == "bytes"
    results = trainer.run(c)
    name = f"textual/finetuned/glue:stsb@{folder}/validation"
    assert results[f"{name}/finetuned/spearman"] > 80, results


class FakeEncoder:
    classes = None

    def __init__(self, logits):
        self.logits = logits

    def texts(self, variables, texts, features):
        return {} if self.logits is None else {"c": np.asarray(self.logits, np.float32)[: len(texts)]}


def test_metrics_of_a_task_with_two_classes(tmp_path):
    folder = glue_folder(tmp_path / "c", "cola", 50)
    data = registry.load(f"finetuned/glue:cola@{folder}/validation", 8)
    assert data.card.metric == "finetuned/matthews" and len(data.items) == 100
    logits = data.labels[:, None] * np.array([-0.5, 0.5]) + np.random.default_rng(0).normal(size=(100, 2))
    results = ClassifierEvaluator(FakeEncoder(logits), data).measure(None)
    metrics, items = by_name(results)
    name, predicted = f"textual/{data.name}", logits.argmax(axis=1)
    found = {key: metrics[f"{name}/finetuned/{key}"] / 100 for key in ("top1", "mean_per_class", "f1", "matthews")}
    assert found == pytest.approx(
        {
            "top1": sklearn.metrics.accuracy_score(data.labels, predicted),
            "mean_per_class": sklearn.metrics.balanced_accuracy_score(data.labels, predicted),
            "f1": sklearn.metrics.f1_score(data.labels, predicted),
            "matthews": sklearn.metrics.matthews_corrcoef(data.labels, predicted),
        }
    )
    assert items.keys() == {f"{name}/finetuned/{key}" for key in found} and metrics[f"{name}/majority"] == 50
    assert "matthews" in summary.render(results)
    for logits, message in ((None, "no classifier"), (np.zeros((100, 3)), "a classifier of 3 classes")):
        with pytest.raises(UserError, match=message):
            ClassifierEvaluator(FakeEncoder(logits), data).run(None)
