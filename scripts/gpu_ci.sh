#!/usr/bin/env bash
# Everything that needs a GPU: tests, demo, parity, benchmarks. Writes gpu_ci.json and gpu_ci.md.
# --dry-run says what would run and what is missing; --output FOLDER says where results go.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" -W ignore scripts/gpu_ci.py "$@"
