import collections
import json
import re

from PIL import Image

from tests import tiny, torture
from xclip_jax.data import check


def run(capsys, *arguments):
    code = check.main([*map(str, arguments), "--tokenizer", "bytes", "--size", "32"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_tars(tmp_path, capsys):
    torture.pairs(tmp_path / "0.tar", 0, 20)
    torture.pairs(tmp_path / "1.tar", 15, 20, w=60, h=50)
    code, out, _ = run(capsys, tmp_path / "*.tar", "--sheet", tmp_path / "sheet.png", "--length", 12)
    assert code == 0
    lines = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert lines["samples"].startswith("40 in 2 tars, 0.00 GB, index ")
    assert lines["width, 5/50/95 %"] == "40 / 50 / 60"
    assert lines["same image among those read"] == "0"
    assert lines["same caption among those read"] == "5"
    assert lines["keys that come more than once"].startswith("5, as '000000015', ")
    assert lines["tokens, 5/50/95 %"] == "11 / 12 / 12, 75.0% of the captions fill all 12"
    assert "images/s to 32 px" in out
    assert lines["bad"] == "0.00%, allowed 5.00%: training would run"
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.width == 1200
        assert page.convert("L").getextrema()[0] < 50


def test_torture_set_would_stop_a_run(tmp_path, capsys):
    _, bad = torture.make(tmp_path)
    code, out, _ = run(capsys, f"{tmp_path}/*.tar", "--sheet", "")
    assert code == 1
    assert "training would stop" in out
    counted = collections.Counter()
    for reason, number in re.findall(r"^bad, ([a-z ]+): (\d+) ", out, re.M):
        counted[reason] += int(number)
    assert counted == collections.Counter(bad.values())
    shown = [json.loads(line) for line in out.splitlines() if line.startswith("    {")]
    assert {(e["tar"].rpartition("/")[2], e["key"]) for e in shown} <= bad.keys()
    assert {e["reason"] for e in shown} == set(bad.values())
    code, _, _ = run(capsys, f"{tmp_path}/*.tar", "--sheet", "", "--max_bad", "0.9")
    assert code == 0


def test_folder_and_errors(tmp_path, capsys):
    tiny.folder(tmp_path / "pairs", n=10)
    code, out, _ = run(capsys, f"folder:{tmp_path / 'pairs'}", "--sheet", tmp_path / "x.png", "--samples", 4)
    assert code == 0
    assert "read: 4 at random" in out
    code, _, err = run(capsys, "/nowhere/*.tar")
    assert code == 1
    assert err == "error: no file matches '/nowhere/*.tar'; check the path, or list the folder.\n"
