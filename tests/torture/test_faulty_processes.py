"""Two processes of one run, of which one fails, is killed, stopped or started with something else: both end, by name.

Each case takes half a minute; the first is in the normal suite, the others are marked:
bash launch/test.sh -m slow tests/torture/test_faulty_processes.py
"""

import os
import subprocess
import sys
import time

import pytest

from tests.helpers import tiny
from tests.helpers.util import free_address
from tests.processes.test_runtime import ROOT
from xclip_jax.core.errors import EXIT_RESTART, EXIT_RESUMABLE
from xclip_jax.core.run_folder import RunReader

pytestmark = pytest.mark.long

GONE = 134, 250  # 256 - SIGABRT: JAX aborts who loses process 0
slow = pytest.mark.slow


def both(tmp_path, fault, step, process, *changes, of_second=()):
    """Statuses and outputs of both processes, and the seconds between their ends."""
    pairs, at, running = tiny.folder(tmp_path / "pairs"), free_address(), []
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    for i in range(2):
        settings = [*changes, *(of_second if i else ())]
        command = [str(tmp_path / "run"), str(pairs), fault, str(step), str(process), *settings, "--", at, "2", str(i)]
        with open(tmp_path / f"{i}.log", "w") as log:
            arguments = [sys.executable, "-m", "tests.helpers.faulty_run", *command]
            running.append(subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=log, stderr=log))
    deadline, first = time.monotonic() + 400, None
    while any(each.poll() is None for each in running) and time.monotonic() < deadline:
        time.sleep(0.1)
        if first is None and any(each.poll() is not None for each in running):
            first = time.monotonic()
    seconds = time.monotonic() - first if first is not None else None
    for each in running:
        each.kill()
    outputs = [(tmp_path / f"{i}.log").read_text() for i in range(2)]
    assert seconds is not None and seconds < 30, outputs
    return [each.wait() % 256 for each in running], outputs


def test_an_error_in_one_process_ends_both(tmp_path):
    statuses, outputs = both(tmp_path, "raise", 3, 1)
    assert statuses == [1, 1], outputs
    assert "error: process 1 of 2: ValueError('disk on fire')" in outputs[1]
    assert "error: process 1 of 2 has ended: ValueError('disk on fire'). Process 0 ends too; start all" in outputs[0]


@slow
def test_the_end_of_a_killed_process_ends_the_other(tmp_path):
    statuses, outputs = both(tmp_path, "kill", 3, 1)
    assert statuses[0] in (*GONE, EXIT_RESTART) and statuses[1] == 256 - 9, outputs


@slow
def test_the_end_of_process_0_ends_the_other(tmp_path):
    statuses, outputs = both(tmp_path, "kill", 3, 0)
    assert statuses[0] == 256 - 9 and statuses[1] in (*GONE, EXIT_RESTART), outputs


@slow
@pytest.mark.parametrize(("fault", "process"), [("sigint", 0), ("sigterm", 1)])
def test_a_signal_to_one_process_saves_in_both(tmp_path, fault, process):
    statuses, outputs = both(tmp_path, fault, 3, process)
    assert statuses == [EXIT_RESUMABLE] * 2, outputs
    assert f"stopped at step {RunReader(tmp_path / 'run').latest_step()} of 10000" in outputs[0]


@slow
def test_a_process_that_hangs_ends_both_and_is_named(tmp_path):
    statuses, outputs = both(tmp_path, "hang in data", 4, 1, "log__stall_limit=30.0")
    assert statuses == [EXIT_RESTART] * 2, outputs
    assert "no progress: waiting for data from folder:" in outputs[1]
    assert "process 1: waiting for data from folder:" in outputs[0]
    assert list((tmp_path / "run").glob("stacks-*.txt"))


@slow
def test_processes_with_different_configs_refuse_to_start(tmp_path):
    statuses, outputs = both(tmp_path, "none", 0, 0, "steps=2", of_second=["optim__lr=0.005"])
    assert statuses == [1, 1], outputs
    assert all("process 1 differs from process 0: optim.lr (0.005, not 0.001)" in output for output in outputs)
    assert not (tmp_path / "run").exists()
