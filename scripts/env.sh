# Sourced by the other scripts: sets PYTHON to an environment that has what they need.
#
# Makes .venv in the checkout and fills it from scripts/constraints.txt, once; the checkout itself is
# installed there too, so .venv/bin/mcore-packing exists. Where MCORE_PACKING_PYTHON names a Python that
# has torch, that torch is used, and only what else is missing goes into .venv-beside-torch.

case $MCORE_PACKING_PYTHON in */*) MCORE_PACKING_PYTHON=$(realpath -s "$MCORE_PACKING_PYTHON") ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || echo 2)}"

packages="megatron-core megatron-energon triton numpy einops pytest pytest-xdist hypothesis matplotlib transformers ruff mypy setuptools"
modules="torch megatron.core triton numpy pytest hypothesis"

fail() { # one line
    echo "mcore_packing: $*" >&2
    exit 2
}

is_python() {
    [ "$("$1" -c 'import sys; print(sys.version_info >= (3, 10))' 2>/dev/null)" = True ]
}

missing() { # python, modules: those that it does not have
    "$1" -W ignore - "${@:2}" <<'END'
import importlib.util, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
print(*[name for name in sys.argv[1:] if not there(name)])
END
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        is_python "$candidate" && echo "$candidate" && return
    done
    return 1
}

make_venv() { # folder, "beside" where base has torch, constraints, packages
    local stamp pip="$1/bin/python -m pip install -q --disable-pip-version-check"
    stamp=$(cat "$3" scripts/env.sh | cksum)
    [ "$(cat "$1/stamp" 2>/dev/null)" = "$stamp" ] && return
    echo "Making an environment in $1: takes a minute the first time ..." >&2
    "$base" -m venv "$1" || fail "$base cannot make a virtual environment in $1"
    [ -z "$2" ] || # its packages; those of a virtual environment are no system's
        "$base" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
            >"$(echo "$1"/lib/python*/site-packages)/$2.pth"
    {
        $pip -c "$3" $4 && $pip -c "$3" $packages && $pip --no-deps --no-build-isolation -e .
    } >"$1/pip.log" 2>&1 || fail "pip could not fill $1 (no network? see $1/pip.log); still missing:" \
        "$(missing "$1/bin/python" $modules). MCORE_PACKING_PYTHON=... names a Python that has all"
    echo "$stamp" >"$1/stamp"
}

if [ -z "$MCORE_PACKING_PYTHON" ]; then
    base=$(find_python) || fail "there is no Python of 3.10 or newer"
    make_venv .venv "" scripts/constraints.txt "torch==2.13.0"
    PYTHON="$PWD/.venv/bin/python"
else
    base=$MCORE_PACKING_PYTHON
    is_python "$base" || fail "MCORE_PACKING_PYTHON=$base is no Python of 3.10 or newer"
    case " $(missing "$base" $modules) " in
        "  ") PYTHON=$base ;;
        *" torch "*) fail "MCORE_PACKING_PYTHON=$base has no torch; unset it, and .venv will have one" ;;
        *)
            mkdir -p .venv-beside-torch
            grep -v "^torch==\|^triton==" scripts/constraints.txt >.venv-beside-torch/constraints.txt
            "$base" - >>.venv-beside-torch/constraints.txt <<'END' || exit 2
from importlib.metadata import distributions
for found in distributions():
    if found.name.lower() in ("torch", "triton"):
        print(f"{found.name}=={found.version}")
END
            make_venv .venv-beside-torch beside .venv-beside-torch/constraints.txt pip
            PYTHON="$PWD/.venv-beside-torch/bin/python"
            ;;
    esac
fi
