#!/usr/bin/env bash
# This script runs tests and measurements on one H100 or H200 in at most nine minutes. Each result goes into FOLDER as
# soon as it exists.
#
#     benchmarks/on_gpu.sh FOLDER
#     EM_SIZE=tiny EM_DEVICE=cpu benchmarks/on_gpu.sh FOLDER      every line of it, on the CPU
#
# EM_WHEELS is a folder with wheels of the peers and of what they need (wheels/ in the checkout). Peers that are there
# are measured, the others are listed as not run. EM_STEPS names the steps to run ("entropy_loss linear_entropy"), all of
# them by default. EM_SIZE is the size of the suites (small), PYTHON the interpreter. Where the checkout comes without
# its history, EM_COMMIT is what `git describe --always --abbrev=40 --dirty --exclude '*'` says, and EM_BEFORE is a folder
# (before/ in the checkout) that `git archive 2f90a53 em_kernels | tar -x -C before` has filled with the package as it
# was before the fused kernel got its lag.
# The status and the seconds of each step are a line of FOLDER/log.txt. After a step that fails or runs out of time the
# next one runs, and the exit status is 1.
set -u
if [ $# -ne 1 ]; then
    echo "on_gpu.sh: one argument expected, the folder for the results, given $#" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} size=${EM_SIZE:-small} device=${EM_DEVICE:-cuda} wheels=${EM_WHEELS:-wheels}
before=${EM_BEFORE:-before} before_commit=2f90a53
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
SECONDS=0 failed=0
# Ten seconds of the nine minutes are for what follows the last step. Without a GPU the steps take longer.
total=$([ "$device" = cpu ] && echo 1800 || echo 530)
# Each step is sure to get this many seconds, and those that it leaves go to the next step.
declare -A seconds=([build]=20 [wheels]=40 [gpu-tests]=65 [contract-tests]=40 [tune_tiles]=45 [entropy_loss]=80
    [fused_before_lag]=30 [linear_entropy]=60 [token_stats]=30 [training_step]=40 [host_overhead]=20
    [sharded-training]=60)

wanted() { case " build wheels ${EM_STEPS:-$1} " in *" $1 "*) ;; *) return 1 ;; esac }

if [ -e em_kernels/_entropy_cpu.so ]; then unset 'seconds[build]'; fi
if [ ! -d "$wheels" ]; then unset 'seconds[wheels]'; fi
if [ ! -d "$before/em_kernels" ]; then
    before=$temporary/before
    mkdir "$before"
    git archive "$before_commit" em_kernels 2>/dev/null | tar -x -C "$before" 2>/dev/null
fi
if [ ! -d "$before/em_kernels" ]; then
    unset 'seconds[fused_before_lag]'
    if wanted fused_before_lag; then
        echo "fused_before_lag is not run: neither the history, which has commit $before_commit, is here, nor EM_BEFORE" |
            tee -a "$folder/log.txt"
    fi
fi

reserved=0
for name in "${!seconds[@]}"; do if wanted "$name"; then reserved=$((reserved + seconds[$name])); fi; done

step() { # name, command...
    local name=$1 start=$SECONDS limit status
    shift
    if ! wanted "$name"; then return; fi
    reserved=$((reserved - seconds[$name]))
    limit=$((total - SECONDS - reserved))
    if [ "$limit" -le 0 ]; then
        printf '%s\tno time left\t0\n' "$name" | tee -a "$folder/log.txt"
        failed=1
        return
    fi
    printf '\n== %s: %s\n' "$name" "$*" >>"$folder/log.txt"
    timeout --kill-after=5 "$limit" "$@" >>"$folder/log.txt" 2>&1
    status=$?
    if [ "$status" -ne 0 ]; then failed=1; fi
    printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) | tee -a "$folder/log.txt"
}

suite() {
    step "$1" "$python" benchmarks --suite "$1" --out "$folder" --size "$size" --device "$device"
}

# The compiled kernels serve the CPU part of the tests and of the numbers. Without them everything runs, more slowly.
if [ ! -e em_kernels/_entropy_cpu.so ]; then
    step build "$python" setup.py build_ext --inplace
fi
if [ -d "$wheels" ]; then
    # The wheels go into an environment of their own, which sees the machine's packages too. A folder on PYTHONPATH
    # would not do: some wheels share a folder or bring a .pth file. Each wheel is installed alone, so that one that does
    # not fit takes no other with it.
    peers=$temporary/peers
    step wheels bash -c '"$1" -m venv --without-pip --system-site-packages "$2" || exit 1
        here=$("$2/bin/python" -c "import sysconfig; print(sysconfig.get_path(\"purelib\"))")
        "$1" -c "import site; [print(f\"import site; site.addsitedir({folder!r})\") for folder in site.getsitepackages()]" \
            >"$here/machine.pth"
        status=0
        for wheel in "$3"/*.whl; do
            "$1" -m pip --python "$2/bin/python" install --quiet --no-index --no-deps --no-compile "$wheel" || status=1
        done
        exit $status' _ "$python" "$peers" "$wheels"
    if [ -x "$peers/bin/python" ]; then python=$peers/bin/python; fi
fi

sharded=tests/one_shot/test_sharded_on_gpu.py
step gpu-tests "$python" -m pytest -q -m gpu -p no:cacheprovider tests --ignore "$sharded"
step contract-tests "$python" -m pytest -q -m "not gpu" -p no:cacheprovider -k triton \
    tests/test_entropy.py tests/test_stats.py tests/test_surprises.py tests/test_properties.py \
    tests/test_linear_entropy.py tests/test_linear_stats.py tests/ops/test_backend_contract.py tests/ops/test_logits.py \
    tests/ops/hidden/test_registered.py
# Without a GPU the Triton kernels have to be interpreted.
if [ "$device" = cpu ]; then export TRITON_INTERPRET=1; fi
suite tune_tiles
unset TRITON_INTERPRET
suite entropy_loss
if [ -d "$before/em_kernels" ]; then
    # The earlier package is imported in this step alone, with the benchmarks of this checkout.
    PYTHONPATH=$(cd "$before" && pwd) suite fused_before_lag
fi
suite linear_entropy
suite token_stats
suite training_step
suite host_overhead
step sharded-training "$python" -m pytest -q -m gpu -p no:cacheprovider "$sharded"

tail -c 15000000 "$folder/log.txt" >"$folder/log.tail" && mv "$folder/log.tail" "$folder/log.txt"
exit "$failed"
