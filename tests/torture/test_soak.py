"""A run that is killed three times ends as one that nobody disturbed; `python -m tests.torture.soak` does it 70 times.

bash launch/test.sh -m slow tests/torture/test_soak.py
"""

import itertools
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.torture import soak
from tests.torture.soak import End, largest_difference

pytestmark = pytest.mark.long


@pytest.mark.slow
def test_three_kills():
    command = [
        sys.executable,
        "-m",
        "tests.torture.soak",
        "--kills",
        "3",
        "--terms",
        "0",
        "--moves",
        "0",
        "--seed",
        "3",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.stdout.splitlines()[-1] == "3 of 3 bit-identical", result.stdout + result.stderr
    assert result.returncode == 0 and result.stdout.count("SIGKILL in") == 3


def test_a_difference_is_seen():
    a = End("", b"", {"x": np.array([1.0, -4.0]), "n": np.array(3)})
    assert largest_difference(a, a) == 0
    assert largest_difference(a, End("", b"", a.arrays | {"x": np.array([1.0, -4.4])})) == pytest.approx(0.1)
    assert largest_difference(a, End("", b"", {"x": a.arrays["x"]})) == np.inf
    assert largest_difference(a, End("", b"another", a.arrays)) == np.inf


def test_biases_of_keys_may_differ_those_of_queries_and_values_not():
    """Softmax does not depend on them: their gradient is rounding, which AdamW divides by its own size."""
    name = "['params']['txt']['transformer']['block_0']['attention']['qkv']['bias']"

    def end(*biases):
        return End("", b"", {name: np.array(biases)[:, None, None]})

    assert largest_difference(end(1.0, 2.0, 3.0), end(1.0, 2.5, 3.0)) == 0
    assert largest_difference(end(1.0, 2.0, 3.0), end(1.3, 2.0, 3.0)) == pytest.approx(0.1)
    assert largest_difference(end(1.0, 2.0, 3.0), end(1.0, 2.0, 3.3)) == pytest.approx(0.1)


@pytest.mark.slow
def test_a_run_on_changing_devices_computes_the_same():
    command = [sys.executable, "-m", "tests.torture.soak", "--kills", "0", "--terms", "0", "--moves", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0 and result.stdout.count("differs by") == 2, result.stdout + result.stderr


def test_a_run_that_ends_before_its_kill_is_not_started_again(tmp_path, monkeypatch):
    ended, killed = [], []

    def start(run, devices):
        ended.append(run)
        return SimpleNamespace(communicate=lambda: None, returncode=0)

    def kill(run, *_):
        assert run not in ended, "a complete run cannot be killed"
        killed.append(run)
        return f"kill {len(killed)}" if len(killed) > 1 else None  # the first came too late

    soaking = soak.Soak(tmp_path, 0)
    monkeypatch.setattr(soaking, "start", start)
    monkeypatch.setattr(soaking, "_kill", kill)
    monkeypatch.setattr(soak, "end_of", lambda run: run)
    kills = list(soaking.kills("kill", signal.SIGKILL, 7))
    assert [text for text, _ in kills] == [f"kill {i}" for i in range(2, 9)]
    assert len(set(ended)) == len(ended) == 3 and [end for _, end in kills] == [ended[1]] * 5 + [ended[2]] * 2


def test_a_run_that_moves_ends_on_other_devices_than_the_undisturbed_one(tmp_path, monkeypatch):
    """What a killed start computes after its last checkpoint is lost."""
    started = []

    def start(run, devices):
        started.append(devices)
        return SimpleNamespace(communicate=lambda: None, returncode=0)

    soaking = soak.Soak(tmp_path, 0)
    monkeypatch.setattr(soaking, "start", start)
    monkeypatch.setattr(soaking, "_kill", lambda run, devices, *_: started.append(devices) or "killed")
    monkeypatch.setattr(soak, "end_of", lambda run: run)
    assert len(list(soaking.kills("move", signal.SIGKILL, 100, moves=True))) == 100
    ends = started[5::6]
    assert set(ends) == {2, 4} and all(a != b for a, b in itertools.pairwise(started[:6]))


def test_a_folder_with_older_runs_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "kill-0").mkdir()
    monkeypatch.setattr(soak, "Soak", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["soak", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        soak.main()
    assert f"--folder {tmp_path} is not empty" in capsys.readouterr().err


def test_a_run_that_said_nothing(tmp_path):
    (tmp_path / "kill-0.log").touch()
    assert soak._last_line(tmp_path / "kill-0").startswith("nothing said (see ")
