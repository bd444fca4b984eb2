// Products of a few rows x with many rows of weights: out[t][n] = Σ_k w[n][k] x[t][k], summed in float32. Included
// into an unnamed namespace after a Vec and its Values, see values.h.
#pragma once

// What a product is computed in: V::kChunk items of V::Stored become V::kParts vectors V::Factor of V::Item, which x is
// packed as. Here floats, whatever is stored; pairs.h has bfloat16 as it is.
template <typename D>
struct Floats : Values<D> {
    using Stored = D;
    using Item = float;
    using Factor = Vec;
};

// Tokens whose sums are kept in registers together, and the rows of weights that share what is loaded of them.
constexpr int kTileTokens = 8;
constexpr int64_t kCachedColumns = 1024;
//
// One token and 16-bit weights with AVX2: a row at a time, so that memory is read in one stream. GB/s of one thread of
// an AMD EPYC 7003, four rows side by side / one: 11.6 / 15.3 with rows of 1152 bytes, 15.0 / 16.9 of 3 KiB.
template <typename V, int TOKENS>
constexpr int rows_at_once() {
    if (Vec::kRegisters == 32) return TOKENS == 8 ? 3 : 4;
    if (TOKENS == 1 && V::kParts == 2) return 1;
    return TOKENS == 8 ? 1 : TOKENS == 4 ? 2 : 4;
}
// Sums of one row by one token: as many as there are parts of a chunk, lest each addition waits for the one before.
template <typename V, int TOKENS, int ROWS>
constexpr int kChains = TOKENS == 1 && ROWS == 1 ? V::kParts : 1;

// Bytes ahead of the weights in use that are fetched into the second-level cache: rows follow each other in memory, so
// this reaches over their ends, where the processor's own prefetching starts anew. Measured: 14.1 GB/s for one thread
// where it reads 11.0 without, rows of 1152 bytes.
#ifdef SLICEGPT_PREFETCH
constexpr int64_t kPrefetch = 8192;
#else
constexpr int64_t kPrefetch = 0;
#endif

// Rows of weights that one token is multiplied with at a time where rows are so long that reading more of them side by
// side does better than fetching ahead. GB/s of two threads, four rows and ahead / eight and not: 26.5 / 28.8 with rows
// of 8 KiB, 22.8 / 27.2 of 22 KiB, 25.1 / 28.0 of 4 KiB, 24.8 / 24.2 of 2.25 KiB, all float32. Only on Intel's
// processors: others were not measured.
constexpr int kLongRows = 8;
#if defined(__x86_64__) || defined(_M_X64)
inline bool is_long(int64_t bytes) { return bytes >= 4096 && __builtin_cpu_is("intel"); }
#else
inline bool is_long(int64_t) { return false; }
#endif

template <typename V>
inline void load_first(const typename V::Stored* p, int count, typename V::Factor* out) {
#ifdef SLICEGPT_MASKED_LOADS
    V::load_first(p, count, out);
#else
    typename V::Stored whole[V::kChunk] = {};
    std::memcpy(whole, p, count * sizeof whole[0]);
    V::load(whole, out);
#endif
}

// Stored items in one V::Item.
template <typename V>
constexpr int kStoredPerItem = V::kChunk / (V::kParts * V::Factor::kLanes);

// Items that a row of `count` stored ones takes once packed.
template <typename V>
inline int64_t packed_size(int64_t count) {
    return (count + V::kChunk - 1) / V::kChunk * (V::kChunk / kStoredPerItem<V>);
}

// Where item i of a chunk stands among its vectors.
template <typename D>
inline int position(int i) {
    constexpr int kParts = Values<D>::kParts;
    return Values<D>::kInterleaved ? i % kParts * Vec::kLanes + i / kParts : i;
}

// Converts a row in the order in which weights are loaded, padded with zeros.
template <typename V>
inline void pack(const typename V::Stored* x, int64_t count, typename V::Item* out) {
    for (int64_t k = 0; k < count; k += V::kChunk) {
        typename V::Factor parts[V::kParts];
        if (count - k >= V::kChunk)
            V::load(x + k, parts);
        else
            load_first<V>(x + k, static_cast<int>(count - k), parts);
        for (int i = 0; i < V::kParts; ++i, out += V::Factor::kLanes) parts[i].store(out);
    }
}

// Up to kLanes items as floats, zeros after them.
template <typename D>
inline Vec read_some(const D* p, int64_t count) {
    Vec x;
    if (count >= Vec::kLanes) {
        read(p, x);
        return x;
    }
    D room[Vec::kLanes] = {};
    std::memcpy(room, p, count * sizeof(D));
    read(room, x);
    return x;
}

// out[i] = value(i, how many from i on), rounded to D; `value` gives a vector.
template <typename D, typename F>
inline void write_row(D* out, int64_t count, F value) {
    int64_t i = 0;
    for (; i + Vec::kLanes <= count; i += Vec::kLanes) write(out + i, value(i, Vec::kLanes));
    if (i == count) return;
    D room[Vec::kLanes];
    write(room, value(i, count - i));
    std::memcpy(out + i, room, (count - i) * sizeof(D));
}

template <typename D>
inline void store_row(D* out, const float* values, int64_t count) {
    write_row(out, count, [&](int64_t i, int64_t remaining) { return read_some(values + i, remaining); });
}

template <typename D>
inline float sum_of_squares(const D* x, int64_t count) {
    using V = Floats<D>;
    Vec sums[2] = {Vec::zero(), Vec::zero()}, parts[V::kParts];
    int next = 0;
    for (int64_t k = 0; k < count; k += V::kChunk) {
        if (count - k >= V::kChunk)
            V::load(x + k, parts);
        else
            load_first<V>(x + k, static_cast<int>(count - k), parts);
        for (const Vec part : parts) {
            sums[next] = Vec::fma(part, part, sums[next]);
            next ^= 1;
        }
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

template <typename V, int TOKENS, int ROWS, bool AHEAD = true>
inline void tile(const typename V::Stored* w, int64_t w_stride, int64_t K, const typename V::Item* x, int64_t x_stride,
                 float* out, int64_t out_stride, bool add) {
    using Factor = typename V::Factor;
    constexpr int kChunk = V::kChunk, kParts = V::kParts;
    constexpr int kSums = kChains<V, TOKENS, ROWS>;
    Vec chains[kSums][ROWS][TOKENS];
    for (auto& sums : chains)
        for (auto& of_row : sums)
            for (Vec& sum : of_row) sum = Vec::zero();
    Factor weights[ROWS][kParts];
    const auto multiply = [&](int64_t k) {
        for (int i = 0; i < kParts; ++i)
            for (int t = 0; t < TOKENS; ++t) {
                const Factor values = Factor::load(x + t * x_stride + k / kStoredPerItem<V> + i * Factor::kLanes);
                for (int r = 0; r < ROWS; ++r) {
                    Vec& sum = chains[i % kSums][r][t];
                    sum = Factor::fma(weights[r][i], values, sum);
                }
            }
    };
    int64_t k = 0;
    for (; k + kChunk <= K; k += kChunk) {
        for (int r = 0; r < ROWS; ++r) {
            const auto* p = w + r * w_stride + k;
            if (AHEAD && kPrefetch) __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetch, 0, 2);
            V::load(p, weights[r]);
        }
        multiply(k);
    }
    if (k < K) {
        for (int r = 0; r < ROWS; ++r) load_first<V>(w + r * w_stride + k, static_cast<int>(K - k), weights[r]);
        multiply(k);
    }
    for (int r = 0; r < ROWS; ++r) {
        float totals[TOKENS];
        for (int i = 1; i < kSums; ++i)
            for (int t = 0; t < TOKENS; ++t) chains[0][r][t] = Vec::plus(chains[0][r][t], chains[i][r][t]);
        sums_of(chains[0][r], totals);
        for (int t = 0; t < TOKENS; ++t) {
            float& target = out[t * out_stride + r];
            target = add ? target + totals[t] : totals[t];
        }
    }
}

template <typename V, int TOKENS>
inline void tile_rows(const typename V::Stored* w, int64_t w_stride, int64_t rows, int64_t K, const typename V::Item* x,
                      int64_t x_stride, float* out, int64_t out_stride, bool add) {
    constexpr int kRows = rows_at_once<V, TOKENS>();
    int64_t r = 0;
    if (TOKENS == 1 && Vec::kRegisters == 32 && is_long(K * sizeof *w))
        for (; r + kLongRows <= rows; r += kLongRows)
            tile<V, TOKENS, kLongRows, false>(w + r * w_stride, w_stride, K, x, x_stride, out + r, out_stride, add);
    for (; r + kRows <= rows; r += kRows)
        tile<V, TOKENS, kRows>(w + r * w_stride, w_stride, K, x, x_stride, out + r, out_stride, add);
    for (; r < rows; ++r) tile<V, TOKENS, 1>(w + r * w_stride, w_stride, K, x, x_stride, out + r, out_stride, add);
}

// x: [tokens, packed_size(K)] from `pack`; out: [tokens, rows], which the products are added to where `add` is set.
template <typename V>
void product(const typename V::Stored* w, int64_t w_stride, int64_t rows, int64_t K, const typename V::Item* x,
             int64_t tokens, float* out, int64_t out_stride, bool add) {
    const int64_t x_stride = packed_size<V>(K);
    const bool one_tile = tokens == 1 || tokens == 2 || tokens == 4 || tokens == kTileTokens;
    // Columns of x that several tokens are multiplied with at a time, so that they stay in the first-level cache; and
    // so few rows that a second group of tokens finds their columns there or next to it.
    const int64_t width = tokens < 4 || K <= kCachedColumns ? K : kCachedColumns;
    const int64_t group = one_tile && width == K ? rows : 24;
    for (int64_t first = 0; first < rows; first += group) {
        const int64_t count = least(group, rows - first);
        int64_t k = 0;
        do {
            const auto* panel = w + first * w_stride + k;
            const int64_t columns = least(width, K - k);
            const bool more = add || k > 0;
            for (int64_t t = 0; t < tokens;) {
                const auto* values = x + t * x_stride + k / kStoredPerItem<V>;
                float* target = out + t * out_stride + first;
                const int64_t remaining = tokens - t;
                if (remaining >= 8) {
                    tile_rows<V, 8>(panel, w_stride, count, columns, values, x_stride, target, out_stride, more);
                    t += 8;
                } else if (remaining >= 4) {
                    tile_rows<V, 4>(panel, w_stride, count, columns, values, x_stride, target, out_stride, more);
                    t += 4;
                } else if (remaining >= 2) {
                    tile_rows<V, 2>(panel, w_stride, count, columns, values, x_stride, target, out_stride, more);
                    t += 2;
                } else {
                    tile_rows<V, 1>(panel, w_stride, count, columns, values, x_stride, target, out_stride, more);
                    t += 1;
                }
            }
            k += width;
        } while (k < K);
    }
}
