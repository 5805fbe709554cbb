#!/usr/bin/env bash
# Trains on a Cloud TPU pod, or on several slices, to the end: queues for it, installs this commit on all hosts, starts training, and watches.
# Where the pod is preempted or training fails, the pod is deleted, created again, and training resumes from its last
# checkpoint. When the run is complete the pod is deleted and the script exits with 0.
#
#   SPOT=1 TYPE=v5litepod-64 PROJECT=my-project ZONE=us-west4-a bash launch/tpu_pod.sh --config configs/pretrain.py \
#       --config.run=gs://my-bucket/runs/mine --config.data.sources='("tar:gs://my-bucket/pairs/{00000..00999}.tar",)'
#   PROJECT=my-project ZONE=us-west4-a bash launch/tpu_pod.sh --dry-run --config configs/pretrain.py --config.run=gs://...
#
# The arguments are those of xclip_jax.main; --dry-run before them prints all commands and executes none.
# Training does not need this machine: Ctrl-C leaves it alone, and the same command takes up the watch again, or where
# training has ended starts it once more, which a complete run answers at once. While nothing watches, a pod that is
# preempted stays down, and one whose run is complete costs money: for a long run watch from a small VM, with a service
# account, whose login does not expire.
#
# PROJECT, ZONE  required
# NAME           of the queued resource and of its node (default: xclip-jax)
# TYPE           accelerator type (default: v5litepod-64, 64 chips v5e); of v4, v5e, v5p or v6e; for TPU7x see
#                gke_jobset.yaml
# TOPOLOGY       shape in chips, as in TYPE=v4 TOPOLOGY=4x4x4 (default: that of TYPE)
# SLICES         how many of TYPE, joined by the data centre's network (default: 1); see docs/pods.md, "Several slices"
# RUNTIME        runtime version (default: the one for JAX on TYPE)
# SPOT           1 for spot capacity: cheaper, and preempted at any time (default: empty)
# CREATE_FLAGS   more flags for `gcloud compute tpus queued-resources create`, split at spaces, as in
#                "--service-account=me@my-project.iam.gserviceaccount.com"; a pod that waits longer than a
#                --valid-until-duration has failed
# EXTRAS         of xclip_jax that the workers install (default: tpu), as in tpu,wandb
# SETUP          command that each worker executes before each start of training, as in
#                "mountpoint -q /data || sudo mount -o ro,X-mount.mkdir /dev/sdb /data"
# ENV_FILE       file of keys for training on the workers, of mode 600, a line each as in WANDB_API_KEY=... or HF_TOKEN=...;
#                it is copied to their home folders (default: none; WANDB_MODE=online in it says that they have a login)
# LIBTPU_INIT_ARGS  flags of the TPU compiler (default: none; training sets those of docs/pods.md itself)
# PYTHON         interpreter with xclip_jax on this machine, which checks the config before anything is created (default:
#                python3; without one the config is checked on the workers)
# FAILURES       gives up after this many failures, of the pod or of training, without a newer checkpoint between them
#                (default: 3)
# POLL           seconds between two looks at the pod (default: 60)
# KEEP           1 to keep the pod at the end; the next command with its NAME trains on it (default: empty)
#
# What is compiled goes with the pod; a line JAX_COMPILATION_CACHE_DIR=gs://my-bucket/compiled in ENV_FILE keeps it for the
# next one.
# Every pod of a run gets the package versions of its first, which are kept in `requirements.txt` in the run's folder;
# delete that file to go on with newer ones.
# Input that training refuses before its first step, such as a set that the workers lack, ends the script at once.
# Where the pod cannot be deleted at the end, the script prints the command that deletes it and exits with 1.
# The workers' logs are copied to `logs` in the run's folder before a pod is deleted that still answers.
# Needs the Google Cloud CLI, and the key in an ssh agent: ssh-add ~/.ssh/google_compute_engine. The service account of
# the pod needs two roles on the bucket: storage.objectUser, and storage.legacyBucketReader, since Orbax asks for the
# bucket itself when it lists and deletes checkpoints.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
show_help "$@"
DRY_RUN=
[ "${1:-}" != --dry-run ] || { DRY_RUN=1 && shift; }
NAME=${NAME:-xclip-jax} TYPE=${TYPE:-v5litepod-64} POLL=${POLL:-60} FAILURES=${FAILURES:-3} SLICES=${SLICES:-1}
tpu_flags
[[ $FAILURES =~ ^[1-9][0-9]*$ ]] || fail "FAILURES=$FAILURES is not a number of failures; set it as in FAILURES=3"
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES is not a number of slices; set it as in SLICES=2"
if [ "$SLICES" -gt 1 ]; then
  NODES=()
  for ((i = 0; i < SLICES; i++)); do NODES+=("$NAME-$i"); done  # as Google numbers them
fi
folder=$(run_folder gs://my-bucket/runs/mine "$@")
[[ $folder == gs://* ]] || fail "--config.run=$folder would be lost with the pod; give a gs:// folder"
[ -n "$DRY_RUN" ] || command -v gcloud >/dev/null || fail "gcloud is missing; install the Google Cloud CLI"
pinned=$folder/requirements.txt
tpu_check "$folder" "$@"
tpu_pack

create() {
  local nodes=("--node-id=$NAME")
  [ "$SLICES" = 1 ] || nodes=("--node-count=$SLICES" "--node-prefix=$NAME")
  run gcloud compute tpus queued-resources create "$NAME" "${nodes[@]}" "${WHERE[@]}" "${SHAPE[@]}" \
    "--runtime-version=$RUNTIME"
}

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

# The state on the first worker: where one dies, JAX ends the others.
training_state() {
  tpu_ssh 0 "cd xclip_jax 2>/dev/null && [ -f train.pid ] || { echo new; exit; }; \
if [ -f train.exit ]; then cat train.exit; elif flock -n train.lock true; then echo lost; else echo running; fi"
}

# Whether the run has its last results, and no set of them failed.
complete() {
  run gcloud storage cat "$folder/results.json" | awk '/^  "failed":/ { failed = 1 } { print } END { exit failed }'
}

# Whether this start of training refused its input before its first step, as the next one would. Not so where a store
# did not answer, the processes did not find each other, or another one ended this one; nor for an exception in place of a
# sentence.
refused() {
  local passing='this process cannot join|process [0-9]+ of [0-9]+ (has|is) |process [0-9]+ of [0-9]+: [A-Za-z_.]+\('
  passing+='|.*(status (408|429|5[0-9][0-9])|Timeout|[Tt]imed out|run the same command to try again)'
  tpu_ssh 0 "cd xclip_jax && said=\$($THIS_LOG) && \
[[ \$said != *' parameters, '* ]] && tail -n 20 <<<\"\$said\" | grep '^error: ' | grep -vE '^error: ($passing)'" 2>/dev/null
}

say() {
  echo "$(date +%FT%T) $NAME: $1"
}

# Copies the logs of the workers of a pod that is about to be deleted.
keep_logs() {
  local node to
  to=$(quote "$folder/logs/$(date -u +%Y%m%dT%H%M%S)")
  [ "$state" = ACTIVE ] || return 0
  for node in "${NODES[@]}"; do  # one slice that does not answer must not hide the others
    (NODES=("$node") && tpu_ssh all "cd xclip_jax && [ -f train.log ] && \
timeout 120 gcloud storage cp train.log $to-\$(hostname).log") >/dev/null 2>&1 || true
  done
}

# recreate REASON
recreate() {
  say "$1; creating it again"
  keep_logs
  created=1 misses=0 ended="" doomed=1
  delete_again
}

# Deletes a pod of which nothing else is to be asked.
delete_again() {
  if delete; then doomed=""; else say "it could not be deleted yet"; fi
}

# finish STATUS: deletes the pod and exits. One call that fails must not leave it on.
finish() {
  local try
  [ -z "${KEEP:-}" ] || exit "$1"
  keep_logs
  for try in 1 2 3 4 5; do
    [ "$try" = 1 ] || sleep "$POLL"
    if delete || [ "$(tpu_state queued-resources state.state)" = ABSENT ]; then exit "$1"; fi
  done
  say "it could not be deleted and goes on costing money; delete it with: $(DRY_RUN=1 delete)"
  exit 1
}

# Forgets the failures before a newer checkpoint. Time would say nothing: a run that hangs is running for as long as
# log.stall_limit. Where the bucket cannot be asked, they still count.
forget_failures() {
  local newest
  # In a bucket a save that was cut off has the name of a checkpoint, and lacks the file that Orbax writes last.
  newest=$(run gcloud storage ls "$folder/checkpoints/*/commit_success.txt" 2>/dev/null |
    sed 's#/commit_success\.txt$##' | newest_step) || true
  [ "$newest" -le "$reached" ] || reached=$newest failures=0
}

# failed REASON
failed() {
  forget_failures
  failures=$((failures + 1))
  [ "$state" != ACTIVE ] || tpu_ssh 0 "tail -n 20 xclip_jax/train.log" || true
  if [ "$failures" -ge "$FAILURES" ]; then
    say "$1, $failures times in a row; giving up"
    finish 1
  fi
  recreate "$1"
}

# missed REASON: ten in a row are a failure, fewer may be the network.
missed() {
  say "$1; trying again in $POLL s"
  misses=$((misses + 1))
  [ "$misses" -lt 10 ] || failed "$1"
}

# tend ARGUMENTS: looks after training on a pod that is active.
tend() {
  local training
  training=$(training_state 2>/dev/null | tail -n 1) || training=
  case $training in
    running)
      misses=0 watched=1
      [ "$failures" = 0 ] || forget_failures
      ;;
    new)
      watched=1
      if tpu_install && tpu_start "$@"; then
        say "training has started; to follow it:"
        (DRY_RUN=1 tpu_ssh 0 "tail -n 100 -F xclip_jax/train.log")
      else
        missed "training could not be started"
      fi
      ;;
    "") missed "the first worker does not answer" ;;
    *)
      # Results may be an earlier command's, with fewer sets, where this start did not end well, and on a pod that was kept.
      # Training, started once more, knows whether the run is complete.
      if [ "$training" = 0 ] && [ -n "$watched" ] && complete >/dev/null 2>&1; then
        say "the run is complete"
        finish 0
      elif [ -z "$watched" ] && [ "$training" != lost ]; then
        # On a pod that was kept. Neither that status nor the end of that log says anything of this command.
        say "an earlier command ended here with exit status $training; training starts"
        tpu_ssh 0 "cd xclip_jax && { mv -f train.log train.log.1; rm -f train.exit train.pid; }" ||
          missed "the first worker does not answer"
      elif [[ $training =~ ^(75|130|143)$ ]]; then
        # 75: asked to stop, and saved. 130 and 143: asked to stop before it could save.
        recreate "training was stopped before its end"
      elif [ "$training" = 1 ] && refused; then
        say "training refused its input, and would again; giving up"
        finish 1
      elif [ -z "$ended" ]; then
        ended=1  # A preemption shows in training before it shows in the state of the pod: look once more.
      else
        # 79: it hung or lost a host. It starts again, and counts, since it may hang at the same place for ever; as
        # does one that ends without its results.
        [ "$training" != 0 ] || training="0 and without results"
        failed "training failed with exit status $training"
      fi
      ;;
  esac
}

if [ -n "$DRY_RUN" ]; then
  create && tpu_install && tpu_start "$@"
  echo "# every $POLL s, until the run is complete; all of it again where the pod or training failed:"
  tpu_describe queued-resources state.state
  training_state && complete && delete
  exit 0
fi

# created: whether a pod was there. watched: whether this command has seen training run, or started it. doomed: whether the
# pod could not be deleted. reached: step of the newest checkpoint it has seen.
created="" last="" ended="" watched="" doomed="" misses=0 failures=0 reached=0
while :; do
  state=$(tpu_state queued-resources state.state)
  [ "$state" = "$last" ] || say "$state"
  last=$state
  case $state in
    ABSENT)
      # Later on it may be a passing fault; the first time it is a wrong flag or no quota.
      create || [ -n "$created" ] || exit 1
      created=1 doomed=""
      ;;
    SUSPENDED | FAILED | ACTIVE)
      if [ -n "$doomed" ]; then
        delete_again
      elif [ "$state" = ACTIVE ]; then
        tend "$@"
      elif [ "$state" = FAILED ]; then
        failed "the pod is $state"
      else
        recreate "the pod is $state"
      fi
      ;;
  esac
  sleep "$POLL"
done
