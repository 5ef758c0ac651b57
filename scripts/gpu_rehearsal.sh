#!/usr/bin/env bash
# Everything of the GPU job that needs no GPU: run it before the job sees one. Prints a table.
#
# Most of it is the job itself, on a CPU that answers for a GPU (mcore_packing.testing.pretend_gpu).
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
    [ "$state" = passed ] || { failed=yes && tail -n 40 "$folder/log" >&2; }
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

part() { # of the job, on a CPU that answers for a GPU, with small sizes
    "$PYTHON" -W ignore scripts/gpu_ci.py --rehearse --part "$1" --output "$folder/$1"
}

on_a_cpu() { # the same benchmarks where there is no GPU
    export OMP_NUM_THREADS=1
    printf "scripts/bench_%s --smallest --output $folder/cpu\n" \
        "layout.py --budget 0" "expand.py --budget 0" "max_seqlen.py --budget 0" step.py |
        xargs -P 2 -L 1 "$PYTHON" -W ignore && echo "all passed"
}

mkdir "$folder/checkout"
step "kernels compile with Triton $triton" "[0-9]+ passed" compile_kernels
step "no host read, on fake CUDA tensors" "[0-9]+ passed" \
    "$PYTHON" -W ignore -m pytest -q -m "not gpu" tests/test_ops.py
step "the first part, a GPU pretended" "\| passed \|" part first
step "the second part, a GPU pretended" "\| passed \|" part second
step "benchmarks on a CPU" "all passed" on_a_cpu
step "no network: one line says what is missing" "still missing: torch" without_network
printf '%s\n' "${results[@]}"
[ -z "$failed" ]
