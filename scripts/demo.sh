#!/usr/bin/env bash
# The main job: packed rows against the same samples run one by one, without and with the hook.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" -W ignore scripts/demo.py "$@"
