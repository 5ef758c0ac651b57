#!/usr/bin/env bash
# The hook against every Megatron-Core that it supports. Prints a table; see --help.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export CUDA_VISIBLE_DEVICES=
exec "$PYTHON" -W ignore scripts/test_versions.py "$@"
