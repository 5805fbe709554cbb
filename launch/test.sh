#!/usr/bin/env bash
# The test suite in an environment of its own: bash launch/test.sh [fast] [pytest arguments]
#
#   bash launch/test.sh                              all tests but those marked slow
#   bash launch/test.sh fast                         without the files that take longest, for the time of developing
#   PYTHON=python3.13 bash launch/test.sh -k ring
#
# WORKERS: processes that share the files of tests (default 2). PYTHON and VENV: see launch/common.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
show_help "$@"
setup test
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
# Types are checked against the NumPy of the oldest Python: stubs of later ones refuse code that runs with all.
if "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
  "$VENV/bin/ty" check --quiet --python "$VENV"
fi
if [ "${1:-}" = fast ]; then
  shift
  set -- --ignore=tests/studies/test_runner.py "$@"
  # Four fifths of the suite's processor time are in these files.
  for name in collectives configs controls embed end_to_end evaluate examples export extension_similarity \
    extension_source extension_tower finetune finetune_objective inference interop models plan preprocessing \
    pretraining probe processes report results run_evaluations run_folder sharding step trainer unreadable vocabulary \
    weights workers; do
    set -- "--ignore=tests/test_$name.py" "$@"
  done
fi
exec "$VENV/bin/python" -m pytest --numprocesses="${WORKERS:-2}" --dist=loadfile "$@"
