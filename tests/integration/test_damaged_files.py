"""Files of a run's folder that are lost or damaged: named with a remedy, or left out."""

import json
import os
import shutil

import pytest

from tests.data.test_tokenizer import save_words
from tests.helpers import tiny
from xclip_jax.config import schema
from xclip_jax.core.errors import UserError
from xclip_jax.core.run_folder import RunReader
from xclip_jax.train import trainer
from xclip_jax.train.run_writer import RunWriter

pytestmark = pytest.mark.long

run = tiny.copied


def steps(run):
    return [line["step"] for line in tiny.lines(run)]


def test_lost_checkpoints_are_not_trained_over(pairs, run):
    """The run went on to step 8, and must have written checkpoints."""
    content = json.loads((run / "config.json").read_text())
    content["config"]["steps"] = 8
    (run / "config.json").write_text(json.dumps(content))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(5, 9)))
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"metrics up to step 8 and no checkpoint; restore .*checkpoints"):
        trainer.run(tiny.short(pairs, run, steps=8))
    assert steps(run)[-1] == 8


def test_a_run_that_starts_again_for_want_of_a_checkpoint_says_so(pairs, run, capsys):
    """As one that was killed while its first checkpoint was written."""
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints")
    trainer.run(tiny.short(pairs, run))
    out = capsys.readouterr().out
    assert "WARNING: there is no checkpoint, so the run starts again; metrics up to step 4 are dropped" in out
    assert steps(run) == [1, 2, 3, 4] and RunReader(run).steps() == [2, 4]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"\xff\xfe"),
        ("config.json", b'{"config": 1}'),
        ("data.json", b"[{]"),
        ("data.json", b'{"samples": 3}'),
        ("results.json", b'{"results": {}, "config": 3}'),
        ("trackers.json", b""),
    ],
)
def test_a_damaged_file_is_named(pairs, run, name, content):
    (run / name).write_bytes(content)
    if name in ("data.json", "trackers.json"):
        (run / "results.json").unlink()
    with pytest.raises(UserError, match=f"{name} is damaged"):
        trainer.run(tiny.short(pairs, run))


def test_lines_without_what_they_should_have_are_left_out(pairs, run):
    """Objects that lack a value, or have another type of it, in each file of lines; and a config.json of few words."""
    (run / "results.json").unlink()
    damaged = '{"step": "4"}', '{"loss": 1.5}', '{"position": 0}', '{"position": 0, "source": [], "index": 1}'
    for name in ("metrics.jsonl", "bad_samples.jsonl", "skipped_steps.jsonl"):
        with open(run / name, "a") as file:
            file.write("".join(f"{line}\n" for line in damaged))
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({"config": content["config"]}))
    trainer.run(tiny.short(pairs, run))
    assert steps(run) == [1, 2, 3, 4]
    assert not (run / "bad_samples.jsonl").read_text() and not (run / "skipped_steps.jsonl").read_text()
    assert json.loads((run / "config.json").read_text())["starts"][0]["step"] == 4


def test_the_copy_of_the_tokenizer_is_whole_or_missing(pairs, tmp_path, monkeypatch):
    save_words(tmp_path / "words.json", ["?", "<pad>", "<s>", "</s>", "picture", "number"])
    c = schema.resolve(tiny.short(pairs, tmp_path / "run", data__tokenizer=str(tmp_path / "words.json")))
    folder = RunWriter(c.run)

    def fails(_):
        if list((tmp_path / "run").glob(".tokenizer.json.*.tmp")):
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output error"), folder.claimed(c, []):
            pass
    assert folder.is_run() and not folder.tokenizer_file.exists()
    with folder.claimed(c, []):
        assert folder.tokenizer_file.read_bytes() == (tmp_path / "words.json").read_bytes()
