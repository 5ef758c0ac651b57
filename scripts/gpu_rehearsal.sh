#!/usr/bin/env bash
# Everything of the GPU job that needs no GPU: run it before the job sees one. Prints a table.
#
# TRITON is the version of the GPU machine; its compiler alone is put before the one of this environment.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export CUDA_VISIBLE_DEVICES=
triton=${TRITON:-3.6.0}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
results=() failed=

step() { # what, the last line that it must say, command
    local begin=$SECONDS state=passed said
    "${@:3}" >"$folder/log" 2>&1 || state="FAILED with status $?"
    said=$(grep -v '^$' "$folder/log" | tail -n 1)
    [[ $said =~ $2 ]] || state=${state/passed/FAILED}
    [ "$state" = passed ] || { failed=yes && tail -n 30 "$folder/log" >&2; }
    results+=("$(printf '%-48s %-8s %4d s  %s' "$1" "$state" $((SECONDS - begin)) "${said:0:110}")")
}

compile_kernels() {
    local beside=.versions/triton-$triton
    [ -d "$beside/triton" ] || "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps \
        --target "$beside" "triton==$triton"
    PYTHONPATH="$PWD/$beside:$PYTHONPATH" "$PYTHON" -W ignore -c "
import sys, triton, pytest
assert triton.__version__ == '$triton', triton.__version__
sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/test_kernels.py', '-k', 'ahead_of_time']))"
}

without_network() { # a checkout of its own, a package index that nobody answers
    cp -r scripts setup.py pyproject.toml "$folder/checkout" &&
        env -u MCORE_PACKING_PYTHON PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 \
            bash "$folder/checkout/scripts/demo.sh" && return 1
    [ $? = 2 ]
}

each_starts() { # every script of the job imports what it needs and knows its arguments
    local script
    for script in demo bench_layout bench_expand bench_max_seqlen bench_step gpu_ci; do
        "$PYTHON" -W ignore "scripts/$script.py" --help
    done
    "$PYTHON" -W ignore -m mcore_packing.cli parity --help && echo "all start"
}

benchmarks() { # on this CPU, the smallest case: values are checked before anything is timed
    local name
    for name in bench_layout bench_expand bench_max_seqlen; do
        "$PYTHON" -W ignore "scripts/$name.py" --smallest --budget 0 --output "$folder/out"
    done
    "$PYTHON" -W ignore scripts/bench_step.py --smallest --output "$folder/out"
}

mkdir "$folder/checkout"
step "kernels compile with Triton $triton" "[0-9]+ passed" compile_kernels
step "tests marked gpu are collected" "[0-9]+/[0-9]+ tests collected" \
    "$PYTHON" -W ignore -m pytest -q -m gpu --collect-only
step "no host read, on fake CUDA tensors" "[0-9]+ passed" \
    "$PYTHON" -W ignore -m pytest -q -m "not gpu" tests/test_ops.py
step "every script of the job starts" "all start" each_starts
step "benchmarks find the same as Megatron" "wrote .*bench_step" benchmarks
step "gpu_ci --dry-run" "bench_step" "$PYTHON" -W ignore scripts/gpu_ci.py --dry-run
step "no network: one line says what is missing" "still missing: torch" without_network
printf '%s\n' "${results[@]}"
[ -z "$failed" ]
