// "fast" products of bfloat16 without weights, two tokens an instruction: twice float32's rate. They are exact in
// float32 but for numbers below 2^-126, which count as 0; the sums round as any float32 sums do.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "gram.h"

#define SLICEGPT_PREFETCH

namespace slicegpt {
namespace cpu {
namespace {

#include "values.h"
#include "simd_avx512.h"
#include "gram_tiles.h"

// Sixteen columns' pairs of tokens, the earlier token in the lower half of an item.
struct Pairs {
    __m512i v;
    static constexpr int kLanes = 16;
    static Pairs all(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
    static Pairs load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
    static Vec fma(Pairs a, Pairs b, Vec c) { return {_mm512_dpbf16_ps(c.v, a.halves(), b.halves())}; }
    __m512bh halves() const {
        __m512bh x;
        std::memcpy(&x, &v, sizeof x);
        return x;
    }
};
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

constexpr GramKernels kKernels{kPanelColumns<Pairs>, sizeof(Item<Pairs>) / kItemTokens<Pairs>, pack_pairs,
                               multiply_of<Pairs>};

}  // namespace

const GramKernels* avx512_bf16_gram() { return __builtin_cpu_supports("avx512bf16") ? &kKernels : nullptr; }

}  // namespace cpu
}  // namespace slicegpt
#endif
