#!/usr/bin/env bash
# The documentation site, build/site/index.html, in the environment of the tests: bash launch/docs.sh [serve]
#
#   bash launch/docs.sh                  builds it; a warning, such as a link to nowhere, is an error
#   bash launch/docs.sh serve            shows it on http://127.0.0.1:8000 and follows changes
#
# NOTEBOOKS=false leaves out the outputs of notebooks, which take minutes. PYTHON and VENV: see launch/common.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
show_help "$@"
setup test
"$VENV/bin/python" -m docs.generate --check
export NO_MKDOCS_2_WARNING=1
exec "$VENV/bin/python" -m mkdocs "${1:-build}" --strict
