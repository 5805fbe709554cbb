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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_reader_reads_or_refuses_what_is_hostile(tmp_path):
    inputs = 40 * len(fuzz_readers.READERS)
    command = [sys.executable, "-m", "tests.torture.fuzz", f"--inputs={inputs}", "--seed=1", f"--failures={tmp_path}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, env=env)
    assert done.stdout.splitlines()[-1:] == [f"{inputs} inputs, 0 failures"], done.stdout + done.stderr
    rows = re.findall(r"^\| (\w+) \| 40 \| (\d+) \| (\d+) \| 0 \|", done.stdout, re.MULTILINE)
    assert {name for name, *_ in rows} == fuzz_readers.READERS.keys()
    # Inputs are neither all sound nor all refused at once: the code behind the first check is reached.
    assert all(int(refused) for name, _, refused in rows if not name.startswith("tokenizer_"))
    assert sum(int(read) > 0 for _, read, _ in rows) > len(rows) // 2
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_inputs_that_failed_before(case, tmp_path, monkeypatch):
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    kind, message = fuzz.outcome(case.parent.name, case.read_bytes(), tmp_path)
    assert kind in (fuzz.READ, fuzz.REFUSED), message
