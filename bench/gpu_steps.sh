# The steps of bench/gpu.sh, which reads this file: what is measured, in what order, within what time. A line is
# `step NAME SECONDS "STEPS IT NEEDS" COMMAND...`, or `shell` with a function of bench/gpu.sh as the command. A step
# whose need has failed is not run; one whose need has not run at all, is.

# Every phase may find a new machine: what is there already takes a second.
if [ "$phase" = 1 ]; then
    shell ceilings 60 "" kernel ceilings ceilings "${sizes[@]}"
    [ -s "$out/ceilings.json" ] && export SLICEGPT_CEILINGS=$out/ceilings.json
fi
shell build 170 "" gpu_only "$python" setup.py build_ext --inplace
[ -n "$rehearse" ] || [ "$(state build)" != ok ] || ls slicegpt/_C*.so >/dev/null 2>&1 || {
    # A machine that another phase has left: its results are here, its build is not.
    rm "$out/steps/build"
    shell build 170 "" gpu_only "$python" setup.py build_ext --inplace
}

case $phase in
1)
    # What the steps below will launch, compiled by all cores and not by one step after the other.
    shell warm_triton 90 "" gpu_only "$python" -m slicegpt.bench.kernels.warm_triton
    # Right before fast. wgmma, mma.sync and integers agree to the bit; then the others against float64.
    shell smoke_wgmma 40 build pytest tests/csrc/test_residue_wgmma.py -x -k "cuda and (equals_integers or used_again)"
    shell smoke_gram 40 build pytest tests/csrc/test_gram.py -x -k "cuda and (127-63 or weights)"
    shell smoke_decode 40 build pytest tests/csrc/test_decode.py -x -k "cuda and (strides or factor or splits)"
    shell smoke_gemm 60 build pytest tests/kernels -x $xdist -k "test_gpu and 37 and (silu_gated or True) and not every"
    shell smoke_overlap 50 smoke_decode kernel smoke_overlap overlap_check "${check[@]}"
    shell smoke_2_4 30 "" gpu_only "$python" -m slicegpt.bench.kernels.one_launch sparse_2_4
    step environment 30 "" "$python" -m slicegpt env
    # Without the kernels that have just been found wrong.
    wgmma=("gram_ exact, wgmma" "gram_ exact, wgmma-pairs")
    shell bench_gram 80 smoke_gram kernel bench_gram bench_gram "${covariances[@]}" --no-eigensolver \
        --methods published "float64 product" "gram_ fp64" "gram_ exact" "gram_ fast"
    shell token_7b_0 60 "smoke_decode smoke_gemm" bench token_7b_0 token "${seven[@]}" --slice 0 --engines fused,hf "${short[@]}"
    shell token_7b_25 60 "smoke_decode smoke_gemm" bench token_7b_25 token "${seven[@]}" --slice 0.25 --engines fused "${short[@]}"
    shell bench_gram_wgmma 60 "smoke_wgmma smoke_gram" kernel bench_gram_wgmma bench_gram "${covariances[@]}" --no-eigensolver \
        --methods "float64 product" "gram_ exact" "${wgmma[@]}"
    sparse=()
    [ "$(state smoke_2_4)" = ok ] || sparse=(--no-sparse)
    shell layers_7b 90 "smoke_gemm" bench layers_7b layers "${seven[@]}" --slice 0,0.25,0.5 "${layer[@]}" "${sparse[@]}"
    # The same without overlapping kernels: what programmatic dependent launch is worth.
    export SLICEGPT_PDL=0
    shell token_7b_0_serial 45 "smoke_decode" bench token_7b_0_serial token "${seven[@]}" --slice 0 --engines fused "${short[@]}"
    shell token_7b_25_serial 45 "smoke_decode" bench token_7b_25_serial token "${seven[@]}" --slice 0.25 --engines fused "${short[@]}"
    unset SLICEGPT_PDL
    shell bench_gram_heavy 60 smoke_gram kernel bench_gram_heavy bench_gram "${covariances[@]}" --no-eigensolver --values heavy \
        --methods "float64 product" "gram_ fp64" "gram_ exact"
    ;;
2)
    shell tune 210 smoke_gemm tune --models llama-2-7b --seconds 180
    # rotate_add of many rows by wgmma: exact products of integers first. Without it the benchmark leaves it out.
    shell smoke_rotate_wgmma 40 build pytest tests/csrc/test_rotate_wgmma.py -x -k cuda
    [ "$(state smoke_rotate_wgmma)" = ok ] || export SLICEGPT_ROTATE_PREFILL=fused
    shell bench_rotation 150 smoke_gemm kernel bench_rotation bench_rotation "${gemms[@]}" "${rows[@]}"
    unset SLICEGPT_ROTATE_PREFILL
    # rotate_add at 25 % has fewer blocks than there are multiprocessors: split in two.
    export SLICEGPT_ROTATE_SPLIT=2
    shell bench_rotation_split 60 smoke_decode kernel bench_rotation_split bench_rotation "${gemms[@]}" --rows 1 --no-compile
    unset SLICEGPT_ROTATE_SPLIT
    shell throughput_7b_0 60 smoke_gemm bench throughput_7b_0 throughput "${seven[@]}" --slice 0 --engines fused "${batches[@]}"
    shell throughput_7b_25 60 smoke_gemm bench throughput_7b_25 throughput "${seven[@]}" --slice 0.25 --engines fused "${batches[@]}"
    shell throughput_7b_hf 60 "" bench throughput_7b_hf throughput "${seven[@]}" --slice 0 --engines hf "${batches[@]}"
    shell throughput_7b_50 60 smoke_gemm bench throughput_7b_50 throughput "${seven[@]}" --slice 0.5 --engines fused "${batches[@]}"
    shell token_7b_50 45 smoke_decode bench token_7b_50 token "${seven[@]}" --slice 0.5 --engines fused "${short[@]}"
    shell token_cold_7b_0 45 smoke_decode bench token_cold_7b_0 token "${seven[@]}" --slice 0 --engines fused,hf --cold-l2 "${short[@]}"
    shell token_cold_7b_25 45 smoke_decode bench token_cold_7b_25 token "${seven[@]}" --slice 0.25 --engines fused --cold-l2 "${short[@]}"
    shell bench_attention 60 smoke_decode kernel bench_attention bench_attention "${heads[@]}"
    ;;
3)
    shell memcheck 60 build sanitize memcheck tests/csrc/test_gram.py -k "cuda and (127-63 or strides or weights or arrive)"
    shell memcheck_wgmma 60 build sanitize memcheck tests/csrc/test_residue_wgmma.py -k "cuda and (any_values or (forwards and (191-130 or 1300-300)))"
    shell memcheck_rotate_wgmma 60 build sanitize memcheck tests/csrc/test_rotate_wgmma.py -k "cuda and (dense_shortcut or residual)"
    shell racecheck 60 build sanitize racecheck tests/csrc/test_gram.py -k "cuda and 70-130"
    shell memcheck_decode 60 build sanitize memcheck tests/csrc/test_decode.py -k "cuda and (strides or factor or splits)"
    shell racecheck_decode 60 build sanitize racecheck tests/csrc/test_decode.py -k "cuda and (splits or factor)"
    shell memcheck_gemm 60 build sanitize memcheck tests/kernels -k "test_gpu and 37 and (silu_gated or True) and not every"
    shell memcheck_attention 45 build sanitize memcheck tests/ops/test_decode_attention.py -k "on_the_gpu and auto and (small or phi)"
    shell token_7b_compiled 120 "" bench token_7b_compiled token "${seven[@]}" --slice 0 --engines fused,hf-compile,hf-generate-static "${short[@]}"
    shell ncu_gram_exact 40 smoke_gram profile residue_products gram_exact
    shell ncu_gram_fp64 40 smoke_gram profile gram_fp64_tiles gram_fp64
    shell ncu_norm_linear 40 smoke_decode profile norm_linear_decode norm_linear
    shell ncu_rotate_add 40 smoke_decode profile rotate_add_decode rotate_add
    shell token_13b_0 60 smoke_decode bench token_13b_0 token "${thirteen[@]}" --slice 0 --engines fused,hf "${short[@]}"
    shell token_13b_25 60 smoke_decode bench token_13b_25 token "${thirteen[@]}" --slice 0.25 --engines fused "${short[@]}"
    shell layers_13b 90 smoke_gemm bench layers_13b layers "${thirteen[@]}" --slice 0,0.25,0.5 --no-sparse "${layer[@]}"
    shell throughput_compiled_7b 240 "" bench throughput_compiled_7b throughput "${seven[@]}" --slice 0 --engines hf-compile "${batches[@]}" ${rehearse:+--max-batch 1}
    shell tests 240 build pytest $xdist tests --ignore=tests/kernels --ignore=tests/ops
    shell tests_triton 240 build pytest $xdist tests/kernels tests/ops
    shell slicing_1b 150 smoke_gram bench slicing_1b slicing "${one_b[@]}" --slice 0.25 "${cut[@]}"
    shell eigensolver 60 smoke_gram kernel eigensolver bench_gram "${covariances[@]}" --methods "gram_ fp64"
    shell bench_rotation_70b 150 smoke_gemm kernel bench_rotation_70b bench_rotation "${seventy[@]}"
    ;;
esac
