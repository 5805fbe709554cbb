"""No command replaces a file that it did not write."""

import functools
import json

import pyarrow
import pyarrow.parquet
import pytest

from examples import exchanged, mix
from tests.helpers import tiny
from tests.helpers.foreign import our_model
from xclip_jax import interop
from xclip_jax.commands import check, embed, evaluate, export, plan, report
from xclip_jax.core.errors import UserError
from xclip_jax.train import trainer

pytestmark = pytest.mark.long


@functools.cache
def _model():
    return our_model("clip")


def _write_weights(to, out):
    config, variables = _model()
    interop.write(variables, config, out, to)


FILES = {
    "check": lambda run, pairs, out: check.main([str(pairs), "--by", run, "--suspects", out]),
    "embed": lambda run, pairs, out: embed.main(["--checkpoint", run, "--images", str(pairs), "--out", out]),
    "evaluate": lambda run, pairs, out: evaluate.main(
        ["--checkpoint", run, "--suite", f"retrieval/{pairs}", "--output", out]
    ),
    "exchanged": lambda run, pairs, out: exchanged.main([f"folder:{pairs}", "suspects.jsonl", "--out", out]),
    "plan": lambda run, pairs, out: plan.plan(tiny.config(), "v5e:2x2", hlo=out),
    "report": lambda run, pairs, out: report.main([run, "--output", out]),
}
FOLDERS = {
    "export": lambda run, pairs, out: export.main(["--checkpoint", run, "--to", "safetensors", out]),
    "hf": lambda run, pairs, out: _write_weights("hf", out),
    "mix": lambda run, pairs, out: mix.mix(run, 0.5, out),
    "open_clip": lambda run, pairs, out: _write_weights("open_clip", out),
    "save": lambda run, pairs, out: _write_weights("safetensors", out),  # `Learner.save` is this call
    "train": lambda run, pairs, out: trainer.run(tiny.short(pairs, out)),
}


def contents(folder):
    """The content of each file below a folder but the empty locks, hidden, of those who looked."""
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def refused(write, capsys, run, pairs, out):
    """Whether the writer ends in one sentence that names the output, and changes nothing."""
    before = contents(out.parent)
    try:
        code = write(str(run), pairs, str(out))
    except (SystemExit, UserError) as error:
        code = str(error)
    message = capsys.readouterr().err if code == 1 else str(code)
    return (
        (out.name in message or out.resolve().name in message)
        and "\n" not in message.strip()
        and contents(out.parent) == before
    )


@pytest.mark.parametrize("writer", FILES)
def test_a_file_of_another_program_stays(writer, run, pairs, tmp_path, capsys):
    out = tmp_path / "of theirs.parquet"
    for content in (b"", b'{"theirs": 1}\n'):
        out.write_bytes(content)
        assert refused(FILES[writer], capsys, run, pairs, out), content
    pyarrow.parquet.write_table(pyarrow.table({"id": ["theirs"]}), out)
    assert refused(FILES[writer], capsys, run, pairs, out)
    (tmp_path / "link.parquet").symlink_to(out)
    assert refused(FILES[writer], capsys, run, pairs, tmp_path / "link.parquet")
    (tmp_path / "folder.parquet").mkdir()
    assert refused(FILES[writer], capsys, run, pairs, tmp_path / "folder.parquet")


@pytest.mark.parametrize("writer", FOLDERS)
def test_a_folder_of_another_program_stays(writer, run, pairs, tmp_path, capsys):
    out = tmp_path / "of theirs"
    for name in ("results.json", "metrics.jsonl", "report.html", "config.json", "model.safetensors", "1.jpg"):
        out.mkdir(exist_ok=True)
        (out / name).write_text('{"theirs": 1}')
        assert refused(FOLDERS[writer], capsys, run, pairs, out), name
        (out / name).unlink()
    (tmp_path / "file").write_text("theirs")
    assert refused(FOLDERS[writer], capsys, run, pairs, tmp_path / "file")


def test_files_of_embed_in_the_way_stay(run, pairs, tmp_path, capsys):
    out = tmp_path / "new.parquet"
    (tmp_path / "new.parquet.bad.jsonl").write_text('{"theirs": 1}\n')
    assert refused(FILES["embed"], capsys, run, pairs, out)


def test_an_older_output_is_replaced(run, pairs, tmp_path, capsys):
    page, suspects = tmp_path / "page.html", tmp_path / "suspects.jsonl"
    for write, out in (("report", page), ("check", suspects)):
        FILES[write](str(run), pairs, str(out))
        before = out.read_bytes()
        out.write_bytes(before + b"\n")
        FILES[write](str(run), pairs, str(out))
        assert len(out.read_bytes()) != len(before) + 1
    assert all("likeliest" in json.loads(line) for line in suspects.read_text().splitlines())
