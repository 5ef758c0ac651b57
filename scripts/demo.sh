#!/usr/bin/env bash
# The main job: packed rows against the same samples run one by one, without and with the hook.
# --output FOLDER says where the pictures and figures go.
set -eo pipefail
caller=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
script=$PWD/scripts/demo.py
cd "$caller"
exec "$PYTHON" -W ignore "$script" "$@"
