#!/usr/bin/env bash
# Starts a command that outlives the connection it came by: bash launch/detach.sh COMMAND [ARGUMENT ...]
#
# Called on the workers of a TPU by tpu_vm.sh and tpu_pod.sh. In the checkout it leaves train.log with the output,
# train.pid, and at the end train.exit with the exit status.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -f train.pid ] && [ ! -f train.exit ] && kill -0 "$(cat train.pid)" 2>/dev/null; then
  echo "error: training runs already, as process $(cat train.pid); stop it with kill" >&2
  exit 1
fi
rm -f train.pid train.exit
(
  trap '' HUP
  status=0
  "$@" &
  echo $! >train.pid
  wait $! || status=$?
  echo "$status" >train.exit
) >>train.log 2>&1 </dev/null &
until [ -s train.pid ]; do sleep 0.05; done
