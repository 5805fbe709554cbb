"""Hostile inputs: a sample of those of `python -m tests.torture.fuzz`, and each one that ever failed."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.torture import fuzz, fuzz_readers

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).parents[2]
CASES = sorted(path for path in (ROOT / "tests" / "fuzz_cases").rglob("*") if path.is_file())


def run(*arguments):
    command = [sys.executable, "-m", "tests.torture.fuzz", *arguments]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, env=env)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_reader_reads_or_refuses_what_is_hostile(tmp_path):
    done = run("--inputs", "900", "--seed", "1", "--failures", str(tmp_path))
    assert done.stdout.splitlines()[-1:] == ["900 inputs, 0 failures"], done.stdout + done.stderr
    rows = re.findall(r"^\| (\w+) \| 50 \| ([\d,]+) \| ([\d,]+) \| 0 \| 0 \|", done.stdout, re.MULTILINE)
    assert {name for name, *_ in rows} == fuzz_readers.READERS.keys()
    # Inputs are neither all sound nor all refused at once: the code behind the first check is reached.
    assert all(int(refused) for name, _, refused in rows if not name.startswith("tokenizer_"))
    assert sum(int(read) > 0 for _, read, _ in rows) > len(rows) // 2
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_inputs_that_failed_before(case, tmp_path, monkeypatch):
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "input").mkdir()
    kind, message = fuzz.outcome(case.parent.name, case.read_bytes(), tmp_path / "input")
    assert kind in (fuzz.READ, fuzz.REFUSED), message


def test_cases_are_small_and_of_readers():
    assert CASES and all(path.parent.name in fuzz_readers.READERS for path in CASES)
    assert all(path.stat().st_size < 1 << 16 for path in CASES)


def break_down(data, folder):
    """A reader with every fault that the command reports."""
    match data[0] % 6:
        case 0:
            raise KeyError("x")
        case 1:
            os.abort()
        case 2:
            while True:
                pass
        case 3:
            bytearray(3 << 30)
        case 4:
            raise fuzz.UserError("")
        case _:
            raise fuzz.UserError("one sentence.")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_kind_of_failure_is_counted(tmp_path):
    script = (
        "import sys; from tests.torture import fuzz; from tests.torture import test_fuzz\n"
        "fuzz.CPU_SECONDS, fuzz.fuzz_readers.prepare = 1, lambda: None\n"
        "fuzz.make = lambda name, seed, number: bytes([number])\n"
        "fuzz.READERS.clear()\n"
        "fuzz.READERS['broken'] = fuzz.fuzz_readers.Reader(list, test_fuzz.break_down)\n"
        f"sys.exit(fuzz.main(['--inputs', '12', '--failures', {str(tmp_path)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 1 and done.stdout.endswith("12 inputs, 10 failures\n"), done.stdout + done.stderr
    assert "| broken | 12 | 0 | 2 | KeyError 2, MemoryError 2, empty message 2 | 4 |" in done.stdout
    assert re.search(r"broken/0-1: crash by signal 6\n.*broken/0-2: hang\n", done.stdout)
    assert (tmp_path / "broken" / "0-7").read_bytes() == b"\x07"
