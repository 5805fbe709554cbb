import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import tiny
from xclip_jax.core.errors import EXIT_RESTART, EXIT_RESUMABLE
from xclip_jax.train.checkpoint import Checkpointer

pytestmark = pytest.mark.long

# Two seconds a batch, far more than a step: the loop waits for data nearly all the time. If the folder has a file
# "hang", a worker's read never ends, as on a network disk that is gone.
SCRIPT = """
import multiprocessing, pathlib, sys, time
from absl import flags
from tests.helpers import tiny
from xclip_jax.train import trainer
from xclip_jax.data.readers import folder

class Slow(folder.FolderSource):
    def __getitem__(self, index):
        time.sleep(0.25)
        if multiprocessing.parent_process() and (hang := pathlib.Path(sys.argv[2], "hang")).exists():
            hang.write_text("reached")
            time.sleep(1e6)
        return super().__getitem__(index)

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    folder.FolderSource = Slow
    trainer.run(tiny.config(
        "clip", run=sys.argv[1], steps=1000, data__sources=("folder:" + sys.argv[2],), data__batch=8, data__workers=1,
        checkpoint__every=1000, log__stall_limit=40.0,
    ))
"""


@pytest.fixture
def start(tmp_path):
    """Starts a run with one worker, in a process group of its own; waits for its first steps, or not."""
    (tmp_path / "script.py").write_text(SCRIPT)
    tiny.folder(tmp_path / "pairs")
    run, groups = tmp_path / "run", []

    def begin(until):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(run), str(tmp_path / "pairs")],
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        groups.append(process.pid)
        wait(lambda: until(process.pid, run) or process.poll() is not None)
        return process, run

    yield begin
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert done
    return done


def workers(pid):
    """Processes that `pid` has spawned to read."""
    children = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for path in children for child in path.read_text().split()]
    return [child for child in found if b"spawn_main" in command(child)]


def command(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()  # empty where it has ended
    except FileNotFoundError:
        return b""


def steps(run):
    return [line["step"] for line in tiny.lines(run)] if (run / "metrics.jsonl").exists() else []


def two_steps(_, run):
    return len(steps(run)) >= 2


def starting(pid, _):
    return workers(pid)


linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("number", "until"), [(signal.SIGINT, two_steps), (signal.SIGTERM, starting)])
def test_a_signal_to_the_group_saves_the_last_step(start, number, until):
    process, run = start(until)
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_RESUMABLE, said
    # Before the first step there is nothing to save.
    last, words = (steps(run)[-1], "stopped at step") if until is two_steps else (0, "SIGTERM: stopping; run the same")
    with Checkpointer(run) as checkpointer:
        assert (checkpointer.latest() or 0) == last
    assert words in said


@pytest.mark.slow  # tests.torture.faults kills runs too
@linux
def test_workers_end_with_the_run_that_is_killed(start):
    process, _ = start(two_steps)
    (worker,) = workers(process.pid)
    process.kill()
    wait(lambda: not command(worker), 20)


@linux
@pytest.mark.slow
def test_a_read_that_never_ends_in_a_worker_ends_the_run(start, tmp_path):
    hang = tmp_path / "pairs" / "hang"
    hang.touch()
    process, run = start(lambda *_: hang.read_text())
    (worker,) = workers(process.pid)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_RESTART, said
    assert f"error: no progress: waiting for data from folder:{tmp_path / 'pairs'}" in said
    assert (run / "stacks-0.txt").exists()
    wait(lambda: not command(worker), 20)
