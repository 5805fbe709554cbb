#!/usr/bin/env bash
# The test suite in an environment of its own: bash launch/test.sh [fast] [pytest arguments]
#
#   bash launch/test.sh                              all tests but those marked slow
#   bash launch/test.sh fast                         without whole runs and whole steps, for the time of developing
#   PYTHON=python3.13 bash launch/test.sh -k ring
#
# WORKERS: processes that share the files of tests (default 2). PYTHON and VENV: see launch/common.sh.
# Tests of whole steps take a fifth less time where jemalloc is installed (apt install libjemalloc2).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
show_help "$@"
unset PYTHONDONTWRITEBYTECODE  # workers, and commands that tests start, import the same modules
setup test
use_jemalloc
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
# Types are checked against the NumPy of the oldest Python: stubs of later ones refuse code that runs with all.
if "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  "$VENV/bin/ty" check --quiet --python "$VENV"
fi
if [ "${1:-}" = fast ]; then
  shift
  set -- -m "not slow and not long" "$@"
fi
exec "$VENV/bin/python" -m pytest --numprocesses="${WORKERS:-2}" --dist=loadfile --no-loadscope-reorder "$@"
