#!/usr/bin/env bash
# From nothing to a trained model and its table on this machine: environment, data, training, evaluation.
#
#   bash launch/local.sh                                   xCLIP on the emoji pairs, five to ten minutes on two cores
#   bash launch/local.sh --config configs/demo.py:objective=nclip [--config.KEY=VALUE ...]
#
# Run it again to resume, or to hear that the run is complete. What is compiled is kept in ~/.cache/xclip_jax/compiled.
# On a CPU it is a twelfth faster where jemalloc is installed (apt install libjemalloc2).
# PYTHON and VENV: see launch/common.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
show_help "$@"
setup demo
use_jemalloc
[ $# -gt 0 ] || set -- --config configs/demo.py
exec "$VENV/bin/python" -m xclip_jax.main "$@"
