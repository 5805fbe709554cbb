"""Files of JSON lines: damage, kills, and buckets, whose objects cannot grow."""

import json
import subprocess
import sys

import pytest
from etils import epath

from tests.helpers.bucket import Bucket, register
from xclip_jax.core import json_lines


def test_json_lines_drop_what_is_damaged(tmp_path):
    path = epath.Path(tmp_path) / "x.jsonl"
    good = [{"step": 1, "loss": 2.5}, {"step": 2, "text": "ü\u2028"}]
    typed = b'{"step": "3"}', b'{"step": null}', b'{"step": [1]}', b"{}"
    damaged = [b'{"step": 3, "t": "\xff\xfe"}', b"5", b"[1]", b"null", b'{"step": 4', b"[" * 100_000, *typed, b""]
    lines = [json.dumps(good[0]).encode(), *damaged[:4], json.dumps(good[1], ensure_ascii=False).encode(), *damaged[4:]]
    path.write_bytes(b"\n".join(lines))
    kept = json_lines.JsonLines(path, lambda content: content["step"] < 5)
    assert kept.kept == good
    kept.append({"step": 5, "loss": float("nan")})
    assert [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().split("\n")[:-1]] == [
        *good,
        {"step": 5, "loss": None},
    ]
    before = path.read_bytes()
    json_lines.JsonLines(path, lambda _: True)
    assert path.read_bytes() == before


KILLED = """
import os, resource, signal, sys
from etils import epath
from xclip_jax import data
from xclip_jax.core import json_lines
moment = sys.argv[2]
if moment.isdigit():  # a kill in the middle of a write: after so many bytes
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment), int(moment)))
sys.addaudithook(lambda event, _: os._exit(9) if event == moment else None)
json_lines.JsonLines(epath.Path(sys.argv[1]), lambda content: content["step"] <= 50)
"""


@pytest.mark.parametrize("moment", ["100", "os.rename", "none"])
def test_json_lines_survive_a_kill_while_they_are_rewritten(moment, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(100)))
    code = subprocess.run([sys.executable, "-c", KILLED, str(path), moment]).returncode
    assert (code == 0) is (moment == "none")
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(51 if moment == "none" else 100))
    assert json_lines.JsonLines(epath.Path(path), lambda content: content["step"] <= 50).kept[-1] == {"step": 50}


def test_lines_in_a_bucket_are_written_rarely_and_an_outage_loses_none(monkeypatch, capsys):
    register()
    monkeypatch.setattr(Bucket, "writes", 0)
    clock = [1000.0]
    monkeypatch.setattr(json_lines.time, "monotonic", lambda: clock[0])
    path = epath.Path("s3://bucket/json_lines/x.jsonl")
    lines = json_lines.JsonLines(path, lambda line: True)

    def after(seconds):
        clock[0] += seconds
        lines.append({"second": clock[0]})
        return len(json_lines.read(path))

    assert [after(0), after(1), after(118), after(2)] == [1, 1, 1, 4]
    monkeypatch.setattr(Bucket, "away", True)
    assert after(121) == 4 and "WARNING: [Errno 5] away" in capsys.readouterr().out
    with pytest.raises(OSError, match="away"):
        lines.close()
    monkeypatch.setattr(Bucket, "away", False)
    assert [after(119), after(2)] == [4, 7]
    written = Bucket.writes
    lines.close()
    assert Bucket.writes == written == 3  # nothing has changed since
    path.unlink()
