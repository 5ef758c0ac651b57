#!/usr/bin/env bash
# Losses and gradients of parallel runs, in real gloo processes, against one process. Prints a table.
# The first micro-batch brings its layout, the second does not: what the hook read from tensors and
# launched for either, the worst of all ranks.
# Arguments: the cases to run ("cp2 cp4 tp2sp ..."), or nothing for all of them.
set -eo pipefail
declare -A cases=(
    [cp2]="2 --cp 2" [cp4]="4 --cp 4" [tp2sp]="2 --tp 2 --sp" [cp2tp2sp]="4 --cp 2 --tp 2 --sp"
    [pp2]="2 --pp 2" [pp4]="4 --pp 4" [cp2pp2]="4 --cp 2 --pp 2"
    [cp2v]="2 --cp 2 --vision-dp-over-cp" [cp4v]="4 --cp 4 --vision-dp-over-cp"
    [cp2tp2spv]="4 --cp 2 --tp 2 --sp --vision-dp-over-cp"
    [cp2pp2v]="4 --cp 2 --pp 2 --vision-dp-over-cp"
)
for name; do
    [ -n "${cases[$name]}" ] || { echo "unknown case $name; there are ${!cases[*]}" >&2 && exit 2; }
done
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
results="$folder/results.jsonl"
failed=
for positions in rope learned_absolute; do
    script="scripts/parallel_parity.py --reference $folder/$positions.pt --positions $positions"
    "$PYTHON" -W ignore $script >>"$results" || failed=yes
    for name in ${@:-cp2 cp4 tp2sp cp2tp2sp pp2 pp4 cp2pp2 cp2v cp4v cp2tp2spv cp2pp2v}; do
        read -r processes options <<<"${cases[$name]}"
        echo "$positions: $processes processes, $options" >&2
        "$PYTHON" -W ignore -m torch.distributed.run --standalone --nproc-per-node "$processes" \
            $script $options >>"$results" 2>"$folder/errors" ||
            { failed=yes && grep "^\[rank" "$folder/errors" | tail -n 20 >&2; }
    done
done
"$PYTHON" - "$results" <<'END'
import json, sys
print(f"{'case':43} {'positions':17} {'against':19} {'loss':>9} {'gradients':>10}"
      f" {'parameters':>10} {'reads':>7} {'launches':>8}  exact max_seqlen")
for line in open(sys.argv[1]):
    if line.startswith("{"):
        r = json.loads(line)
        counts = ("/".join(map(str, r[name])) for name in ("reads", "launches"))
        print(f"{r['case']:43} {r['positions']:17} {r['against']:19} {r['loss']:9.1e} "
              f"{r['gradient']:10.1e} {r['parameters']:10} {next(counts):>7} {next(counts):>8}  "
              f"{'yes' if r['exact_max_seqlen'] else 'NO'}")
END
if [ -n "$failed" ]; then
    echo "FAILED: a case failed or differs by more than 1e-5" >&2
    exit 1
fi
