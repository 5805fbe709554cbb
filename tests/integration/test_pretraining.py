"""A whole run fed from a tar with bad samples among the pairs."""

import json

import pytest

from tests.helpers import bad_tars, tiny
from xclip_jax.train import trainer

pytestmark = pytest.mark.long


def test_a_run_goes_on_and_writes_down_what_was_bad(tmp_path):
    """Of 40 pairs, four of them without a picture."""
    samples = [(f"{i:03d}", {"jpg": b"<html>" if i % 10 == 3 else bad_tars.jpeg(i), "txt": b"pair"}) for i in range(40)]
    bad_tars.shard(tmp_path / "0.tar", samples)
    run, options = tmp_path / "run", {"data__sources": (f"tar:{tmp_path}/0.tar",), "data__max_bad_fraction": 0.5}
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
    assert card[0]["tars"] == [{"name": "0.tar", "bytes": (tmp_path / "0.tar").stat().st_size, "samples": 40}]
