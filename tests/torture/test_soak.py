"""A run that is killed three times ends as one that nobody disturbed; `python -m tests.torture.soak` does it 70 times.

bash launch/test.sh -m slow tests/torture/test_soak.py
"""

import subprocess
import sys

import numpy as np
import pytest

from tests.torture.soak import End, largest_difference

pytestmark = pytest.mark.long


def soak(**flags):
    command = [sys.executable, "-m", "tests.torture.soak", *(f"--{name}={value}" for name, value in flags.items())]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_three_kills():
    result = soak(kills=3, terms=0, moves=0, seed=3)
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
    result = soak(kills=0, terms=0, moves=2)
    assert result.returncode == 0 and result.stdout.count("differs by") == 2, result.stdout + result.stderr
