import shlex

import pytest

from tests.helpers.launching import ROOT, RUN, TRAINING, executable, launch, read, untouched

SHARED = [word.replace(RUN, "/shared/runs/mine") for word in TRAINING]


def test_slurm_refuses_a_run_in_a_bucket(tmp_path):
    with untouched(tmp_path) as path:
        done = launch("slurm.sh", *TRAINING, path=[path])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --config.run={RUN} is no path")


def start(folder, training, *args, **env):
    """One start of a job under a Slurm that is made of shell scripts; they note how they were called."""
    log = 'echo "{0} $(printf "%q " "$@")" >>"$RUN/calls"\n'
    run_task = 'while [[ $1 == --* ]]; do shift; done\n"$@"\n'
    for name, body in {"srun": log + run_task, "scontrol": log, "python": training}.items():
        executable(folder / name, body.replace("{0}", name))
    env = {"RUN": str(folder), "SLURM_JOB_ID": "42", "SLURM_SUBMIT_DIR": str(ROOT)} | env
    return launch("slurm.sh", *args, env=env, path=[folder])


ENDS = {  # commands of training, the status of the job, and whether it is requeued
    "stopped": ("exit 75", 0, True),
    "interrupted by a signal": ('kill -INT "$$"; sleep 5', 0, True),
    "hung": ("exit 79", 0, True),
    "no results": ("exit 0", 0, True),
    "all stopped": ('trap "sleep 0.2; exit 75" TERM; kill -TERM "$PPID" "$$"; sleep 5 & wait', 0, True),
    "complete when stopped": (
        'trap "touch \\"$RUN/results.json\\"" TERM; kill -TERM "$PPID" "$$"; exit 0', 0, False
    ),
    "complete": ('touch "$RUN/results.json"', 0, False),
    "failed": ("exit 3", 3, False),
    "failed when stopped": ('trap "exit 3" TERM; kill -TERM "$PPID" "$$"', 3, False),
    "killed": ('kill -KILL "$$"', 137, False),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_slurm_requeues_what_was_stopped(end, tmp_path):
    """Slurm sends its signal to all processes of a task: to the shell, here $PPID, and to training."""
    training, status, requeued = ENDS[end]
    args = [*SHARED[:2], f"--config.run={tmp_path}", SHARED[-1]]
    done = start(tmp_path, training, *args, SLURM_CPUS_PER_TASK="6")
    assert done.returncode == status, done.stderr
    srun, *rest = [shlex.split(line) for line in read(tmp_path / "calls").splitlines()]
    assert "--cpus-per-task=6" in srun
    assert srun[-len(args) - 4 :] == ["python", "-m", "xclip_jax.main", "--distributed", *args]
    assert rest == ([["scontrol", "requeue", "42"]] if requeued else [])


def test_slurm_gives_up_on_a_run_that_hangs_at_the_same_place(tmp_path):
    run = tmp_path / "run"

    def statuses(training, count, **env):
        starts = [start(tmp_path, training, f"--config.run={run}/", FAILURES="3", **env) for _ in range(count)]
        assert all(("giving up" in done.stderr) == (done.returncode == 1) for done in starts)
        return [done.returncode for done in starts]

    assert statuses("exit 79", 2) == [0, 0]
    # The steps between two checkpoints are trained again in each start: lines of metrics are not progress.
    saves = f'for step in 90 100; do mkdir -p "{run}/checkpoints/$step"; done; echo "{{}}" >>"{run}/metrics.jsonl"; '
    assert statuses(f"{saves} exit 75", 1) == [0]
    assert statuses(f"{saves} mkdir -p {run}/checkpoints/110.orbax-checkpoint-tmp; exit 79", 3) == [0, 0, 1]
    assert read(tmp_path / "calls").count("scontrol requeue 42") == 5
    assert statuses("exit 0", 3, SLURM_JOB_ID="43") == [0, 0, 1]  # submitted again
