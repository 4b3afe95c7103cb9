#!/usr/bin/env bash
# Check and measure the models on a GPU, in one call of at most 8 minutes. Needs only torch, torchvision and timm.
#
#     tools/gpu_check.sh OUTPUT_DIR
#
# The parts, in this order: comparison with results on a CPU, speed of the spectral mixers in half precision and
# float32, speed of this project's and timm's models (eager), a short training run, the same speeds compiled, training
# over NCCL. Each result is a line of OUTPUT_DIR/PART.log as soon as it is measured; OUTPUT_DIR/results.jsonl collects
# them after each part. A part that fails or times out does not stop the others; the exit status is the number of such
# parts. PYTHON sets the interpreter. DEVICE=cpu runs all parts with small sizes, to test the script.
set -u
cd "$(dirname "$0")/.."
mkdir -p "${1:?usage: tools/gpu_check.sh OUTPUT_DIR}"
output=$(cd "$1" && pwd)
python=${PYTHON:-python}
device=${DEVICE:-cuda}
small=
if [ "$device" = cpu ]; then
    small=--small
    export OMP_NUM_THREADS=1 # on a busy machine, threads wait for each other
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
    # shellcheck disable=SC2086  # without --small, $small must expand to nothing
    timeout -k 5 "$limit" "$python" -m tools.gpu_check "$name" "$output" --device "$device" $small \
        > "$output/$name.log" 2>&1
    status=$?
    grep '^{' "$output/$name.log" >> "$output/results.jsonl"
    ((status != 0)) && failures=$((failures + 1))
    echo "   exit status $status after $((SECONDS - began)) s; the end of $output/$name.log:"
    tail -n 12 "$output/$name.log"
done
exit "$failures"
