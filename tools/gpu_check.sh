#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the tests marked cuda, the benchmark against peers, then training
# on real images with one recipe for all models.
#
#     tools/gpu_check.sh OUTPUT_DIR [DATA_DIR]
#
# DATA_DIR is a folder with train/ and val/ (CIFAR-10 as JPEGs, say); without it nothing is trained. PYTHON, EPOCHS
# and MODELS can be set. Each part goes on when another failed; the exit status counts the failures.
set -u
cd "$(dirname "$0")/.."
output=${1:?usage: tools/gpu_check.sh OUTPUT_DIR [DATA_DIR]}
data=${2:-}
python=${PYTHON:-python}
mkdir -p "$output"
failures=0

part() {  # part NAME COMMAND...: run, keep the output, report
    local name=$1
    shift
    echo "== $name: $*"
    if ! "$@" > "$output/$name.log" 2>&1; then
        failures=$((failures + 1))
        echo "   failed; the end of $output/$name.log:"
    fi
    tail -n 15 "$output/$name.log"
}

part tests "$python" -m pytest -q -m cuda tests
part benchmark "$python" -m tools.benchmark --suite cuda --json "$output/benchmark_cuda.json"
# How the spectral mixers are best computed in half precision: this prints the table, and chooses nothing.
part layers "$python" -m tools.benchmark --suite cuda-layers --json "$output/benchmark_cuda_layers.json"
if [ -n "$data" ]; then
    for model in ${MODELS:-spectformer_ti svt_h_s deit_tiny_patch16_224 pvt_v2_b1}; do
        part "train_$model" "$python" main_spectformer.py --arch "$model" --data-set FOLDER --data-path "$data" \
            --epochs "${EPOCHS:-5}" --warmup-epochs 1 --batch-size 256 --num-workers 8 --reprob 0 \
            --output-dir "$output/$model"
        part "row_$model" tail -n 1 "$output/$model/log.txt"
    done
fi
exit "$failures"
