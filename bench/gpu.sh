#!/usr/bin/env bash
# Everything that wants a GPU, in one call: bench/gpu.sh OUTDIR
#
# Builds the CUDA part for this GPU, runs the tests marked `gpu`, compute-sanitizer on small shapes, and the kernel
# benchmarks. Logs, tables and JSON go to OUTDIR. A step that fails does not stop the others; the summary names it, and
# the exit status is 1. A step is one line at the end of this file: `step NAME SECONDS COMMAND...`, SECONDS its limit.
# The whole run stops starting steps after SLICEGPT_GPU_SECONDS (default 540). PYTHON chooses the interpreter.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bench/gpu.sh OUTDIR" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
budget=${SLICEGPT_GPU_SECONDS:-540}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    { echo "bench/gpu.sh: torch finds no CUDA device" >&2; exit 2; }

failed=()
summary=$out/summary.txt
: >"$summary"

step() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) began=$SECONDS status
    shift 2
    if [ "$left" -lt 5 ]; then
        status=skipped
    else
        [ "$left" -lt "$limit" ] && limit=$left
        timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
        case $? in 0) status=ok ;; 124 | 137) status="stopped after $limit s" ;; *) status=failed ;; esac
    fi
    [ "$status" = ok ] || failed+=("$name")
    printf '%-24s %5d s  %s\n' "$name" $((SECONDS - began)) "$status" | tee -a "$summary"
    [ "$status" = ok ] || tail -n 15 "$out/$name.log" 2>/dev/null | sed 's/^/    /'
}

# compute-sanitizer's tools on the small shapes of the kernels' own tests; it exits with 9 on a finding.
sanitize() {
    local tool=$1
    shift
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all --launch-timeout 0 \
        "$python" -m pytest -q -p no:cacheprovider "$@"
}
export -f sanitize
export python

# Only this GPU's code: a minute instead of two. An editable install needs nothing from an index.
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
[ "$capability" = 9.0 ] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} SLICEGPT_CUDA=1

step build 180 "$python" setup.py build_ext --inplace
step environment 60 "$python" -c 'import sys; from slicegpt.cli import main; sys.exit(main())' env
step tests 240 "$python" -m pytest -q -m gpu tests
step bench_gram 220 "$python" -m slicegpt.bench.bench_gram --json "$out/bench_gram.json"
step memcheck 90 bash -c 'sanitize memcheck tests/csrc/test_gram.py -m gpu -k "cuda and (127-63 or strides or weights or arrive)"'
step racecheck 90 bash -c 'sanitize racecheck tests/csrc/test_gram.py -m gpu -k "cuda and 70-130"'

echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" | tee -a "$summary"
    exit 1
fi
echo "all steps passed in $SECONDS s" | tee -a "$summary"
