#!/usr/bin/env bash
# Everything that needs a GPU: tests, demo, parity, benchmarks. See --help.
set -eo pipefail
caller=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
script=$PWD/scripts/gpu_ci.py
cd "$caller"
exec "$PYTHON" -W ignore "$script" "$@"
