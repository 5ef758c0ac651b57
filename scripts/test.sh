#!/usr/bin/env bash
# Every test that needs no GPU. Arguments go to pytest.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export CUDA_VISIBLE_DEVICES= # what needs a GPU is in gpu_ci.sh
if "$PYTHON" -c "import ruff" 2>/dev/null; then
    "$PYTHON" -m ruff check --quiet .
    "$PYTHON" -m ruff format --check --quiet .
fi
if "$PYTHON" -c "import mypy" 2>/dev/null; then
    "$PYTHON" -m mypy --no-error-summary
fi
if [ $# = 0 ] && "$PYTHON" -c "import xdist" 2>/dev/null; then # all of them: one process a core
    set -- -n "$(nproc)" --dist loadfile
    export OMP_NUM_THREADS=1
fi
exec "$PYTHON" -W ignore -m pytest -q -m "not gpu and not slow" "$@"
