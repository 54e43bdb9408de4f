#!/usr/bin/env bash
# Tests and measurements on one H100 or H200 in at most nine minutes, the most important first, all results in FOLDER.
#
#     benchmarks/on_gpu.sh FOLDER
#     EM_SIZE=tiny EM_DEVICE=cpu benchmarks/on_gpu.sh FOLDER      every line of it, on the CPU, within three minutes
#
# A step that fails or runs out of time is recorded in FOLDER/steps.tsv and the next one runs; the exit status is then 1.
# EM_SKIP_TESTS=1 leaves the tests out. EM_COMMIT names the commit where the checkout came without its history. PYTHON is the interpreter.
set -u
if [ $# -ne 1 ]; then
    echo "on_gpu.sh: one argument expected, the folder for the results, given $#" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} size=${EM_SIZE:-default} device=${EM_DEVICE:-cuda}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
SECONDS=0 total=540 failed=0

step() { # name, most seconds, command...
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    # Ten seconds are kept for what follows the last step.
    if [ $((total - 10 - SECONDS)) -lt "$limit" ]; then limit=$((total - 10 - SECONDS)); fi
    if [ "$limit" -le 0 ]; then
        printf '%s\tno time left\t0\n' "$name" >>"$folder/steps.tsv"
        failed=1
        return
    fi
    printf '\n== %s: %s\n' "$name" "$*" >>"$folder/log.txt"
    timeout --kill-after=5 "$limit" "$@" >>"$folder/log.txt" 2>&1
    status=$?
    if [ "$status" -ne 0 ]; then failed=1; fi
    printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) | tee -a "$folder/steps.tsv"
}

# What the CPU numbers and the contract's CPU part need; all of it runs without, more slowly.
if [ ! -e em_kernels/_entropy_cpu.so ]; then
    step build 60 "$python" setup.py build_ext --inplace
fi
if [ -z "${EM_SKIP_TESTS:-}" ]; then
    step gpu-tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider tests
    step contract-tests 100 "$python" -m pytest -q -m "not gpu" -p no:cacheprovider -k triton tests/test_entropy.py tests/test_stats.py tests/test_properties.py tests/ops/test_operators.py \
        tests/test_linear_entropy.py tests/test_linear_stats.py tests/ops/test_linear.py
fi
step entropy_loss 200 "$python" benchmarks/entropy_loss.py --out "$folder" --size "$size" --device "$device"
step linear_entropy 150 "$python" benchmarks/linear_entropy.py --out "$folder" --size "$size" --device "$device"
step host_overhead 60 "$python" benchmarks/host_overhead.py --out "$folder" --size "$size" --device "$device"
# Without a GPU the kernels have to be interpreted.
interpret=$([ "$device" = cpu ] && echo 1 || echo 0)
step tune_tiles 120 env TRITON_INTERPRET="$interpret" \
    "$python" benchmarks/tune_tiles.py --out "$folder" --size "$size" --device "$device"

tail -c 15000000 "$folder/log.txt" >"$folder/log.tail" && mv "$folder/log.tail" "$folder/log.txt"
exit "$failed"
