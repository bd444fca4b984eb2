#!/usr/bin/env bash
# Everything that needs a GPU, in three calls: bench/gpu.sh [--rehearse] OUTDIR PHASE [STEP...]
#
# PHASE is 1, 2 or 3; each ends within SLICEGPT_GPU_SECONDS (560), the most important first. All logs, tables and JSON
# files are in one archive, OUTDIR/gpu-PHASE.tar.gz, written anew after every step, and every few seconds while one
# runs: whatever ends the call, what was measured is in OUTDIR.
#
# 1  ceilings, build, smoke tests, covariances, time per token at 0 and 25 %, one layer
# 2  tuning, the fused GEMMs, throughput, tokens with a cold cache, attention
# 3  compute-sanitizer, all GPU tests, compiled baselines, ncu, 13B and other shapes
#
# A step that fails does not stop the others, but a failed test stops the benchmarks of what it tests. A step that takes
# too long is interrupted and keeps what it has measured. Only the named steps run where some are named. A step that
# has ended well with these sources is not repeated: remove SLICEGPT_GPU_WORK (build/gpu), where everything is written.
# The exit status is 1 where a step has failed.
#
# Compile the kernels on a machine with nvcc and no GPU, and carry them: TORCH_CUDA_ARCH_LIST=9.0a SLICEGPT_CUDA=1
# SLICEGPT_OBJECTS=build/objects python setup.py build_ext. The build step links what it finds there. Triton's cache is
# build/triton; bench/kernels/warm_triton.py says when one from elsewhere is of use.
#
# --rehearse needs no GPU: every step runs with a tiny model, or a stand-in where it cannot. PYTHON chooses the
# interpreter. A step is one line at the end of this file: `step NAME SECONDS "STEPS IT NEEDS" COMMAND...`.
set -uo pipefail
rehearse=
[ "${1-}" != --rehearse ] || { rehearse=1 && shift; }
[ $# -ge 2 ] && [[ $2 == [123] ]] || { sed -n '2,24s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1" || exit 2
target=$(cd "$1" && pwd)
phase=$2
shift 2
wanted=" $* "
cd "$(dirname "$0")/.." || exit 2
export python=${PYTHON:-python3}
budget=${SLICEGPT_GPU_SECONDS:-560}
[ -n "$rehearse" ] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    { echo "bench/gpu.sh: torch finds no CUDA device" >&2; exit 2; }

# Results of other sources are not these: a folder for each state of them. Tuned configurations are results.
sources=$(find bench csrc kernels slicegpt setup.py -type f ! -name '*.so' ! -name '*.pyc' ! -name 'tuned_*' ! -path 'bench/results/*' \
    -exec sha256sum {} + | sort | sha256sum | cut -c1-12)
work=${SLICEGPT_GPU_WORK:-build/gpu}
mkdir -p "$work" || exit 2
export out=$(cd "$work" && pwd)/${rehearse:+rehearsal-}$sources
mkdir -p "$out/steps"
summary=$out/summary-$phase.txt
: >"$summary"
failed=()

# The archive is whole at any time: the new one takes the old one's place when it is written, and only then. An archive
# that a killed shell has left to itself is another file, so that it spoils nothing.
pack() {
    local part status
    rm -f "$target"/.gpu-$phase.??????
    part=$(mktemp "$target/.gpu-$phase.XXXXXX") || return
    find "$out" -type f -size -48M ! -path '*/tiny-llama/*' -printf '%P\0' |
        tar --null --ignore-failed-read -C "$out" -czf "$part" -T - 2>/dev/null
    status=$?
    # 1: a file changed or vanished while it was read.
    if [ $status -le 1 ]; then mv -f "$part" "$target/gpu-$phase.tar.gz"; else rm -f "$part"; fi
}
pack_often() {
    local parent=$1
    while sleep "${SLICEGPT_GPU_PACK_SECONDS:-10}" && kill -0 "$parent" 2>/dev/null; do pack; done
}

stop_packer() {
    [ -n "$packer" ] || return 0
    kill "$packer" 2>/dev/null
    wait "$packer" 2>/dev/null
    packer=
}

state() { cat "$out/steps/$1" 2>/dev/null; }

end_step() {
    local name=$1 status=$2 seconds=$3
    [ "$status" = "ok, before" ] || echo "$status" >"$out/steps/$name"
    [[ $status == ok* ]] || failed+=("$name")
    printf '%-24s %5d s  %s\n' "$name" "$seconds" "$status" | tee -a "$summary"
    [[ $status == ok* || $status == "not run"* ]] || tail -n 15 "$out/$name.log" 2>/dev/null | sed 's/^/    /'
    pack
}

step() {
    local name=$1 limit=$2 needs=$3 left=$((budget - SECONDS)) began=$SECONDS status need
    shift 3
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
    [ "$(state "$name")" != ok ] || { end_step "$name" "ok, before" 0; return; }
    for need in $needs; do
        [[ $(state "$need") != failed && $(state "$need") != stopped* ]] ||
            { end_step "$name" "not run: $need $(state "$need")" 0; return; }
    done
    # Without a GPU, and beside other work, everything takes longer.
    [ -z "$rehearse" ] || limit=$((5 * limit))
    [ "$left" -ge 8 ] || { end_step "$name" "not run: no time left" 0; return; }
    [ "$left" -lt "$limit" ] && limit=$left
    echo running >"$out/steps/$name"
    pack_often $$ >/dev/null 2>&1 &
    packer=$!
    timeout --signal=INT --kill-after=8 "$limit" "$@" >"$out/$name.log" 2>&1
    case $? in 0) status=ok ;; 124 | 137) status="stopped after $limit s" ;; *) status=failed ;; esac
    stop_packer
    end_step "$name" "$status" $((SECONDS - began))
}

# Clocks, power and the reasons for slower clocks, once a second beside everything that is measured.
watch_clocks() {
    local fields=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu,clocks_throttle_reasons.active
    command -v nvidia-smi >/dev/null || return 0
    nvidia-smi --query-gpu=$fields --format=csv -l 1 >"$out/clocks-$phase.csv" 2>&1 &
    clocks=$!
}
clocks= packer=
trap '[ -z "$clocks" ] || kill "$clocks" 2>/dev/null; stop_packer; pack' EXIT
trap 'exit 1' TERM HUP
watch_clocks

# --- commands --------------------------------------------------------------------------------------------------------

# What cannot run without a GPU says so, and takes a moment.
gpu_only() {
    [ -n "$rehearse" ] || { "$@"; return; }
    echo "stand-in for: $*"
    sleep 0.2
}
pytest() { gpu_only "$python" -m pytest -q -p no:cacheprovider -m gpu "$@"; }

# compute-sanitizer exits with 9 on a finding. Every tensor has an allocation of its own, or memcheck sees nothing that
# stays inside PyTorch's 2 MiB segments.
sanitize() {
    local tool=$1
    shift
    [ -n "$rehearse" ] || command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 gpu_only compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --target-processes all --launch-timeout 0 "$python" -m pytest -q -p no:cacheprovider -m gpu "$@"
}

# The report of one kernel; the clocks are left alone.
profile() {
    local kernel=$1
    shift
    [ -n "$rehearse" ] || command -v ncu >/dev/null || { echo "ncu is not installed"; return 1; }
    gpu_only ncu --clock-control none --set full -k "regex:$kernel" --launch-skip 2 -c 1 -f -o "$out/ncu-$kernel" \
        "$python" -m slicegpt.bench.kernels.one_launch "$@"
}

# The tuned configurations are written beside the kernels, so that later steps use them, and kept with the results.
tune() {
    local status=0
    gpu_only "$python" -m slicegpt.bench.kernels.tune_rotation "$@" || status=$?
    cp kernels/tuned_sm*.json "$out" 2>/dev/null || [ -n "$rehearse" ] || status=1
    return $status
}

# Results of a step go to a file of its name.
bench() {
    local name=$1 command=$2
    shift 2
    "$python" -m slicegpt bench "$command" "$@" --json "$out/$name.json"
}
kernel() {
    local name=$1 module=$2
    shift 2
    "$python" -m "slicegpt.bench.kernels.$module" "$@" --json "$out/$name.json"
}
export -f gpu_only pytest sanitize profile tune bench kernel
export rehearse

# `run FUNCTION ...` is a command that `timeout` can start.
run() { printf '%q ' "$@"; }
shell() {
    local name=$1 limit=$2 needs=$3
    shift 3
    step "$name" "$limit" "$needs" bash -c "$(run "$@")"
}

# Code for this GPU only.
if [ -n "$rehearse" ]; then
    export CUDA_VISIBLE_DEVICES=
    tiny=$out/tiny-llama
    [ -d "$tiny" ] || "$python" -m slicegpt.bench.commands.rehearsal --model "$tiny" >/dev/null || exit 2
    seven=(--model "$tiny" --round-to 8) thirteen=(--model "$tiny" --round-to 8) one_b=(--model "$tiny" --round-to 8)
    short=(--tokens 4 --prompt 4 --rounds 2) layer=(--seqlen 8 --repeats 2)
    batches=(--seqlen 16 --steps 2 --rounds 1 --max-batch 4) cut=(--nsamples 2 --seqlen 16)
    sizes=(--tiny --repeats 1) covariances=(--quick --columns 64 --tokens 256 --repeats 1 --no-memory)
    check=(--shape smollm2-135m --replays 2 --layers 1 --batches 1) rows=(--rows 1 32) heads=(--tokens 8 --batch 1 --models phi-2 --repeats 1)
    gemms=(--models smollm2-135m --rounds 1 --no-compile --shortcuts compact dense --slices 0.25) seventy=("${gemms[@]}")
else
    capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    [ "$capability" != 9.0 ] || capability=9.0a
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} SLICEGPT_CUDA=1
    export SLICEGPT_OBJECTS=${SLICEGPT_OBJECTS:-build/objects} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
    seven=(--shape llama-2-7b) thirteen=(--shape llama-2-13b) one_b=(--shape llama-1b)
    short=() layer=() batches=(--steps 16) cut=(--nsamples 16) sizes=() covariances=(--quick --repeats 3) check=()
    rows=(--rows 1 8192) heads=() gemms=(--models llama-2-7b --seconds 100) seventy=(--models llama-2-70b --slices 0.25 --seconds 100)
    # An earlier phase's.
    cp "$out"/tuned_sm*.json kernels/ 2>/dev/null
fi
export SLICEGPT_CEILINGS=$out/ceilings.json
[ -s "$SLICEGPT_CEILINGS" ] || unset SLICEGPT_CEILINGS
xdist=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 4")

. bench/gpu_steps.sh

step summary_$phase 30 "" "$python" -m slicegpt.bench.commands.gpu_summary "$out"
cat "$out/summary_$phase.log" 2>/dev/null
echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" | tee -a "$summary"
    exit 1
fi
echo "all steps of phase $phase passed in $SECONDS s" | tee -a "$summary"
