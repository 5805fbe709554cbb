"""Whole runs fed from tars: with bad samples among the pairs, and against the same pairs from a TFDS data set."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.helpers import bad_tars, tiny
from xclip_jax.train import trainer

pytestmark = pytest.mark.long


class Pairs(tfds.core.GeneratorBasedBuilder):
    """The pairs 0 to n - 1 of `bad_tars.pairs`, in order."""

    VERSION = tfds.core.Version("1.0.0")
    N = 48

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), dtype=np.uint8, encoding_format="jpeg")
        features = tfds.features.FeaturesDict({"image": image, "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description="-", features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(self.N):
            yield i, {"image": bad_tars.jpeg(i), "text": f"picture {i}"}


@pytest.mark.slow  # two runs of a recipe
def test_tars_and_tfds_give_the_same_losses(tmp_path):
    bad_tars.pairs(tmp_path / "0.tar", 0, 20)
    bad_tars.pairs(tmp_path / "1.tar", 20, Pairs.N - 20)
    builder = Pairs(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    specs = {"tars": f"tar:{tmp_path}/*.tar", "tfds": f"tfds:{builder.name}/train"}
    for name, spec in specs.items():
        options = {"data__sources": (spec,), "data__dir": str(tmp_path / "tfds"), "checkpoint__every": 100}
        trainer.run(tiny.config("xclip", steps=20, run=tmp_path / name, **options))
    assert tiny.losses(tmp_path / "tars") == tiny.losses(tmp_path / "tfds")
    assert len(set(tiny.losses(tmp_path / "tars"))) == 20


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A tar of 40 pairs, four of them without a picture."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = [(f"{i:03d}", {"jpg": b"<html>" if i % 10 == 3 else bad_tars.jpeg(i), "txt": b"pair"}) for i in range(40)]
    bad_tars.shard(folder / "0.tar", samples)
    return folder


def test_a_run_goes_on_and_writes_down_what_was_bad(mixed, tmp_path):
    options = {"data__sources": (f"tar:{mixed}/0.tar",), "data__max_bad_fraction": 0.5}
    run = tmp_path / "run"
    trainer.run(tiny.config(steps=10, run=run, **options))
    lines = tiny.lines(run, "bad_samples.jsonl")
    assert {line["key"] for line in lines} == {"003", "013", "023", "033"}
    assert {line["reason"] for line in lines} == {"not an image"}
    last = tiny.lines(run)[-1]
    assert last["samples"] == 10 * tiny.BATCH
    assert last["tokens"] == last["samples"] * 6  # four letters between a start and an end
    assert 14 <= last["data/bad"] <= 25  # four epochs, and replacements that were bad too
    assert last["data/bad_share"] == pytest.approx(0.1, abs=0.04)
    card = json.loads((run / "data.json").read_text())
    assert card[0]["samples"] == 40
    assert card[0]["tars"] == [{"name": "0.tar", "bytes": (mixed / "0.tar").stat().st_size, "samples": 40}]
