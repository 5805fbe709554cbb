"""A run that is killed three times ends as one that nobody disturbed; `python -m tests.torture.soak` does it 70 times.

bash launch/test.sh -m slow tests/torture/test_soak.py
"""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.long
def test_three_kills():
    command = [sys.executable, "-m", "tests.torture.soak", "--kills=3", "--terms=0", "--seed=3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.stdout.splitlines()[-1] == "3 of 3 bit-identical", result.stdout + result.stderr
    assert result.returncode == 0 and result.stdout.count("SIGKILL in") == 3
