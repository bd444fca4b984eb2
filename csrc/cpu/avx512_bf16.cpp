// "fast" products of bfloat16 without weights, two tokens an instruction: twice float32's rate. They are exact in
// float32 but for numbers below 2^-126, which count as 0; the sums round as any float32 sums do.
#include "gram.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cstring>
#include <initializer_list>

namespace slicegpt {
namespace cpu {
namespace {

// A tile of C is kTileRows rows by the columns of a panel, as in gram_tiles.h; an item is a column's pair of tokens.
constexpr int kVectors = 3, kTileRows = 8, kLanes = 16, kColumns = kVectors * kLanes;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void pack(const Packing& of) {
    const auto* data = static_cast<const uint16_t*>(of.from.data);
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
                    if (to) _mm512_storeu_si512(static_cast<uint32_t*>(to) + offset + t / 2 * kColumns + v * kLanes, pairs);
            }
        }
    }
}

__m512bh as_pairs(__m512i x) {
    __m512bh pairs;
    std::memcpy(&pairs, &x, sizeof pairs);
    return pairs;
}

// C[:rows, :columns] += the product of `pairs` items of kTileRows columns at `left` and of the panel at `right`.
template <int VECTORS>
void multiply_tile(const uint32_t* left, const uint32_t* right, int64_t pairs, double* C, int64_t stride, int64_t rows,
                   int64_t columns) {
    constexpr int kDoublesPerLine = 8;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < columns; i += kDoublesPerLine) __builtin_prefetch(C + r * stride + i, 1);
    __m512 sums[kTileRows][VECTORS];
    for (auto& of_row : sums)
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k, left += kColumns, right += kColumns) {
        __m512bh values[VECTORS];
        for (int v = 0; v < VECTORS; ++v) values[v] = as_pairs(_mm512_loadu_si512(right + v * kLanes));
        for (int r = 0; r < kTileRows; ++r) {
            const __m512bh x = as_pairs(_mm512_set1_epi32(static_cast<int>(left[r])));
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, values[v]);
        }
    }
    alignas(64) float room[VECTORS * kLanes];
    for (int64_t r = 0; r < rows; ++r) {
        for (int v = 0; v < VECTORS; ++v) _mm512_store_ps(room + v * kLanes, sums[r][v]);
        for (int64_t i = 0; i < columns; ++i) C[r * stride + i] += static_cast<double>(room[i]);
    }
}

void multiply(const Tiles& of) {
    const int64_t size = of.run / 2 * kColumns, column = of.panel * kColumns, width = least(kColumns, of.D - column);
    const int64_t pairs = (of.tokens + 1) / 2;
    const auto* right = static_cast<const uint32_t*>(of.right) + of.panel * size;
    // Of a triangle the rows down to the panel's last diagonal element.
    const int64_t rows = of.triangle ? column + width : of.K;
    for (int64_t panel = of.first_left; panel < of.last_left; ++panel)
        for (int64_t at = 0; at < kColumns; at += kTileRows) {
            const int64_t row = panel * kColumns + at;
            if (row >= rows) return;
            const auto* left = static_cast<const uint32_t*>(of.left) + panel * size + at;
            double* C = of.C + row * of.D + column;
            const int64_t height = least(kTileRows, of.K - row);
            if (width > 2 * kLanes)
                multiply_tile<3>(left, right, pairs, C, of.D, height, width);
            else if (width > kLanes)
                multiply_tile<2>(left, right, pairs, C, of.D, height, width);
            else
                multiply_tile<1>(left, right, pairs, C, of.D, height, width);
        }
}

constexpr GramKernels kKernels{kColumns, 2, pack, multiply};

}  // namespace

const GramKernels* avx512_bf16_gram() { return __builtin_cpu_supports("avx512bf16") ? &kKernels : nullptr; }

}  // namespace cpu
}  // namespace slicegpt
#endif
