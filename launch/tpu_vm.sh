#!/usr/bin/env bash
# Trains on one Cloud TPU VM: creates it unless it exists, installs this commit, starts training there, waits until it
# trains, two minutes at most, and returns. Training goes on without this machine. The VM costs money until it is
# deleted, also after the run. Once training has ended, the same command installs the commit of the day and resumes the run.
#
#   PROJECT=my-project ZONE=us-west4-a bash launch/tpu_vm.sh --config configs/pretrain.py:preset=B/32,batch=1024 \
#       --config.run=gs://my-bucket/runs/mine --config.data.sources='("tar:gs://my-bucket/pairs/{00000..00999}.tar",)'
#   PROJECT=my-project ZONE=us-west4-a bash launch/tpu_vm.sh --dry-run --config configs/pretrain.py
#
# The arguments are those of xclip_jax.main; --dry-run before them prints all commands and executes none.
#
# PROJECT, ZONE  required
# NAME           of the VM (default: xclip-jax)
# TYPE           accelerator type (default: v5litepod-8, eight chips v5e on one host); of v4, v5e, v5p or v6e
# TOPOLOGY       shape in chips, as in TYPE=v4 TOPOLOGY=2x2x1 (default: that of TYPE)
# RUNTIME        runtime version (default: the one for JAX on TYPE)
# SPOT           1 for a spot VM: cheaper, and gone at any time (default: empty)
# CREATE_FLAGS   more flags for `gcloud compute tpus tpu-vm create`, split at spaces, as in
#                "--service-account=me@my-project.iam.gserviceaccount.com --data-disk=source=...,mode=read-only"
# EXTRAS         of xclip_jax that the workers install (default: tpu), as in tpu,wandb
# SETUP          command that each worker executes before each start of training, as in
#                "mountpoint -q /data || sudo mount -o ro,X-mount.mkdir /dev/sdb /data"
# ENV_FILE       file of keys for training on the workers, of mode 600, a line each as in WANDB_API_KEY=... or HF_TOKEN=...;
#                it is copied to their home folders (default: none; WANDB_MODE=online in it says that they have a login)
# LIBTPU_INIT_ARGS  flags of the TPU compiler (default: none; training sets those of docs/pods.md itself)
# PYTHON         interpreter with xclip_jax on this machine, which checks the config before anything is created (default:
#                python3; without one the config is checked on the workers)
# POLL           seconds between two attempts to reach a new VM, and between two looks at training (default: 15)
#
# What is compiled is kept on the VM, in ~/.cache/xclip_jax/compiled, and is gone with it.
# Needs the Google Cloud CLI. The service account of the VM needs the roles storage.objectUser and storage.legacyBucketReader
# on the bucket. A run on the VM's own disk is deleted with it; use gs://.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
show_help "$@"
DRY_RUN=
[ "${1:-}" != --dry-run ] || { DRY_RUN=1 && shift; }
NAME=${NAME:-xclip-jax} TYPE=${TYPE:-v5litepod-8}
tpu_flags
[ $# -gt 0 ] || fail "nothing to train; add arguments, as in --config configs/pretrain.py --config.run=gs://my-bucket/run"
[ -n "$DRY_RUN" ] || command -v gcloud >/dev/null || fail "gcloud is missing; install the Google Cloud CLI"

delete() {
  run gcloud compute tpus tpu-vm delete "$NAME" "${WHERE[@]}"
}

tpu_check "$(run_folder "" "$@" 2>/dev/null || true)" "$@"
tpu_pack
if [ -n "$DRY_RUN" ]; then
  tpu_describe tpu-vm state
  state=ABSENT
else
  state=$(tpu_state tpu-vm state)
fi
case $state in
  ABSENT) run gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" "${SHAPE[@]}" "--version=$RUNTIME" ;;
  READY) echo "$NAME exists" ;;
  *) fail "$NAME is $state; wait, or delete it with: $(DRY_RUN=1 delete)" ;;
esac
# Whatever fails from here on leaves the VM as it is.
[ -n "$DRY_RUN" ] ||
  trap '[ $? = 0 ] || echo "$NAME exists and costs money; to delete it: $(DRY_RUN=1 delete)" >&2' EXIT

# A VM is READY some time before it takes connections.
for ((try = 1; ; try++)); do
  tpu_ssh all true && break
  [ "$try" -lt 10 ] || fail "$NAME takes no connections; the messages of ssh are above"
  sleep "${POLL:-15}"
done

tpu_install
tpu_start "$@"

[ -z "$DRY_RUN" ] || exit 0

look="cd xclip_jax && if [ -f train.exit ]; then echo \"ended \$(cat train.exit)\"; \
elif $THIS_LOG | grep -q ' parameters, '; then echo trains; fi"
for ((try = 1; try <= 8; try++)); do
  training=$(tpu_ssh 0 "$look" 2>/dev/null | tail -n 1) || training=
  [ -z "$training" ] || break
  sleep "${POLL:-15}"
done
echo
tpu_ssh 0 "cd xclip_jax && $THIS_LOG | tail -n 20" || true
case $training in
  trains) said="Training runs on $NAME." ;;
  "ended 0") said="Training has ended on $NAME, see above." ;;
  "") said="Training has started on $NAME and has not come to its first step yet." ;;
  *)
    echo "error: training has failed with exit status ${training#ended }, see above" >&2
    exit 1
    ;;
esac
DRY_RUN=1  # print, from here on
echo
echo "$said $NAME costs money until it is deleted, also after the run."
echo "To follow training, to save and stop it, and to delete the VM:"
tpu_ssh 0 "tail -n 100 -F xclip_jax/train.log"
tpu_ssh all "kill -TERM \$(cat xclip_jax/train.pid)"
delete
