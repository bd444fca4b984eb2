// The kernels for AVX512-BF16 and AVX512-VNNI: products of bfloat16 are of pairs, those of 16-bit integers are one
// instruction, all else is AVX-512's.
#if defined(__x86_64__) || defined(_M_X64)
#include "decode.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

#include <math.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "scratch.h"

#define SLICEGPT_MASKED_LOADS
#define SLICEGPT_PREFETCH
#define SLICEGPT_EIGHT_SUMS

namespace slicegpt {
namespace cpu {
namespace {

#include "values.h"
#include "simd_avx512.h"
#include "activation.h"
#include "pairs.h"
#include "product.h"
#include "kernels.h"
#include "gram_tiles.h"

void norm_linear_of(Dtype dtype, const NormLinear& op, int thread, int threads) {
    if (dtype != Dtype::kBfloat16) return kAvx512.norm_linear(dtype, op, thread, threads);
    norm_linear_any<RowProduct<RowPairs>>(op, thread, threads);
}

void rotate_add_of(Dtype dtype, const RotateAdd& op, int thread, int threads) {
    if (dtype != Dtype::kBfloat16) return kAvx512.rotate_add(dtype, op, thread, threads);
    rotate_add_any<RowProduct<RowPairs>>(op, thread, threads);
}

// For gram_tiles.h: a column's neighbouring tokens are a pair, the earlier one in the lower half of an item.
inline uint32_t item_of(const Pairs&);
template <>
struct SumsOf<Pairs> {
    using type = Vec;
};
template <>
constexpr int kItemTokens<Pairs> = 2;

void pack_pairs(const Packing& of) {
    const auto* data = static_cast<const uint16_t*>(of.from.data);
    constexpr int kColumns = kPanelColumns<Pairs>, kLanes = Pairs::kLanes;
    for (int64_t first = 0; first < of.from.count; first += kColumns) {
        const int64_t width = least(kColumns, of.from.count - first);
        // `at` is even: kPackedTokens is.
        const int64_t offset = first * (of.run / 2) + of.at / 2 * kColumns;
        for (int64_t t = 0; t < of.count; t += 2) {
            alignas(64) uint16_t room[2][kColumns] = {};
            const uint16_t* rows[2] = {room[0], room[1]};
            for (int64_t i = 0; i < least(2, of.count - t); ++i) {
                const int64_t row = of.rows ? of.rows[of.first + t + i] : of.first + t + i;
                const uint16_t* source = data + row * of.from.row_stride + first * of.from.column_stride;
                if (width == kColumns && of.from.column_stride == 1)
                    rows[i] = source;
                else
                    for (int64_t c = 0; c < width; ++c) room[i][c] = source[c * of.from.column_stride];
            }
            for (int v = 0; v < kVectors; ++v) {
                const auto half = [&](int i) {
                    return _mm512_cvtepu16_epi32(
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + v * kLanes)));
                };
                const __m512i pairs = _mm512_or_si512(half(0), _mm512_slli_epi32(half(1), 16));
                for (void* to : {of.plain, of.weighted})
                    if (to)
                        _mm512_storeu_si512(static_cast<uint32_t*>(to) + offset + t / 2 * kColumns + v * kLanes, pairs);
            }
        }
    }
}

constexpr GramKernels kGram{kPanelColumns<Pairs>, sizeof(Item<Pairs>) / kItemTokens<Pairs>, pack_pairs,
                            multiply_of<Pairs>};

}  // namespace

const Kernels* avx512_bf16() {
    static const Kernels kernels{"avx512_bf16",  norm_linear_of,    kAvx512.finish,    rotate_add_of, kAvx512.row_sums,
                                 kAvx512.attend, kAvx512.gram_fp64, kAvx512.gram_fast, &kGram};
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? &kernels : nullptr;
}

}  // namespace cpu
}  // namespace slicegpt
#else
namespace slicegpt {
namespace cpu {
const Kernels* avx512_bf16() { return nullptr; }
}  // namespace cpu
}  // namespace slicegpt
#endif
#endif
