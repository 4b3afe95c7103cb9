#!/usr/bin/env bash
# What only a GPU shows, in one call of at most 8 minutes, with torch, torchvision and timm alone.
#
#     tools/gpu_check.sh OUTPUT_DIR
#
# The most important questions come first: are the results those of a CPU, which formulation of the spectral mixers
# is the fastest, how fast are the models beside their peers (eager, compiled), does training learn, does it run
# over NCCL. Every result is a line of OUTPUT_DIR/results.jsonl as soon as it is measured. A part that fails or runs
# out of time does not stop the others; the exit status counts them. PYTHON names the interpreter; DEVICE=cpu
# rehearses all parts with small sizes.
set -u
cd "$(dirname "$0")/.."
mkdir -p "${1:?usage: tools/gpu_check.sh OUTPUT_DIR}"
output=$(cd "$1" && pwd)
python=${PYTHON:-python}
device=${DEVICE:-cuda}
small=
if [ "$device" = cpu ]; then
    small=--small
    export OMP_NUM_THREADS=1 # two threads on a busy machine wait for each other
fi
deadline=$((SECONDS + ${LIMIT:-470}))
failures=0

for part in parity:60 gates:80 eager:80 train:70 compiled:150 distributed:80; do
    name=${part%:*} limit=${part#*:} left=$((deadline - SECONDS)) began=$SECONDS
    limit=$((limit < left ? limit : left))
    if ((limit < 10)); then
        echo "== $name: not started, no time left"
        failures=$((failures + 1))
        continue
    fi
    echo "== $name (at most $limit s)"
    # shellcheck disable=SC2086  # an empty --small is no argument
    timeout -k 5 "$limit" "$python" -m tools.gpu_check "$name" "$output" --device "$device" $small \
        > "$output/$name.log" 2>&1
    status=$?
    ((status != 0)) && failures=$((failures + 1))
    echo "   exit status $status after $((SECONDS - began)) s; the end of $output/$name.log:"
    tail -n 12 "$output/$name.log"
done
exit "$failures"
