#!/usr/bin/env bash
# The main job: packed rows against the same samples run one by one, without and with the hook; then a
# short fine-tuning on packed rows.
# --output FOLDER says where the pictures and figures go.
set -eo pipefail
caller=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
here=$PWD
cd "$caller"
"$PYTHON" -W ignore "$here/scripts/demo.py" "$@"
echo
echo "Fine-tuning on packed rows: questions about coloured shapes, held-out ones graded."
exec "$PYTHON" -W ignore "$here/scripts/train_llava.py" --steps 100 --verify-packing 100 --overwrite "$@"
