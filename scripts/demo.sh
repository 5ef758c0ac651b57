#!/usr/bin/env bash
# The main job: packed rows against the same samples run one by one, without and with the hook; then a
# short fine-tuning on packed rows.
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
"$PYTHON" -W ignore scripts/demo.py "$@"
echo
echo "Fine-tuning on packed rows: questions about coloured shapes, held-out ones graded."
exec "$PYTHON" -W ignore scripts/train_llava.py --steps 100 --verify-packing 100 "$@"
