# shellcheck shell=bash
# Shared by the launch scripts. Source it from the root of the checkout.
#
# `setup EXTRAS` makes a virtual environment with this checkout in it:
#   PYTHON  interpreter to build the environment with (default: python3; 3.11 to 3.14)
#   VENV    its path (default: .venv in the checkout, one for each version of Python)
#
# `tpu_*` prepare a Cloud TPU that is called NAME; their variables are described in tpu_vm.sh.

# XLA maps its buffers again in each step; on a CPU an eighth of the demo's time would go into page faults of small pages.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# Has programs allocate by jemalloc where it is installed and no other allocator was chosen: a step on a CPU takes
# another twelfth less. Compiling leaves glibc's heap in pieces that it searches in each step; and jemalloc keeps what a
# step frees for the next one, up to half a minute: half a gigabyte more of the demo.
use_jemalloc() {
  local library conf=${MALLOC_CONF:-thp:always,oversize_threshold:0,dirty_decay_ms:30000,muzzy_decay_ms:30000}
  [ -z "${LD_PRELOAD:-}" ] || return 0
  library=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p 2>/dev/null |
    awk '/libjemalloc\.so\.2 / && !path { path = $NF } END { print path }') || return 0
  # That of another architecture, or one that is too old for a setting, would be a warning of each program.
  [ -n "$library" ] && [ -z "$(MALLOC_CONF=$conf LD_PRELOAD=$library /bin/sh -c : 2>&1)" ] || return 0
  export LD_PRELOAD=$library MALLOC_CONF=$conf
}

setup() {
  local python=${PYTHON:-python3} version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    echo "error: $python is not a Python; set PYTHON=python3.11 (3.11 to 3.14)" >&2
    exit 2
  }
  case $version in
    3.11 | 3.12 | 3.13 | 3.14) ;;
    *)
      echo "error: $python is Python $version; set PYTHON to one of 3.11 to 3.14" >&2
      exit 2
      ;;
  esac
  VENV=${VENV:-.venv-$version}
  # The stamp holds what was installed: a changed setup.py installs again, an unchanged one starts at once.
  local stamp="$VENV/.installed" wanted new=""
  wanted="$1 $(cksum setup.py)"
  [ ! -x "$VENV/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
  # pip comes last: an environment whose creation failed or was interrupted has a Python without it.
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "making $VENV"
    [ -e "$VENV" ] || new=1
    "$python" -m venv "$VENV" || {
      [ -z "$new" ] || rm -rf "$VENV"
      fail "$python could not make $VENV, see above; on Debian or Ubuntu: apt install python$version-venv"
    }
  fi
  echo "installing xclip_jax[$1] into $VENV"
  # Modules are compiled when they are first imported: to compile all of them takes half of the installation's time.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[$1]"
  echo "$wanted" >"$stamp"
}

# show_help ARGUMENTS: where the first is --help, prints the header of the script that is executed, and exits.
show_help() {
  case ${1:-} in
    -h | --help)
      awk 'NR > 1 { if (!/^#/) exit; if (/^#SBATCH/) next; sub(/^# ?/, ""); if (n += length) print }' "launch/${0##*/}"
      exit 0
      ;;
  esac
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# need VARIABLE EXAMPLE
need() {
  [ -n "${!1:-}" ] || fail "$1 is not set; set it as in $1=$2"
}

# Prints a command so that it can be pasted. printf %q would do, but what it prints is hard to read.
quote() {
  local word line="" escaped="'\\''"
  for word; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$escaped}'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Executes a command, or prints it in a dry run.
run() {
  if [ -n "${DRY_RUN:-}" ]; then quote "$@"; else "$@"; fi
}

# argument KEY ARGUMENTS: the value of --config.KEY among the arguments of training.
argument() {
  local key=$1 value=""
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      "--config.$key="* | "-config.$key="*) value=${1#*=} ;;
      "--config.$key" | "-config.$key") value=${2:-} ;;
    esac
    shift
  done
  printf '%s\n' "$value"
}

# run_folder EXAMPLE ARGUMENTS: the value of --config.run among the arguments of training, spelt as training spells it,
# with single slashes and none at the end: in a bucket, a name with other slashes is another file.
run_folder() {
  local example=$1 folder
  shift
  folder=$(argument run "$@")
  [ -n "$folder" ] || fail "--config.run is missing; say where the run is kept, as in --config.run=$example"
  case $folder in
    [~]) folder=$HOME ;;
    [~]/*) folder=$HOME/${folder:2} ;;
    [~]*) fail "--config.run=$folder begins with another user's home; give the whole path" ;;
  esac
  sed -E 's#([^:/])/(\.?/)+#\1/#g; s#:///+#://#; s#([^:/])/\.?$#\1#' <<<"$folder"
}

# refuse_flags ARGUMENTS: --check ends with status 0 and without results, for which the scripts would wait; and a
# --dry-run that is not the first argument would not be seen.
refuse_flags() {
  local word
  for word; do
    case $word in
      -check | --check | -check=* | --check=*) fail "$word trains nothing; leave it out, or use xclip-jax train --check" ;;
      --dry-run) fail "--dry-run is not the first argument; write it before the others" ;;
    esac
  done
}

# check_recipe ARGUMENTS: a recipe by its file has to be in what `tpu_pack` packs.
check_recipe() {
  local word file="" next=""
  for word; do
    [ -z "$next" ] || file=$word
    next=""
    case $word in
      -config=* | --config=*) file=${word#*=} ;;
      -config | --config) next=1 ;;
    esac
  done
  file=${file%%:*}
  [[ $file == *.py ]] || return 0
  [[ $file != [/~]* ]] || fail "--config=$file is outside the checkout, which is all that the workers get; put it into configs/"
  git cat-file -e HEAD 2>/dev/null || return 0  # no checkout, or a damaged one, of which `tpu_pack` says so
  git cat-file -e "HEAD:${file#./}" 2>/dev/null ||
    fail "--config=$file is not committed, and the workers get the last commit; commit it"
}

# newest_step: of the checkpoints whose paths are on standard input, 0 where there is none.
newest_step() {
  awk '{ sub("/$", ""); sub(".*/", "") } /^[0-9]+$/ && $0 + 0 > newest { newest = $0 + 0 } END { print newest + 0 }'
}

# logs_to TRACKER ARGUMENTS: whether --config.log.trackers among the arguments names this tracker.
logs_to() {
  local tracker=$1 names
  shift
  names=$(argument log.trackers "$@" | tr -d "()[]\"' ")
  [[ ,$names, == *,"$tracker",* ]]
}

# Checks the variables of a TPU and fills the arrays WHERE and SHAPE with flags of gcloud, and NODES with the names of its
# slices.
tpu_flags() {
  local more=()
  # The scripts have changed to the checkout; a file that is named without its folder is where they were started.
  [[ ${ENV_FILE:-/} == /* ]] || ENV_FILE=$OLDPWD/$ENV_FILE
  EXTRAS=${EXTRAS:-tpu}
  [[ ,$EXTRAS, == *,tpu,* ]] || fail "EXTRAS=$EXTRAS lacks tpu, without which JAX finds no TPU; set EXTRAS=tpu,$EXTRAS"
  [[ $TYPE != tpu7x* ]] ||
    fail "TYPE=$TYPE: the Cloud TPU API, on which this script relies, has no TPU7x; use GKE, see launch/gke_jobset.yaml"
  need PROJECT my-project
  need ZONE us-west4-a
  if [ -z "${RUNTIME:-}" ]; then
    case $TYPE in
      v2* | v3* | v4*) RUNTIME=tpu-ubuntu2204-base ;;
      v5litepod*) RUNTIME=v2-alpha-tpuv5-lite ;;
      v5p*) RUNTIME=v2-alpha-tpuv5 ;;
      v6e*) RUNTIME=v2-alpha-tpuv6e ;;
      *) fail "RUNTIME is not set, and none is known for TYPE=$TYPE; set it as in RUNTIME=v2-alpha-tpuv6e" ;;
    esac
  fi
  WHERE=("--project=$PROJECT" "--zone=$ZONE")
  NODES=("$NAME")
  SHAPE=("--accelerator-type=$TYPE")
  [ -z "${TOPOLOGY:-}" ] || SHAPE=("--type=$TYPE" "--topology=$TOPOLOGY")
  [ -z "${SPOT:-}" ] || SHAPE+=(--spot)
  read -ra more <<<"${CREATE_FLAGS:-}"
  SHAPE+=(${more[@]+"${more[@]}"})
}

# tpu_check FOLDER ARGUMENTS: what can be checked here before anything is paid for: the config, that the extras that it
# needs will be installed, and that this machine is logged in and reaches the bucket of the run.
tpu_check() {
  local folder=$1 tracker bucket said extra extras="" missing="" python=${PYTHON:-python3}
  shift
  refuse_flags "$@"
  check_recipe "$@"
  for tracker in wandb trackio; do
    ! logs_to "$tracker" "$@" || [[ ,$EXTRAS, == *,$tracker,* ]] ||
      fail "log.trackers names $tracker, which the workers would lack; set EXTRAS=$EXTRAS,$tracker"
  done
  if [ -n "$DRY_RUN" ]; then
    quote env JAX_PLATFORMS=cpu "$python" -m xclip_jax.main --check "$@"
  elif "$python" -c "import jax, xclip_jax" 2>/dev/null; then
    said=$(JAX_PLATFORMS=cpu "$python" -m xclip_jax.main --check "$@") || exit 2
    echo "$said"
    extras=$(sed -n 's/^extras: //p' <<<"$said")
    for extra in ${extras//,/ }; do
      [[ ,$EXTRAS, == *,$extra,* ]] || missing+=,$extra
    done
    [ -z "$missing" ] || fail "the config needs ${missing#,}, which the workers would lack; set EXTRAS=$EXTRAS$missing"
  else
    echo "warning: the config is checked on the workers alone, since $python cannot import xclip_jax; set PYTHON" >&2
  fi
  tpu_keys "$extras" "$@"
  [[ $folder == gs://* ]] || return 0
  if { [[ ,$extras, == *,wandb,* ]] || logs_to wandb "$@"; } && [ -n "${ENV_FILE:-}" ] && grep -qixe WANDB_MODE=offline "$ENV_FILE"; then
    fail "log.trackers names wandb, and WANDB_MODE=offline in ENV_FILE=$ENV_FILE would keep the metrics on the workers' disks, which go with them; give WANDB_API_KEY=..."
  fi
  bucket=${folder#gs://} bucket=gs://${bucket%%/*}
  if [ -n "$DRY_RUN" ]; then
    quote gcloud storage ls "$bucket"
  else
    gcloud storage ls "$bucket" >/dev/null ||
      fail "this machine cannot list $bucket; log in (gcloud auth login), or correct --config.run"
  fi
}

# tpu_keys EXTRAS ARGUMENTS: checks ENV_FILE, without a word of its values, and that it has the keys that a config with
# these extras and arguments will ask for on the workers.
tpu_keys() {
  local line names="" extras=,$1,
  shift
  if [ -n "${ENV_FILE:-}" ]; then
    [ -f "$ENV_FILE" ] && [ -r "$ENV_FILE" ] || fail "ENV_FILE=$ENV_FILE is not a file that can be read; correct it"
    # shellcheck disable=SC2012 # stat has other flags on a Mac
    [[ $(ls -lL "$ENV_FILE") == -???------* ]] || fail "others may read ENV_FILE=$ENV_FILE; chmod 600 $ENV_FILE"
    line=$(awk '!/^(#.*|[A-Za-z_][A-Za-z0-9_]*=[-A-Za-z0-9_.\/:@%+,=]*)?$/ { print NR; exit }' "$ENV_FILE")
    [ -z "$line" ] || fail "ENV_FILE=$ENV_FILE, line $line is not NAME=VALUE, or has spaces or quotes; correct it"
    names=$(sed -n '/^#/d; s/=.*//p' "$ENV_FILE")
  fi
  if { [[ $extras == *,wandb,* ]] || logs_to wandb "$@"; } && ! grep -qxe WANDB_API_KEY -e WANDB_MODE <<<"$names"; then
    fail "log.trackers names wandb, for which the workers have no key; write WANDB_API_KEY=... into a file of mode 600, and set ENV_FILE=FILE"
  fi
  if { [[ $extras == *,trackio,* ]] || logs_to trackio "$@"; } && ! grep -q ^TRACKIO_ <<<"$names"; then
    echo "warning: trackio's database is on the first worker and goes with it; name a Space by TRACKIO_SPACE_ID=... in the file ENV_FILE" >&2
  fi
  if [[ $extras =~ ,(hub|datasets), || "$*" == *hf:* || "$*" == *hf-hub:* ]] && ! grep -qxe HF_TOKEN <<<"$names"; then
    echo "warning: repositories of the Hugging Face Hub that are gated or private need HF_TOKEN=... in the file ENV_FILE" >&2
  fi
}

# tpu_describe RESOURCE FIELD, RESOURCE being tpu-vm or queued-resources
tpu_describe() {
  run gcloud compute tpus "$1" describe "$NAME" "${WHERE[@]}" "--format=value($2)"
}

# tpu_state RESOURCE FIELD: the state of NAME, ABSENT where there is none, UNKNOWN where gcloud could not say.
tpu_state() {
  local errors
  errors=$(mktemp)
  if ! tpu_describe "$1" "$2" 2>"$errors"; then
    if grep -q NOT_FOUND "$errors"; then
      echo ABSENT
    else
      cat "$errors" >&2
      echo UNKNOWN
    fi
  fi
  rm -f "$errors"
}

# tpu_ssh WORKER COMMAND, WORKER being a number, of the first slice, or all, of all slices
tpu_ssh() {
  local node nodes=("${NODES[@]}")
  [ "$1" = all ] || nodes=("${NODES[0]}")
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" "--worker=$1" "--command=$2" || return
  done
}

# Command on a worker, in its checkout: what this start of training has printed. The line with the number of parameters is
# the last before the first step.
# shellcheck disable=SC2016,SC2034
THIS_LOG='tail -c +$(($(cat train.begin) + 1)) train.log'

# tpu_scp FILE NAME: copies FILE to the home folders of all workers, as NAME.
tpu_scp() {
  local node
  for node in "${NODES[@]}"; do
    run gcloud compute tpus tpu-vm scp "$1" "$node:$2" "${WHERE[@]}" --worker=all || return
  done
}

# What a worker needs of a folder that is not a git checkout.
SOURCES=(setup.py pyproject.toml README.md .git_archival.txt configs launch studies xclip_jax)

# Packs this commit for the workers, into the file ARCHIVE: an archive and not a clone, so that a shallow clone will do.
# git writes the commit's name into .git_archival.txt, from which config.json of a run has it. Outside a git checkout
# the files go as they are. Called before anything that costs money.
tpu_pack() {
  ARCHIVE=dist/workers-$NAME.tar.gz
  run mkdir -p dist
  if [ -e .git ]; then
    local stays
    stays=$(git status --porcelain | awk 'NR <= 8 { printf "%s ", substr($0, 4) }')
    [ -z "$stays" ] || echo "warning: what is not committed stays here: $stays" >&2
    run git archive "--output=$ARCHIVE" HEAD
  else
    run tar -czf "$ARCHIVE" --exclude=__pycache__ "${SOURCES[@]}"
  fi
}

# Puts the archive, and an environment with JAX for TPUs, on all workers. pinned, where it is set, is a file in a bucket
# with the package versions of the run's first pod, which later pods get too. uv, since the images of TPU VMs have Python
# 3.10. A .git of an earlier release would name another commit. Where training runs, which reads its code until it ends,
# nothing is touched; the lock is that of detach.sh.
tpu_install() {
  local pins=": >pinned.txt" conflict=""
  if [ -n "${pinned:-}" ]; then
    pins="gcloud storage cat $(quote "$pinned") >pinned.txt 2>pinned.err ||\
 { grep -q 'matched no objects' pinned.err && : >pinned.txt; }"
    conflict=$(quote "error: packages have the versions in $pinned; remove it if this commit needs newer ones")
  fi
  tpu_ssh all "[ ! -f xclip_jax/train.lock ] || flock -n xclip_jax/train.lock true ||\
 { echo \"error: training runs already, as process \$(cat xclip_jax/train.pid); stop it with kill\" >&2; exit 1; }" &&
    tpu_scp "$ARCHIVE" xclip_jax.tar.gz &&
    tpu_ssh all "mkdir -p xclip_jax && cd xclip_jax && rm -rf .git ${SOURCES[*]} && tar -xzf ../xclip_jax.tar.gz" &&
    tpu_ssh all "[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh" &&
    tpu_ssh all "cd xclip_jax && { [ -x .venv/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 .venv; } &&\
 { $pins; } &&\
 { ~/.local/bin/uv pip install --quiet --python .venv/bin/python \$([ ! -s pinned.txt ] || echo --constraint=pinned.txt) --editable '.[$EXTRAS]' ||\
 { [ ! -s pinned.txt ] || echo $conflict >&2; false; }; }" &&
    { [ -z "${pinned:-}" ] ||
      tpu_ssh 0 "cd xclip_jax && { [ -s pinned.txt ] || ~/.local/bin/uv pip freeze --python .venv/bin/python --exclude-editable |\
 gcloud storage cp --no-clobber - $(quote "$pinned"); }" ||
      echo "warning: versions of packages are not kept in $pinned; a pod that is created again may get others" >&2; } &&
    { [ -z "${ENV_FILE:-}" ] || {
      tpu_scp "$ENV_FILE" .xclip_jax.env &&
        tpu_ssh all "chmod 600 .xclip_jax.env"
    }; } &&
    { [ -z "${SETUP:-}" ] || tpu_ssh all "$SETUP"; }
}

# tpu_start ARGUMENTS: starts training on all workers. ENV_FILE has keys: commands and logs show only its name.
tpu_start() {
  local training
  training=$(quote ${LIBTPU_INIT_ARGS:+env "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS"} .venv/bin/python -m xclip_jax.main --distributed "$@")
  tpu_ssh all "${ENV_FILE:+set -a; . ./.xclip_jax.env; set +a; }bash xclip_jax/launch/detach.sh $training"
}
