"""A signal at any second of a run's start; `python -m tests.torture.signals` prints the same as a table.

bash launch/test.sh -m slow tests/torture/test_signals.py
"""

import signal

import pytest

from tests.torture import signals
from tests.torture.signals import End

pytestmark = pytest.mark.long


@pytest.mark.slow
def test_a_signal_at_any_second_of_the_start_ends_a_run_as_documented(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # those of tests compile in one thread
    ends = signals.table(tmp_path)
    assert len(ends) == 60 and all(end.right for end in ends), [end.row() for end in ends if not end.right]


@pytest.mark.parametrize(
    ("number", "phase", "status", "saved", "right"),
    [
        (signal.SIGINT, "imports", 130, None, True),
        (signal.SIGTERM, "imports", 143, None, True),
        (signal.SIGTERM, "imports", 130, None, False),
        (signal.SIGINT, "compilation", 75, None, True),
        (signal.SIGINT, "compilation", 139, None, False),
        (signal.SIGINT, "compilation", 1, None, False),
        (signal.SIGTERM, "training", 75, 12, True),
        (signal.SIGTERM, "training", 75, None, False),
        (signal.SIGTERM, "training", 143, 12, False),
        (signal.SIGTERM, "training", None, 12, False),
    ],
)
def test_an_end_that_is_not_as_documented_is_seen(number, phase, status, saved, right):
    end = End(3, number, phase, status, saved, 0.2)
    assert end.right == right and end.row().endswith("WRONG") != right


@pytest.mark.parametrize(
    ("output", "phase"),
    [
        ("", "imports"),
        ("small: 200 pairs\n", "preparation"),
        ("small: 200 pairs\nclip: 8 parameters, 2 pairs\n", "compilation"),
        ("small: 200 pairs\nclip: 8 parameters, 2 pairs\nstep 1/9\n", "training"),
    ],
)
def test_the_phase_is_read_from_the_output(output, phase):
    assert signals._phase(output) == phase
