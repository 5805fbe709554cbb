#!/usr/bin/env bash
# Starts a command that outlives the connection it came by: bash launch/detach.sh COMMAND [ARGUMENT ...]
#
# Called on the workers of a TPU by tpu_vm.sh and tpu_pod.sh. In the checkout it leaves train.log with the output,
# train.pid, at the end train.exit with the exit status, train.begin with the bytes that train.log had before, and
# train.lock, which is locked while the command runs.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:---help} in
  -h | --help)
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' launch/detach.sh
    exit 0
    ;;
esac
# A lock and not the process in train.pid: after a reboot its number may be another's.
exec 9>>train.lock
if ! flock --nonblock 9; then
  echo "error: training runs already, as process $(cat train.pid); stop it with kill" >&2
  exit 1
fi
rm -f train.pid train.exit
touch train.log
wc -c <train.log >train.begin
(
  trap '' HUP
  status=0
  "$@" &
  echo $! >train.pid
  wait $! || status=$?
  echo "$status" >train.exit
) >>train.log 2>&1 </dev/null &
until [ -s train.pid ]; do sleep 0.05; done
