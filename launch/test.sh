#!/usr/bin/env bash
# The test suite in an environment of its own: bash launch/test.sh [pytest arguments]
#
#   PYTHON=python3.13 bash launch/test.sh
#
# WORKERS: processes that share the files of tests (default 2). PYTHON and VENV: see launch/common.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
show_help "$@"
setup test
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check --quiet .
exec "$VENV/bin/python" -m pytest --numprocesses="${WORKERS:-2}" --dist=loadfile "$@"
