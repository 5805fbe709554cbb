"""A run that is killed three times ends as one that nobody disturbed; `python -m benchmarks.soak` does it 70 times.

bash launch/test.sh -m slow tests/test_soak.py
"""

import subprocess
import sys

import numpy as np
import pytest

from benchmarks.soak import End, largest_difference


@pytest.mark.slow
def test_three_kills():
    command = [sys.executable, "-m", "benchmarks.soak", "--kills", "3", "--terms", "0", "--moves", "0", "--seed", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.stdout.splitlines()[-1] == "3 of 3 bit-identical", result.stdout + result.stderr
    assert result.returncode == 0 and result.stdout.count("SIGKILL in") == 3


def test_a_difference_is_seen():
    a = End("", {"x": np.array([1.0, -4.0]), "n": np.array(3)})
    assert largest_difference(a, a) == 0
    assert largest_difference(a, End("", a.arrays | {"x": np.array([1.0, -4.4])})) == pytest.approx(0.1)
    assert largest_difference(a, End("", {"x": a.arrays["x"]})) == np.inf
