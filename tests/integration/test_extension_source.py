"""A kind of sources of another package: tests/extension/json_lines.py, and no change inside xclip_jax."""

import base64
import json
import shutil

import numpy as np
import pytest

from tests.helpers import bad_tars, tiny
from xclip_jax.commands import check
from xclip_jax.config.schema import resolve
from xclip_jax.core.errors import UserError
from xclip_jax.data import labelled, sources
from xclip_jax.data.base import SourceKind, SourceOptions
from xclip_jax.evaluators import registry
from xclip_jax.train import prepare, trainer
from xclip_jax.train.run_writer import RunWriter

pytestmark = pytest.mark.long

KIND = "tests.extension.json_lines:JsonLines"
N = 40


def write(folder, n=N, bad=7):
    """A file of `n` pairs, every other image in base64, and one line that is not JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        image = base64.b64encode(bad_tars.jpeg(i)).decode() if i % 2 else f"{i}.jpg"
        (folder / f"{i}.jpg").write_bytes(bad_tars.jpeg(i))
        lines.append(json.dumps({"image": image, "text": [f"picture {i}", "of a wave"], "tags": ["wave"]}))
    if bad is not None:
        lines[bad] = '{"image": '
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return f"{KIND}:{folder / 'pairs.jsonl'}"


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs"))


def test_it_is_trained_on_and_its_bad_sample_is_recorded(spec, tmp_path):
    run = tmp_path / "run"
    trainer.run(tiny.config("clip", run=run, steps=4, data__sources=(spec,), checkpoint__every=2))
    assert len(tiny.losses(run)) == 4
    (entry,) = tiny.lines(run, "bad_samples.jsonl")
    path = spec.removeprefix(f"{KIND}:")
    assert (entry["file"], entry["line"], entry["reason"]) == (path, "8", "JSONDecodeError")
    (fingerprint,) = json.loads((run / "data.json").read_text())
    source = sources.open_pairs(spec)
    assert fingerprint == source.fingerprint() and fingerprint["samples"] == N


def test_the_check_reads_it(spec, capsys):
    code = check.main([spec, "--tokenizer", "bytes"])
    out = capsys.readouterr().out
    assert code == 0 and f"samples: {N}, index " in out and "bad, JSONDecodeError: 1 of 40 that were read" in out
    assert '"line": "8"' in out


def test_keys_are_those_of_the_config(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"photo": "a.jpg", "title": "a", "alt": "b"}) + "\n")
    shutil.copy(write(tmp_path).removeprefix(f"{KIND}:").replace("pairs.jsonl", "0.jpg"), tmp_path / "a.jpg")
    options = SourceOptions(image_column="photo", text_columns=("title", "alt"))
    assert sources.open_pairs(f"{KIND}:{tmp_path / 'x.jsonl'}", options)[0]["text"] == ["a", "b"]


class Waves(SourceKind):
    """Labelled images: REST/SPLIT is a split of `REST` classes."""

    @classmethod
    def has_split(cls, rest, split, options):
        return split in ("train", "test")

    @classmethod
    def open_labelled(cls, rest, options):
        classes, _, split = rest.partition("/")
        names = [f"wave {i}" for i in range(int(classes))]
        seed = {"": 0, "train": 1, "test": 2, "validation": 3}[split]
        images = [bad_tars.jpeg(i + 50 * seed) for i in range(4 * len(names))]
        return labelled.Labelled("image", images, np.arange(len(images)) % len(names), names)


WAVES = "tests.integration.test_extension_source:Waves:3"


def test_evaluation_sets_of_labelled_items():
    data = registry.load(f"zeroshot/{WAVES}", 16)
    assert data.name == WAVES and len(data.images) == 12 and list(data.names) == ["wave 0", "wave 1", "wave 2"]
    probe = registry.load(f"probe/{WAVES}", 16)
    assert len(probe.train) == len(probe.test) == 12 and not len(probe.validation)
    tested = registry.load(f"finetuned/{WAVES}/test", 16)
    assert tested.classes == 3 and tested.labels.tolist() == [0, 1, 2] * 4
    assert tested.card.split_hash != registry.load(f"finetuned/{WAVES}", 16).card.split_hash


def test_a_classifier_has_the_classes_of_labelled_items(tmp_path):
    keys = {"data__sources": (WAVES,), "data__batch": 8, "objective__classify__classes": 3}
    config = resolve(tiny.config("classify", run=tmp_path / "run", **keys))
    made, _ = prepare.prepare(config, RunWriter(config.run))
    assert made.fingerprints[0]["classes"] == ["wave 0", "wave 1", "wave 2"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_lab.no_such:Mine:/x", r"source 'my_lab.no_such:Mine' cannot be imported"),
        ("tests.extension.json_lines:JsonLinesSource:/x", "JsonLinesSource' is not a class derived from .*SourceKind"),
        (f"{KIND}:/nowhere", "'/nowhere' does not exist"),
        (WAVES, rf"source '{WAVES}' has no image-text pairs; write tar:PATTERN"),
        ("folder:", "unknown source 'folder:'; write .*folder:PATH"),
    ],
)
def test_a_spec_that_names_no_source(spec, message):
    with pytest.raises(UserError, match=message):
        sources.open_pairs(spec)
