// The kernels for AMX-BF16 (Sapphire Rapids and later): bfloat16 in matrix tiles; one to three tokens, and all else, is
// AVX-512's. (Products of pairs lose on these processors, see bindings.cpp.)
#if defined(__x86_64__) || defined(_M_X64)
#include "decode.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <math.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "scratch.h"

#define SLICEGPT_MASKED_LOADS

namespace slicegpt {
namespace cpu {
namespace {

#include "values.h"
#include "simd_avx512.h"
#include "activation.h"
#include "product.h"
#include "kernels.h"
#include "tiles.h"
#include "gram_amx.h"

// With fewer tokens reading the weights is all that takes time, and rows are read in a better order.
constexpr int64_t kFewestTokens = 4;

void norm_linear_of(Dtype dtype, const NormLinear& op, int thread, int threads) {
    if (op.quantized.data) return avx512_bf16()->norm_linear(dtype, op, thread, threads);
    if (dtype != Dtype::kBfloat16 || op.tokens < kFewestTokens) return kAvx512.norm_linear(dtype, op, thread, threads);
    norm_linear<TileProduct>(op, thread, threads);
}

void rotate_add_of(Dtype dtype, const RotateAdd& op, int thread, int threads) {
    if (op.quantized.data) return avx512_bf16()->rotate_add(dtype, op, thread, threads);
    if (dtype != Dtype::kBfloat16 || op.tokens < kFewestTokens) return kAvx512.rotate_add(dtype, op, thread, threads);
    rotate_add<TileProduct>(op, thread, threads);
}

// Whether the processor has the tiles, and the kernel of the operating system lets this process use them, which has to
// be asked for once (Documentation/arch/x86/xstate.rst).
bool have_tiles() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    if (!(edx & kAmxBf16) || !(edx & kAmxTile) || !avx512_bf16()) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return ::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const Kernels* amx() {
    static const bool have = have_tiles();
    static const Kernels kernels{"amx",          norm_linear_of,    kAvx512.finish,    rotate_add_of, kAvx512.row_sums,
                                 kAvx512.attend, kAvx512.gram_fp64, kAvx512.gram_fast, &kTileGram};
    return have ? &kernels : nullptr;
}

}  // namespace cpu
}  // namespace slicegpt
#else
namespace slicegpt {
namespace cpu {
const Kernels* amx() { return nullptr; }
}  // namespace cpu
}  // namespace slicegpt
#endif
#endif
