#!/usr/bin/env bash
# The hook's tests against every released megatron-core it supports.
# Arguments: versions, or nothing for all of them.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export CUDA_VISIBLE_DEVICES=
tests="tests/test_llava.py tests/test_packed_seq.py tests/test_cpu.py tests/test_attention.py"
failed=
for version in ${@:-0.12.3 0.13.1 0.14.0 0.15.3 0.16.1}; do
    beside=".versions/$version" # megatron-core alone: torch and the rest are shared
    if [ ! -d "$beside/megatron" ]; then
        "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --target "$beside" \
            "megatron-core==$version"
    fi
    echo "== megatron-core $version"
    # A path beside the environment's own comes first.
    PYTHONPATH="$PWD/$beside:$PYTHONPATH" "$PYTHON" -W ignore -c "
import megatron.core, sys
sys.exit(megatron.core.__version__ != '$version' and f'found {megatron.core.__version__}')"
    PYTHONPATH="$PWD/$beside:$PYTHONPATH" "$PYTHON" -W ignore -m pytest -q -m "not gpu and not slow" \
        -p no:cacheprovider $tests || failed="$failed $version"
done
if [ -n "$failed" ]; then
    echo "FAILED with megatron-core$failed" >&2
    exit 1
fi
