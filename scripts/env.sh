# Sourced by the other scripts: sets PYTHON to an environment that has what they need.
#
# Makes .venv in the checkout and fills it from scripts/constraints.txt, once. A Python that has torch
# already is used instead where MCORE_PACKING_PYTHON names it; of torch, nothing is installed then.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || echo 2)}"

packages="megatron-core megatron-energon triton numpy einops pytest hypothesis matplotlib transformers ruff"
modules="torch, megatron.core, triton, numpy, pytest, hypothesis"

has_all() { "$1" -W ignore -c "import $modules" >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "mcore_packing needs Python >= 3.10" >&2
    return 1
}

make_venv() { # folder, flags of venv, constraints, packages
    local stamp
    stamp=$(cat "$3" scripts/env.sh | cksum)
    if [ "$(cat "$1/stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "Making an environment in $1: takes a minute the first time ..." >&2
        "$base" -m venv $2 "$1" &&
            "$1/bin/python" -m pip install -q --disable-pip-version-check -c "$3" $4 &&
            "$1/bin/python" -m pip install -q --disable-pip-version-check -c "$3" $packages &&
            echo "$stamp" >"$1/stamp"
    fi
}

if [ -z "$MCORE_PACKING_PYTHON" ]; then
    base=$(find_python) || exit 1
    make_venv .venv "" scripts/constraints.txt "torch==2.13.0" || exit 1
    PYTHON="$PWD/.venv/bin/python"
elif has_all "$MCORE_PACKING_PYTHON"; then
    PYTHON=$MCORE_PACKING_PYTHON
else
    base=$MCORE_PACKING_PYTHON
    mkdir -p .venv-beside-torch
    grep -v "^torch==\|^triton==" scripts/constraints.txt >.venv-beside-torch/constraints.txt
    "$base" - >>.venv-beside-torch/constraints.txt <<'END' || exit 1
from importlib.metadata import distributions
for found in distributions():
    if found.name.lower() in ("torch", "triton"):
        print(f"{found.name}=={found.version}")
END
    make_venv .venv-beside-torch --system-site-packages .venv-beside-torch/constraints.txt pip ||
        exit 1
    PYTHON="$PWD/.venv-beside-torch/bin/python"
fi
