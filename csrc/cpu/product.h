// Products of a few rows x with many rows of weights: out[t][n] = Σ_k w[n][k] x[t][k], summed in float32. Included
// into an unnamed namespace behind a Vec and its Values, see values.h.
#pragma once

// Tokens whose sums are kept in registers together, and the rows of weights that share what is loaded of them.
constexpr int kTile = 8;
constexpr int64_t kCachedColumns = 1024;
template <int TOKENS>
constexpr int rows_at_once() {
    if (Vec::kRegisters == 32) return TOKENS == 8 ? 3 : 4;
    return TOKENS == 8 ? 1 : TOKENS == 4 ? 2 : 4;
}

// Bytes ahead of the weights in use that are fetched into the second-level cache: rows follow each other in memory, so
// this reaches over their ends, where the processor's own prefetching starts anew. Measured: 14.1 GB/s for one thread
// where it reads 11.0 without, rows of 1152 bytes.
#ifdef SLICEGPT_PREFETCH
constexpr int64_t kPrefetch = 8192;
#else
constexpr int64_t kPrefetch = 0;
#endif

template <typename D>
inline void load_first(const D* p, int count, Vec* out) {
#ifdef SLICEGPT_MASKED_LOADS
    Values<D>::load_first(p, count, out);
#else
    D whole[Values<D>::kChunk] = {};
    std::memcpy(whole, p, count * sizeof(D));
    Values<D>::load(whole, out);
#endif
}

// Floats that a row of `count` items takes once packed.
template <typename D>
inline int64_t packed_size(int64_t count) {
    return (count + Values<D>::kChunk - 1) / Values<D>::kChunk * Values<D>::kChunk;
}

// Where item i of a chunk stands among its vectors.
template <typename D>
inline int position(int i) {
    constexpr int kParts = Values<D>::kParts;
    return Values<D>::kInterleaved ? i % kParts * Vec::kLanes + i / kParts : i;
}

// Converts a row in the order in which weights are loaded, padded with zeros.
template <typename D>
inline void pack(const D* x, int64_t count, float* out) {
    constexpr int kChunk = Values<D>::kChunk, kParts = Values<D>::kParts;
    for (int64_t k = 0; k < count; k += kChunk, out += kChunk) {
        Vec parts[kParts];
        if (count - k >= kChunk)
            Values<D>::load(x + k, parts);
        else
            load_first(x + k, static_cast<int>(count - k), parts);
        for (int i = 0; i < kParts; ++i) parts[i].store(out + i * Vec::kLanes);
    }
}

template <typename D>
inline void store_row(D* out, const float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store_value(out + i, values[i]);
}

inline float sum_of_squares(const float* x, int64_t packed) {
    Vec sums[2] = {Vec::zero(), Vec::zero()};
    int64_t k = 0;
    for (; k + 2 * Vec::kLanes <= packed; k += 2 * Vec::kLanes)
        for (int i = 0; i < 2; ++i) {
            const Vec v = Vec::load(x + k + i * Vec::kLanes);
            sums[i] = Vec::fma(v, v, sums[i]);
        }
    for (; k < packed; k += Vec::kLanes) {
        const Vec v = Vec::load(x + k);
        sums[0] = Vec::fma(v, v, sums[0]);
    }
    return sums[0].sum() + sums[1].sum();
}

template <int COUNT>
inline void sums_of(const Vec (&vectors)[COUNT], float* out) {
#ifdef SLICEGPT_EIGHT_SUMS
    if constexpr (COUNT == 8) return Vec::sums(vectors, out);
#endif
    for (int i = 0; i < COUNT; ++i) out[i] = vectors[i].sum();
}

template <typename D, int TOKENS, int ROWS>
inline void tile(const D* w, int64_t w_stride, int64_t K, const float* x, int64_t x_stride, float* out,
                 int64_t out_stride, bool add) {
    constexpr int kChunk = Values<D>::kChunk, kParts = Values<D>::kParts;
    Vec sums[ROWS][TOKENS];
    for (auto& of_row : sums)
        for (Vec& sum : of_row) sum = Vec::zero();
    Vec weights[ROWS][kParts];
    const auto multiply = [&](int64_t k) {
        for (int i = 0; i < kParts; ++i)
            for (int t = 0; t < TOKENS; ++t) {
                const Vec values = Vec::load(x + t * x_stride + k + i * Vec::kLanes);
                for (int r = 0; r < ROWS; ++r) sums[r][t] = Vec::fma(weights[r][i], values, sums[r][t]);
            }
    };
    int64_t k = 0;
    for (; k + kChunk <= K; k += kChunk) {
        for (int r = 0; r < ROWS; ++r) {
            const D* p = w + r * w_stride + k;
            if (kPrefetch) __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetch, 0, 2);
            Values<D>::load(p, weights[r]);
        }
        multiply(k);
    }
    if (k < K) {
        for (int r = 0; r < ROWS; ++r) load_first(w + r * w_stride + k, static_cast<int>(K - k), weights[r]);
        multiply(k);
    }
    for (int r = 0; r < ROWS; ++r) {
        float totals[TOKENS];
        sums_of(sums[r], totals);
        for (int t = 0; t < TOKENS; ++t) {
            float& target = out[t * out_stride + r];
            target = add ? target + totals[t] : totals[t];
        }
    }
}

template <typename D, int TOKENS>
inline void tile_rows(const D* w, int64_t w_stride, int64_t rows, int64_t K, const float* x, int64_t x_stride,
                      float* out, int64_t out_stride, bool add) {
    constexpr int kRows = rows_at_once<TOKENS>();
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
        tile<D, TOKENS, kRows>(w + r * w_stride, w_stride, K, x, x_stride, out + r, out_stride, add);
    for (; r < rows; ++r)
        tile<D, TOKENS, 1>(w + r * w_stride, w_stride, K, x, x_stride, out + r, out_stride, add);
}

// x: [tokens, packed_size(K)] from `pack`; out: [tokens, rows], which the products are added to where `add` is set.
template <typename D>
void product(const D* w, int64_t w_stride, int64_t rows, int64_t K, const float* x, int64_t tokens, float* out,
             int64_t out_stride, bool add) {
    const int64_t x_stride = packed_size<D>(K);
    const bool one_tile = tokens == 1 || tokens == 2 || tokens == 4 || tokens == kTile;
    // Columns of x that several tokens are multiplied with at a time, so that they stay in the first-level cache; and so
    // few rows that a second group of tokens finds their columns there or next to it.
    const int64_t width = tokens < 4 || K <= kCachedColumns ? K : kCachedColumns;
    const int64_t group = one_tile && width == K ? rows : 24;
    for (int64_t first = 0; first < rows; first += group) {
        const int64_t count = least(group, rows - first);
        int64_t k = 0;
        do {
            const D* panel = w + first * w_stride + k;
            const int64_t columns = least(width, K - k);
            const bool more = add || k > 0;
            for (int64_t t = 0; t < tokens;) {
                const float* values = x + t * x_stride + k;
                float* target = out + t * out_stride + first;
                const int64_t left = tokens - t;
                if (left >= 8) {
                    tile_rows<D, 8>(panel, w_stride, count, columns, values, x_stride, target, out_stride, more);
                    t += 8;
                } else if (left >= 4) {
                    tile_rows<D, 4>(panel, w_stride, count, columns, values, x_stride, target, out_stride, more);
                    t += 4;
                } else if (left >= 2) {
                    tile_rows<D, 2>(panel, w_stride, count, columns, values, x_stride, target, out_stride, more);
                    t += 2;
                } else {
                    tile_rows<D, 1>(panel, w_stride, count, columns, values, x_stride, target, out_stride, more);
                    t += 1;
                }
            }
            k += width;
        } while (k < K);
    }
}
