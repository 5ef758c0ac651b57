#!/usr/bin/env bash
# Random packs against plain Python, on all cores; arguments go to soak.py.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export OMP_NUM_THREADS=1
exec "$PYTHON" -W ignore scripts/soak.py "$@"
