"""Sets in clip_benchmark's layout: its numbers on the same tars and weights, its writer, faults; published probes."""

import dataclasses
import io
import json
import os
import pathlib
import shutil

import numpy as np
import open_clip
import pytest
import safetensors.torch
import tensorflow_datasets as tfds
from PIL import Image

from tests.data.readers.test_wds import array, write
from tests.evaluators.sets.test_known_sets import evaluate as evaluated
from tests.evaluators.sets.test_known_sets import records
from tests.evaluators.sets.test_known_sets import write as write_image
from tests.helpers.encoding import PREPARE, SIZE, make_encoder, small_model
from tests.helpers.foreign import MODELS, make_open_clip
from xclip_jax.commands import evaluate
from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data import sources
from xclip_jax.evaluators import registry
from xclip_jax.evaluators.probe import Sweep
from xclip_jax.evaluators.prompts import PROFILES
from xclip_jax.evaluators.results import items
from xclip_jax.evaluators.sets import known_sets

NAMES = ["tree frog", "espresso machine", "hand-held_computer", "go-kart", "moving van", "wok", "viaduct"]
TEMPLATES = ["a photo of a {c}.", "itap of the {c}.", "{c}"]


def picture(rng, ending, size=(41, 33)):
    ramp = np.linspace(0, 1, size[0])[None, :, None] * rng.uniform(-200, 200, 3) + rng.uniform(50, 200, 3)
    pixels = np.clip(ramp + rng.normal(0, 20, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, {"jpg": "jpeg"}.get(ending, ending))
    return content.getvalue()


def classified(n=50, seed=0):
    """Samples with classes; WebP, PNG and JPEG in turns."""
    rng = np.random.default_rng(seed)
    endings = [("webp", "png", "jpg")[i % 3] for i in range(n)]
    return [{ending: picture(rng, ending), "cls": str(rng.integers(len(NAMES))).encode()} for ending in endings]


def write_classified(root, n=50):
    return write(root, classified(n), classnames=NAMES, zeroshot_classification_templates=TEMPLATES)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "model"
    folder.mkdir()
    model = make_open_clip("quick_b32")
    # Larger matrices spread the scores: none of the decisions below is nearer than 1e-4.
    state = {key: x.contiguous() * (2.5 if x.ndim == 2 else 1) for key, x in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    content = {"model_cfg": MODELS["quick_b32"] | {"embed_dim": 48}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def peers(weights, root, task, output, monkeypatch, **options):
    """Metrics, in percent, of clip_benchmark's command."""
    cli = pytest.importorskip("clip_benchmark.cli", exc_type=ImportError)
    line = ["clip_benchmark", "eval", "--dataset", "wds/own", "--dataset_root", str(root), "--task", task, "--no_amp",
            "--model", f"local-dir:{weights}", "--pretrained", "", "--num_workers", "0", "--quiet",
            "--output", str(output), *(str(word) for words in options.items() for word in words)]  # fmt: skip
    monkeypatch.setattr("sys.argv", line)
    # NumPy 2.4 refuses float() of the array of one element that it makes.
    monkeypatch.setattr(cli.zeroshot_classification, "float", lambda x: np.asarray(x).item(), raising=False)
    cli.main()
    return {key: 100 * value for key, value in json.loads(output.read_text())["metrics"].items()}


def ours(weights, spec, output):
    (entry,) = evaluate.evaluate(str(weights), spec, profile="open_clip", output=str(output))["results"]
    return {key.rpartition(f"{spec}/")[2]: value for key, value in entry["metrics"].items()}, entry


def test_classification_equals_clip_benchmarks(weights, tmp_path, monkeypatch):
    root = write_classified(tmp_path / "set")
    theirs = peers(weights, root, "zeroshot_classification", tmp_path / "theirs.json", monkeypatch)
    metrics, entry = ours(weights, f"wds:{root}", tmp_path / "ours.json")
    for key, name in {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}.items():
        assert metrics[key] == pytest.approx(theirs[name], abs=0.01)
    assert 0 < theirs["acc1"] < theirs["acc5"] < 100 and theirs["acc1"] != theirs["mean_per_class_recall"]
    assert entry["metric"] == "top1" and entry["templates"].startswith("the data set's (3) ")


def test_prompts_and_names_of_the_data_set_are_kept(tmp_path):
    spec = f"wds:{write_classified(tmp_path / 'set', 5)}"
    plain = registry.load(spec, PREPARE)
    assert plain.prompts[1] == ["a photo of a espresso machine.", "itap of the espresso machine.", "espresso machine"]
    path = tmp_path / "set" / "zeroshot_classification_templates.txt"
    path.write_text("{c}\na photo of a {}.\n")
    assert sources.open_labelled(spec).names == NAMES  # probes and training do without prompts
    with pytest.raises(UserError, match=rf"^{spec}: .*'a photo of a {{}}.'"):
        registry.load(spec, PREPARE)
    path.write_text("{c}\nart of a {c}\n")
    edited = registry.load(spec, PREPARE).card  # so that --compare refuses results by edited prompts
    assert edited == dataclasses.replace(plain.card, templates=edited.templates) != plain.card
    path.unlink()
    assert registry.load(spec, PREPARE).prompts[2] == ["a photo of a hand-held computer"]


def write_captions(root, n=30):
    """A retrieval set whose captions all differ: clip_benchmark does not match equal ones."""
    rng = np.random.default_rng(2)
    # Short enough that they differ in the tokens of the model's context.
    lines = [[f"{NAMES[int(k) % 7]} {i} {k}" for k in rng.permutation(99)[: 1 + i % 3]] for i in range(n)]
    samples = [{"webp": picture(rng, "webp"), "txt": "\n".join(of_image).encode()} for of_image in lines]
    return write(root, samples, dataset_type=["retrieval"]), lines


def test_retrieval_equals_clip_benchmarks(weights, tmp_path, monkeypatch):
    root, lines = write_captions(tmp_path / "set")
    options = {"--recall_k": 5, "--batch_size": 64}
    theirs = peers(weights, root, "zeroshot_retrieval", tmp_path / "theirs.json", monkeypatch, **options)
    metrics, _ = ours(weights, f"wds:{root}", tmp_path / "ours.json")
    for key, name in {"image_to_text/r5": "text_retrieval", "text_to_image/r5": "image_retrieval"}.items():
        assert metrics[key] == pytest.approx(theirs[f"{name}_recall@5"], abs=0.01)
        assert 0 < metrics[key] < 100
    loaded = registry.load(f"wds:{root}", PREPARE)
    assert loaded.captions == [[f"a photo of {text}" for text in texts] for texts in lines]
    assert loaded.card.split == "test" and registry.check(f"wds:{root}").shows(f"wds:{root}") == "captions"


def test_a_probe_reads_two_splits(tmp_path):
    root = write_classified(tmp_path / "set", 25)
    write(root, classified(8, seed=1), split="train", classnames=NAMES)
    probe = registry.load(f"probe/wds:{root}", PREPARE)
    assert len(probe.train) == 8 and not len(probe.validation) and len(probe.test) == 25
    expected = [[int(sample["cls"]) for sample in classified(n, seed)] for n, seed in ((8, 1), (25, 0))]
    assert [part.tolist() for part in probe.tasks[""][::2]] == expected


def test_a_copy_is_the_same_set_and_other_labels_another(tmp_path):
    hashes = [registry.load(f"wds:{write_classified(tmp_path / name, 5)}", PREPARE).card.split_hash for name in "ab"]
    other = [*classified(5)[:-1], classified(5)[-1] | {"cls": b"0"}]
    write(tmp_path / "c", other, classnames=NAMES, zeroshot_classification_templates=TEMPLATES)
    assert hashes[0] == hashes[1] != registry.load(f"wds:{tmp_path / 'c'}", PREPARE).card.split_hash


def test_of_the_hub_only_the_split_is_fetched_and_the_cache_is_enough(server, tmp_path, monkeypatch):
    root = write_classified(tmp_path / "set", 25)
    write(root, classified(5, seed=1), split="train", classnames=NAMES)
    commit = server.add("lab/wds_own", root)
    loaded = registry.load("wds:hf:lab/wds_own", PREPARE)
    assert [name for name in server.fetched() if name.endswith("tar")] == ["test/0.tar", "test/1.tar"]
    assert (len(loaded.images), loaded.card.version) == (25, commit)
    assert len(registry.load("probe/wds:hf:lab/wds_own@main", PREPARE).train) == 5
    faults = {"none": "lab/none", "wds_own@v2": "'v2'", "wds_own/validation": "validation/nshards.txt"}
    for spec, named in faults.items():
        with pytest.raises(UserError, match=named):
            registry.load(f"wds:hf:lab/{spec}", PREPARE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert registry.load("wds:hf:lab/wds_own", PREPARE).card.split_hash == loaded.card.split_hash
    with pytest.raises(UserError, match=r"^wds:hf:lab/other: it is not in the cache"):
        registry.load("wds:hf:lab/other", PREPARE)
    assert registry.check("wds:hf:lab/other").shows("wds:hf:lab/other") == "classes"


FAULTS = {
    "folder": (lambda root: root.rename(root.with_name("elsewhere")), "no file '.*set/classnames.txt'"),
    "tar": (lambda root: (root / "test/1.tar").unlink(), "test/1.tar"),
    "end": (lambda root: os.truncate(root / "test/1.tar", 2000), "1.tar' is damaged at byte .* or cut off"),
    "type": (lambda root: (root / "dataset_type.txt").write_text("winogavil"), "dataset_type.txt is 'winogavil'"),
}


@pytest.mark.parametrize("missing", FAULTS)
def test_faults_are_named(tmp_path, missing):
    change, named = FAULTS[missing]
    root = write_classified(tmp_path / "set", 25)
    change(root)
    with pytest.raises(UserError, match=named):
        registry.load(f"wds:{root}", PREPARE)


@pytest.mark.parametrize("label", [np.ones(3), np.full(7, 2), np.array([None] * 7)])
def test_labels_that_are_none(tmp_path, label):
    sample = {"png": picture(np.random.default_rng(0), "png"), "npy": array(label)}
    root = write(tmp_path / "set", [sample], classnames=NAMES, dataset_type=["multilabel"])
    with pytest.raises(UserError, match="expected an array of zeros and ones"):
        sources.open_labelled(f"wds:{root}")


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    samples = [*classified(4), {"jpg": b"no image", "cls": b"1"}]
    loaded = registry.load(f"wds:{write(tmp_path / 'set', samples, classnames=NAMES)}", PREPARE)
    with pytest.raises(BadSample) as error:
        loaded.images[4]
    assert error.value.__notes__ == [f"image '{tmp_path}/set/test/0.tar#s004'"]


# --- probes of published sets


@pytest.mark.parametrize("name", ["cifar10", "dtd"])
def test_a_probe_of_a_tfds_set(name):
    with tfds.testing.mock_data(as_data_source_fn=records):
        data = registry.load(f"probe/{name}", SIZE)
    held = 3 if known_sets.ENTRIES[name].held else 0
    assert (len(data.train), len(data.validation), len(data.test)) == (3, held, 3)
    data = dataclasses.replace(data, sweep=Sweep((1.0,), 0))
    metrics = evaluated(data)
    assert metrics[f"visual/probe/{name}/n"] == 3 and f"visual/probe/{name}/{data.card.metric}" in metrics


def test_a_probe_without_a_training_split(tmp_path):
    for name in ("imagenet_a", "gtsrb"):
        with pytest.raises(UserError, match=rf"^{name} .*probe/folder:PATH"):
            registry.load(f"probe/{name}", SIZE)


def test_a_rare_class_without_training_images_is_wrong_and_named(tmp_path, capsys):
    """A class of validation images is fitted on; 1 of 20 test images is allowed, 2 of 20 are not."""
    for part, counts in (("train", {"cat": 2, "emu": 2}), ("validation", {"cat": 1, "fox": 1}),
                         ("test", {"cat": 10, "dog": 1, "emu": 8, "fox": 1})):  # fmt: skip
        for value, (name, count) in enumerate(counts.items()):
            for i in range(count):
                write_image(tmp_path / part / name / f"{i}.png", 50 * value)
    data = registry.load(f"probe/folder:{tmp_path}", SIZE)
    assert "1 of 20 test images have classes that training lacks: 'dog'; they count" in capsys.readouterr().out
    train, held, test = data.tasks[""]
    assert (train.tolist(), held.tolist()) == ([0, 0, 1, 1], [0, 3])
    assert test.tolist() == [0] * 10 + [2] + [1] * 8 + [3]
    results = registry.evaluator(make_encoder(), dataclasses.replace(data, sweep=Sweep((1.0,), 0)))
    for item in items(results.measure(small_model()[1])).values():
        assert item.values[10] == 0
    (tmp_path / "test" / "cat" / "0.png").rename(tmp_path / "test" / "dog" / "1.png")
    with pytest.raises(UserError, match=r"^probe/folder:.* 2 of 20 test images .*: 'dog'; add such images"):
        registry.load(f"probe/folder:{tmp_path}", SIZE)


# Babel-ImageNet.


@pytest.fixture
def babel(tmp_path):
    """Its two files beside ImageNet's folder of WordNet ids."""
    rng = np.random.default_rng(0)
    for i, wnid in enumerate(("n01440764", "n01443537", "n01484850", "n01491361")):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        for j in range(1 + i):
            (tmp_path / "val" / wnid / f"ILSVRC2012_val_{j:08}.JPEG").write_bytes(picture(rng, "jpg"))
    names = {"DE": [[3, 1, 2], ["Tigerhai", "Goldfisch", "Weißer Hai"]], "NE": [[1], ["सुनौलो माछा"]]}
    names["EN"] = [list(range(1000)), ["Tinca tinca", *(f"of BabelNet {i}" for i in range(999))]]
    (tmp_path / "babel_imagenet.json").write_text(json.dumps(names))
    (tmp_path / "nllb_dist13b_prompts.json").write_text(json.dumps({"DE": ["ein Foto von {}.", " {} "]}))
    return tmp_path / "babel_imagenet.json"


def test_babel_imagenet_has_the_classes_of_a_language(babel):
    data = registry.load(f"babel/de@{babel}", SIZE)
    assert data.names == ["Tigerhai", "Goldfisch", "Weißer Hai"]
    assert data.prompts[2] == ["ein Foto von Weißer Hai.", " Weißer Hai "]
    # Images of classes 1, 2 and 3 of ImageNet, in their order; class 0 has no German name here.
    assert data.labels.tolist() == [1] * 2 + [2] * 3 + [0] * 4 and len(data.images) == 9
    whole = registry.load(f"imagenet@{babel.parent / 'val'}", SIZE)
    for i in range(9):
        np.testing.assert_array_equal(data.images[i], whole.images[i + 1])
    assert data.card.templates.startswith("translated (2) ") and data.card.metric == "top1"
    metrics = evaluated(data)
    assert metrics[f"zeroshot/babel/de@{babel}/n"] == 9 and metrics[f"zeroshot/babel/de@{babel}/ways"] == 3
    nepali = registry.load(f"babel/NE@{babel}", SIZE)  # without translated templates
    assert nepali.prompts == [["सुनौलो माछा"]] and nepali.labels.tolist() == [0, 0]
    assert nepali.card.split_hash != data.card.split_hash


def test_babel_imagenet_in_english_is_imagenet_of_openai(babel):
    """The authors' code has their names and prompts, whatever the files contain."""
    english, whole = registry.load(f"babel/en@{babel}", SIZE), registry.load(f"imagenet@{babel.parent / 'val'}", SIZE)
    assert english.names == whole.names and english.prompts == whole.prompts and english.names[0] == "tench"
    assert english.labels.tolist() == whole.labels.tolist() and english.card.templates.startswith("OpenAI's (80) ")
    np.testing.assert_array_equal(english.images[9], whole.images[9])
    slip = registry.load(f"babel/en@{babel}", SIZE, profile=PROFILES["slip"])
    assert slip.prompts == english.prompts


def test_babel_imagenet_of_tfds(babel):
    path = babel.parent / "tfds" / babel.name
    path.parent.mkdir()
    path.write_text(json.dumps({"DE": [[1, 999], ["Goldfisch", "Klopapier"]]}))
    with tfds.testing.mock_data(as_data_source_fn=records):
        data = registry.load(f"babel/de@{path}", SIZE)
    assert data.labels.tolist() == [0, 1] and data.prompts == [["Goldfisch"], ["Klopapier"]]
    assert data.card.data == "imagenet2012" and data.card.version == "5.1.0"


@pytest.mark.parametrize(
    ("language", "change", "named"),
    [
        ("fr", None, "'FR'"),
        ("de", '{"DE": 5}', r"'.*babel_imagenet\.json' is not in the published layout"),
        ("de", '{"DE": [[1, 1000], ["Goldfisch", "Einhorn"]]}', "index 1000 is out of bounds"),
    ],
)
def test_what_is_not_babel_imagenets_file(babel, language, change, named):
    if change:
        babel.write_text(change)
    with pytest.raises(UserError, match=named):
        registry.load(f"babel/{language}@{babel}", SIZE)


# ImageNet with clip_benchmark's files of other languages.


@pytest.fixture
def languages(babel):
    """The files that clip_benchmark is installed with beside ImageNet's folder."""
    builder = pytest.importorskip("clip_benchmark.datasets.builder", exc_type=ImportError)
    for path in pathlib.Path(builder.__file__).parent.glob("*_*.json"):
        if path.name.endswith(("_classnames.json", "_templates.json")):
            shutil.copy(path, babel.parent)
    return builder, babel.parent


@pytest.mark.parametrize("language", ["ar", "cn", "it", "jp", "en"])
def test_imagenet_in_other_languages_equals_clip_benchmarks(language, languages):
    builder, folder = languages
    theirs = builder.build_dataset("imagenet1k-unverified", root=str(folder), language=language)
    data = registry.load(f"imagenet/{language}@{folder}", SIZE)
    assert data.names == theirs.classes
    assert data.prompts == [[text.format(c=name) for text in theirs.templates] for name in theirs.classes]
    assert data.labels.tolist() == [label for _, label in theirs.samples]  # the first classes of all
    authors = "OpenAI's" if language == "en" else "translated"
    assert data.card.templates.startswith(f"{authors} ({len(theirs.templates)}) ")


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("it_classnames.json", {"imagenet1k": ["tinca"]}, "published layout .*: 1 names for 1000 classes"),
        ("it_classnames.json", {"cifar10": ["aereo"]}, "imagenet1k"),
        ("it_zeroshot_classification_templates.json", {"imagenet1k": ["una foto"]}, r"_templates.json, line 1: .*{c}"),
        ("it_zeroshot_classification_templates.json", None, "No such file .*it_zeroshot_classification_templates.json"),
    ],
)
def test_faults_of_a_language(file, content, named, languages):
    (languages[1] / file).unlink()
    if content:
        (languages[1] / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=named):
        registry.load(f"imagenet/it@{languages[1]}", SIZE)
