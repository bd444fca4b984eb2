#!/usr/bin/env bash
# Everything that needs a GPU, in one call: bench/gpu.sh OUTDIR [STEP...]
#
# Builds the CUDA part for this GPU, runs the tests marked `gpu`, compute-sanitizer on small shapes, tunes the Triton
# GEMMs, and runs the kernel benchmarks, the most important first; only the named steps where some are named. Logs,
# tables and JSON go to OUTDIR. A step that fails does not stop the others; the summary names it, and the exit status is
# 1. A step is one line at the end of this file: `step NAME SECONDS COMMAND...`, SECONDS its limit. No step
# starts after SLICEGPT_GPU_SECONDS (default 1500), except the page of results, which is always made. A step that takes too
# long is interrupted and keeps what it has measured. PYTHON chooses the interpreter.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUTDIR [STEP...]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
wanted=" $* "
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
budget=${SLICEGPT_GPU_SECONDS:-1500}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    { echo "bench/gpu.sh: torch finds no CUDA device" >&2; exit 2; }

failed=()
summary=$out/summary.txt
: >"$summary"

step() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) began=$SECONDS status
    shift 2
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
    if [ "$left" -lt 5 ]; then
        status=skipped
    else
        [ "$left" -lt "$limit" ] && limit=$left
        timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
        case $? in 0) status=ok ;; 124 | 137) status="stopped after $limit s" ;; *) status=failed ;; esac
    fi
    [ "$status" = ok ] || failed+=("$name")
    printf '%-24s %5d s  %s\n' "$name" $((SECONDS - began)) "$status" | tee -a "$summary"
    [ "$status" = ok ] || tail -n 15 "$out/$name.log" 2>/dev/null | sed 's/^/    /'
}

# compute-sanitizer's tools on the small shapes of the kernels' own tests; it exits with 9 on a finding. Every tensor has
# an allocation of its own, or memcheck sees nothing that stays inside PyTorch's 2 MiB segments.
sanitize() {
    local tool=$1
    shift
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all --launch-timeout 0 \
        "$python" -m pytest -q -p no:cacheprovider "$@"
}
export -f sanitize
export python

# Compile for this GPU only: a minute instead of two.
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
[ "$capability" = 9.0 ] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} SLICEGPT_CUDA=1

# The tuned configurations are written beside the kernels, so that later steps use them, and copied to OUTDIR.
tune() {
    local status=0
    "$python" -m slicegpt.bench.kernels.tune_rotation "$@" || status=$?
    cp kernels/tuned_sm*.json "$out" || status=$?
    return $status
}
export -f tune
export out

# Most of the tests' time is Triton compiling: in parallel where pytest-xdist is installed.
workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 4")
rotation="$python -m slicegpt.bench.kernels.bench_rotation"
bench="$python -m slicegpt bench"
seven="--shape llama-2-7b --slice 0,0.25"
step build 180 "$python" setup.py build_ext --inplace
step environment 60 "$python" -c 'import sys; from slicegpt.cli import main; sys.exit(main())' env
step tests 240 "$python" -m pytest -q -m gpu $workers tests --ignore=tests/kernels --ignore=tests/ops
step tests_triton 240 "$python" -m pytest -q -m gpu $workers tests/kernels tests/ops
step tune 270 bash -c 'tune --models llama-2-7b --seconds 240'
step bench_rotation 270 $rotation --seconds 240 --json "$out/bench_rotation.json"
step bench_gram 220 "$python" -m slicegpt.bench.kernels.bench_gram --json "$out/bench_gram.json"
step bench_attention 60 "$python" -m slicegpt.bench.kernels.bench_attention --json "$out/bench_attention.json"
step memcheck 90 bash -c 'sanitize memcheck tests/csrc/test_gram.py -m gpu -k "cuda and (127-63 or strides or weights or arrive)"'
step memcheck_wgmma 60 bash -c 'sanitize memcheck tests/csrc/test_residue_wgmma.py -m gpu -k "cuda and (any_values or (forwards and (191-130 or 1300-300)))"'
step racecheck 90 bash -c 'sanitize racecheck tests/csrc/test_gram.py -m gpu -k "cuda and 70-130"'
step memcheck_gemm 90 bash -c 'sanitize memcheck tests/kernels -m gpu -k "test_gpu and 37 and (silu_gated or True) and not every"'
step memcheck_attention 60 bash -c 'sanitize memcheck tests/ops/test_decode_attention.py -m gpu -k "on_the_gpu and auto and (small or phi)"'
step memcheck_decode 90 bash -c 'sanitize memcheck tests/csrc/test_decode.py -m gpu -k "cuda and (strides or factor or splits)"'
step racecheck_decode 90 bash -c 'sanitize racecheck tests/csrc/test_decode.py -m gpu -k "cuda and (splits or factor)"'
step token_7b 180 $bench token $seven,0.5 --engines hf,hf-generate,hf-compile,plain,fused --json "$out/token-7b.json" --csv "$out/token-7b.csv"
step layers_7b 90 $bench layers $seven,0.5 --json "$out/layers-7b.json" --trace "$out/layers-7b.trace"
step throughput_7b 180 $bench throughput $seven,0.5 --engines hf,fused --steps 16 --json "$out/throughput-7b.json"
step token_cold_7b 90 $bench token $seven --engines hf,fused --cold-l2 --tokens 64 --json "$out/token-cold-7b.json"
step layers_13b 90 $bench layers --shape llama-2-13b --slice 0,0.25,0.5 --json "$out/layers-13b.json"
step slicing_1b 150 $bench slicing --shape llama-1b --slice 0.25 --nsamples 16 --json "$out/slicing-1b.json"
# The compiled baseline in a step of its own: every batch is compiled separately.
step throughput_compiled_7b 240 $bench throughput --shape llama-2-7b --slice 0 --engines hf-compile,fused --steps 16 --rounds 1 --json "$out/throughput-compiled-7b.json"
step pytest_benchmark 120 "$python" -m pytest bench --benchmark-only -q -k "(test_gram and D4096 and bfloat16) or (test_rotation and llama-2-7b-25-compact and T1)" --benchmark-json "$out/pytest-benchmark.json"
step bench_rotation_70b 150 $rotation --models llama-2-70b --slices 0.25 --seconds 120 --json "$out/bench_rotation_70b.json"
step bench_rotation_opt 150 $rotation --models opt-66b phi-2 --slices 0.25 --seconds 120 --json "$out/bench_rotation_opt.json"
budget=$((SECONDS + 60)) step report 60 $bench report "$out"

echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" | tee -a "$summary"
    exit 1
fi
echo "all steps passed in $SECONDS s" | tee -a "$summary"
