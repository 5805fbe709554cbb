#!/usr/bin/env bash
#SBATCH --job-name=xclip_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
#
# Trains on GPUs under Slurm, for as many jobs as it takes: where time runs out or the job is preempted, training saves,
# and the job goes back to the queue and resumes. Submit it from the root of the checkout:
#
#   sbatch --nodes=4 launch/slurm.sh --config configs/pretrain.py --config.run=/shared/runs/mine \
#       --config.data.sources='("folder:/shared/pairs",)'
#   bash launch/slurm.sh --dry-run --config configs/pretrain.py --config.run=/shared/runs/mine
#
# The arguments are those of xclip_jax.main; --dry-run before them prints the directives above and the commands, and
# executes none. Flags of sbatch before the script's name go over its directives.
#
# PYTHON  interpreter with xclip_jax and JAX for GPUs (default: python). An environment on a file system that all nodes
#         share: python3 -m venv .venv-gpu && .venv-gpu/bin/pip install --editable . "jax[cuda13]", or "jax[cuda12]" for
#         drivers before 580. Then PYTHON=.venv-gpu/bin/python sbatch ...
# FAILURES  gives up, with status 1, after this many starts of a job that were stopped or hung and left no newer checkpoint
#         than before (default: 5); `.slurm_retries` in the run's folder has a line for each, of the job and that checkpoint
#
# What is compiled is kept in ~/.cache/xclip_jax/compiled; a job that resumes on a node that sees it need not compile again.
#
# One task for each GPU, as JAX expects under Slurm: change --gpus-per-node and --ntasks-per-node together. --config.run
# has to be on a shared file system.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
if [ ! -f launch/common.sh ]; then
  echo "error: $PWD is not the root of the checkout; go there and submit again with sbatch launch/slurm.sh" >&2
  exit 2
fi
. launch/common.sh
show_help "$@"
DRY_RUN=
[ "${1:-}" != --dry-run ] || { DRY_RUN=1 && shift; }
FAILURES=${FAILURES:-5}
[[ $FAILURES =~ ^[1-9][0-9]*$ ]] || fail "FAILURES=$FAILURES is not a number of failures; set it as in FAILURES=5"
folder=$(run_folder /shared/runs/mine "$@")
# Whether it is complete could not be seen below, so that the job would be requeued for ever.
[[ $folder != *://* ]] || fail "--config.run=$folder is no path; give a folder on a file system that all nodes share"
refuse_flags "$@"

# JAX gives task i of a node the i-th GPU that it sees, so each task has to see all of them. srun does not inherit
# --cpus-per-task from sbatch.
task=(srun --kill-on-bad-exit=1 --gpu-bind=none ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})
# A task that was asked to stop exits with 75 (saved), or 143 or 130 (before it could save), one that hung or lost another
# with 79. None is a bad exit, for which srun would kill the other tasks, so it becomes 0, and .slurm_stopped is left: the
# others end by themselves. Slurm signals the shell too, which goes on to wait.
# shellcheck disable=SC2016
task+=(bash -c 'trap : TERM INT; "$@"; status=$?; case $status in 75 | 79 | 130 | 143) touch "$0"; exit 0 ;; esac; exit "$status"' "$folder/.slurm_stopped")
task+=("${PYTHON:-python}" -m xclip_jax.main --distributed "$@")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")

if [ -n "$DRY_RUN" ]; then
  grep '^#SBATCH' launch/slurm.sh
  run "${task[@]}"
  echo "# and where training was stopped before its end:"
  run "${requeue[@]}"
  exit 0
fi

newest_checkpoint() {
  find "$folder/checkpoints/" -maxdepth 1 2>/dev/null | newest_step || true
}

before=$(newest_checkpoint)
mkdir -p "$folder"
rm -f "$folder/.slurm_stopped"
"${task[@]}"
# SIGTERM goes to the tasks and not to this script, be it for the time limit (--signal) or for a preemption with grace.
# The tasks then end with 0, as they do when the run is complete; results.json tells, unless it is an earlier start's.
# (scancel ends this script too; a job that loses its node, or is preempted without grace, is requeued by Slurm itself.)
[ -e "$folder/.slurm_stopped" ] || [ ! -e "$folder/results.json" ] || exit 0

if [ "$(newest_checkpoint)" -le "$before" ]; then
  # A run that always hangs at the same place must not hold the GPUs for ever.
  line="${SLURM_JOB_ID:-} $before"
  echo "$line" >>"$folder/.slurm_retries"
  starts=$(grep -cxF "$line" "$folder/.slurm_retries")
  if [ "$starts" -ge "$FAILURES" ]; then
    echo "error: $starts starts of this job left no newer checkpoint than step $before; giving up" >&2
    exit 1
  fi
fi
echo "training was stopped or hung before its end; back to the queue"
"${requeue[@]}"
