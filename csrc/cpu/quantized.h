// Products of rows with int8 and int4 weights: the weights are read once as they are stored, the rows become int16 with
// a scale for every 32 items, and 32 products are summed exactly in int32 before anything is rounded. Included into an
// unnamed namespace after product.h and the integers of an instruction set (simd_*.h).
//
// Why int16 and not int8 rows, as other engines take: reading the weights takes longer than either, and int16 loses
// less than a bfloat16 row has lost already (half of 1 / 32767 of the largest of 32 items).
#pragma once

constexpr int kPanelRows = 16;   // rows of weights side by side, a lane each
constexpr int kBlockItems = 32;  // items of a row with one scale
constexpr int kPanelVectors = kPanelRows / Vec::kLanes;
constexpr float kLargestItem = 32767.0f;

inline int64_t whole_panels(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows * kPanelRows; }

// The formats of weights: how many bytes a panel has for a block, what is subtracted of each code where no zero points
// say, the products of a block with TOKENS rows that are `stride` items apart, and how a line further on is fetched:
// GB/s of one thread of an AMD EPYC 7003, 8192 bytes ahead into the second-level cache / 1024 into the first: 16.5 /
// 18.4 with 8 bits, 18.9 / 17.6 with 4; without 16.0 and 13.8.

// [16 pairs of items][row][item of a pair], signed bytes.
struct Int8 {
    static constexpr int kBlockBytes = kPanelRows * kBlockItems, kOffset = 0;
    static void prefetch(const uint8_t* p) { __builtin_prefetch(p + 1024, 0, 3); }
    template <int TOKENS>
    static void multiply(const uint8_t* p, const int16_t* x, int64_t stride, Sums (&sums)[TOKENS]) {
        for (int pair = 0; pair < kBlockItems / 2; ++pair) {
            const Words weights = Words::of_bytes(p + 2 * kPanelRows * pair);
            for (int t = 0; t < TOKENS; ++t)
                sums[t] = Sums::multiply_add(weights, Pair::of(x + t * stride + 2 * pair), sums[t]);
        }
    }
};

// [4 times 8 items][row][item of a pair] 16-bit words of four codes of 0 to 15, one of each pair, the first lowest.
struct Int4 {
    static constexpr int kBlockBytes = kPanelRows * kBlockItems / 2, kOffset = 8;
    static void prefetch(const uint8_t* p) { __builtin_prefetch(p + 8192, 0, 2); }
    template <int TOKENS>
    static void multiply(const uint8_t* p, const int16_t* x, int64_t stride, Sums (&sums)[TOKENS]) {
        for (int eight = 0; eight < kBlockItems / 8; ++eight) {
            const FourCodes codes = FourCodes::load(p + 4 * kPanelRows * eight);
            each_of_four([&](auto which) {
                const Words weights = codes.template get<decltype(which)::value>();
                for (int t = 0; t < TOKENS; ++t) {
                    const int16_t* items = x + t * stride + 8 * eight + 2 * decltype(which)::value;
                    sums[t] = Sums::multiply_add(weights, Pair::of(items), sums[t]);
                }
            });
        }
    }

  private:
    template <int N>
    struct Which {
        static constexpr int value = N;
    };
    template <typename Body>
    static void each_of_four(Body body) {
        body(Which<0>{}), body(Which<1>{}), body(Which<2>{}), body(Which<3>{});
    }
};

// Rows as they are multiplied, `stride` floats apart: the items, then a scale a block, then their sum a block.
struct PackedRows {
    const float* data;
    int64_t blocks;
    static int64_t floats(int64_t blocks) { return (blocks * (kBlockItems / 2 + 2) + 15) / 16 * 16; }
    int64_t stride() const { return floats(blocks); }
    const int16_t* items(int64_t token) const { return reinterpret_cast<const int16_t*>(data + token * stride()); }
    float scale(int64_t token, int64_t block) const {
        return data[token * stride() + blocks * (kBlockItems / 2) + block];
    }
    int32_t sum(int64_t token, int64_t block) const {
        int32_t x;
        std::memcpy(&x, data + token * stride() + blocks * (kBlockItems / 2 + 1) + block, sizeof x);
        return x;
    }
};

// One block of a row, zeros beyond `count`; returns its scale. A block that holds an infinity or what is not a number
// makes all that it is multiplied into not a number; one below 1e-30 counts as 0, because 1 / x of less may overflow.
template <typename D>
inline float pack_block(const D* x, int64_t count, int16_t* items, int32_t* sum) {
    constexpr int kParts = kBlockItems / Vec::kLanes;
    Vec parts[kParts], largest = Vec::zero(), broken = Vec::zero();
    for (int i = 0; i < kParts; ++i) {
        const int64_t remaining = count - i * Vec::kLanes;
        parts[i] = remaining > 0 ? read_some(x + i * Vec::kLanes, remaining) : Vec::zero();
        largest = Vec::most(largest, Vec::most(parts[i], Vec::difference(Vec::zero(), parts[i])));
        broken = Vec::fma(parts[i], Vec::zero(), broken);
    }
    float lanes[Vec::kLanes], top = 0;
    largest.store(lanes);
    for (const float lane : lanes) top = lane > top ? lane : top;
    const float by = top < 1e-30f ? 0 : kLargestItem / top;
    int32_t total = 0;
    for (int i = 0; i < kParts; ++i) {
        // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
        Vec::fma(parts[i], Vec::all(by), Vec::all(12582912.0f)).store(lanes);
        for (int lane = 0; lane < Vec::kLanes; ++lane) {
            const auto item = static_cast<int16_t>(to_bits(lanes[lane]));
            items[i * Vec::kLanes + lane] = item;
            total += item;
        }
    }
    *sum = total;
    return (by == 0 ? 0 : top / kLargestItem) + broken.sum();
}

inline void read_scales(const Quantized& w, int64_t at, Vec (&out)[kPanelVectors]) {
    for (int v = 0; v < kPanelVectors; ++v, at += Vec::kLanes) switch (w.scale_dtype) {
            case Dtype::kFloat16:
                read(static_cast<const Float16*>(w.scales) + at, out[v]);
                break;
            case Dtype::kBfloat16:
                read(static_cast<const BFloat16*>(w.scales) + at, out[v]);
                break;
            default:
                read(static_cast<const float*>(w.scales) + at, out[v]);
        }
}

inline void read_zeros(const Quantized& w, int64_t at, Vec (&out)[kPanelVectors]) {
    float lanes[kPanelRows];
    for (int i = 0; i < kPanelRows; ++i) lanes[i] = w.zeros[at + i];
    for (int v = 0; v < kPanelVectors; ++v) out[v] = Vec::load(lanes + v * Vec::kLanes);
}

// out[t][row] = the products of one panel's rows with TOKENS rows from the first-th on, or added to what is there.
template <typename Format, int TOKENS>
inline void multiply_panel(const Quantized& w, int64_t panel, const PackedRows& x, int64_t first, float* out,
                           int64_t out_stride, bool add) {
    Vec totals[TOKENS][kPanelVectors];
    for (int t = 0; t < TOKENS; ++t)
        for (int v = 0; v < kPanelVectors; ++v)
            totals[t][v] = add ? Vec::load(out + t * out_stride + v * Vec::kLanes) : Vec::zero();
    const uint8_t* data = w.data + panel * w.blocks * Format::kBlockBytes;
    const int32_t offset = w.zeros ? 0 : Format::kOffset;
    const int64_t stride = 2 * x.stride();
    const int16_t* items = x.items(first);
    int64_t group = panel * w.groups * kPanelRows;
    for (int64_t block = 0; block < w.blocks; group += kPanelRows) {
        const int64_t end = least(block + w.group_blocks, w.blocks);
        Vec of_group[TOKENS][kPanelVectors];
        float shift[TOKENS] = {};
        for (auto& one : of_group)
            for (Vec& part : one) part = Vec::zero();
        for (; block < end; ++block, data += Format::kBlockBytes) {
            if (kPrefetch)
                for (int line = 0; line < Format::kBlockBytes; line += 64) Format::prefetch(data + line);
            Sums sums[TOKENS];
            for (int t = 0; t < TOKENS; ++t) sums[t] = Sums::all(-offset * x.sum(first + t, block));
            Format::template multiply<TOKENS>(data, items + block * kBlockItems, stride, sums);
            for (int t = 0; t < TOKENS; ++t) {
                Vec floats[kPanelVectors];
                sums[t].floats(floats);
                const float scale = x.scale(first + t, block);
                for (int v = 0; v < kPanelVectors; ++v)
                    of_group[t][v] = Vec::fma(floats[v], Vec::all(scale), of_group[t][v]);
                if (w.zeros) shift[t] += scale * static_cast<float>(x.sum(first + t, block));
            }
        }
        Vec scales[kPanelVectors];
        read_scales(w, group, scales);
        if (w.zeros) {
            Vec zeros[kPanelVectors];
            read_zeros(w, group, zeros);
            for (int t = 0; t < TOKENS; ++t)
                for (int v = 0; v < kPanelVectors; ++v)
                    of_group[t][v] = Vec::fma(zeros[v], Vec::all(-shift[t]), of_group[t][v]);
        }
        for (int t = 0; t < TOKENS; ++t)
            for (int v = 0; v < kPanelVectors; ++v) totals[t][v] = Vec::fma(of_group[t][v], scales[v], totals[t][v]);
    }
    for (int t = 0; t < TOKENS; ++t)
        for (int v = 0; v < kPanelVectors; ++v) totals[t][v].store(out + t * out_stride + v * Vec::kLanes);
}

template <typename Format>
void multiply_panels(const Quantized& w, int64_t row, int64_t rows, const PackedRows& x, int64_t tokens, float* out,
                     int64_t out_stride, bool add) {
    constexpr int kMany = Vec::kRegisters == 32 ? 8 : 4;
    for (int64_t r = 0; r < rows; r += kPanelRows) {
        const int64_t panel = (row + r) / kPanelRows;
        int64_t t = 0;
        for (; t + kMany <= tokens; t += kMany)
            multiply_panel<Format, kMany>(w, panel, x, t, out + t * out_stride + r, out_stride, add);
        for (; t + 2 <= tokens; t += 2)
            multiply_panel<Format, 2>(w, panel, x, t, out + t * out_stride + r, out_stride, add);
        for (; t < tokens; ++t) multiply_panel<Format, 1>(w, panel, x, t, out + t * out_stride + r, out_stride, add);
    }
}

// See RowProduct, whose sums have the same order.
template <typename D>
struct QuantizedProduct {
    using Stored = D;
    struct Session {};
    static constexpr bool kQuantized = true;
    static constexpr int64_t kRowsBytes = 1 << 18;  // of packed rows, which stay in a second-level cache

    static Part part(int64_t tokens, int thread, int threads) { return {{0, tokens}, thread, threads}; }
    static int64_t tokens_at_once(int64_t tokens, int64_t K) {
        return least(tokens, most(16, kRowsBytes / (2 * K) / 8 * 8));
    }
    static int64_t columns_at_once(int64_t) { return kBlock; }
    static int64_t blocks(int64_t K) { return (K + kBlockItems - 1) / kBlockItems; }
    static int64_t packed_floats(int64_t tokens, int64_t K) { return tokens * PackedRows::floats(blocks(K)); }
    static int64_t sums_floats(int64_t tokens, int64_t block) { return tokens * block; }
    static int64_t rows_floats(int64_t) { return 0; }
    static int64_t room_floats() { return 0; }
    static int64_t group(int64_t tokens) { return tokens; }
    static const float* rows(const float* sums, int64_t, int64_t, int64_t t, int64_t block, float*) {
        return sums + t * block;
    }

    static void pack_tokens(const D* x, int64_t stride, int64_t tokens, int64_t K, float* out) {
        const int64_t count = blocks(K);
        for (int64_t t = 0; t < tokens; ++t, out += PackedRows::floats(count)) {
            auto* items = reinterpret_cast<int16_t*>(out);
            float* scales = out + count * (kBlockItems / 2);
            for (int64_t b = 0; b < count; ++b) {
                int32_t sum;
                scales[b] =
                    pack_block(x + t * stride + b * kBlockItems, K - b * kBlockItems, items + b * kBlockItems, &sum);
                std::memcpy(scales + count + b, &sum, sizeof sum);
            }
        }
    }
    static void multiply(const Quantized& w, int64_t row, int64_t rows, const float* x, int64_t tokens, float* sums,
                         int64_t block, bool add) {
        (w.bits == 8 ? multiply_panels<Int8> : multiply_panels<Int4>)(w, row, rows, {x, w.blocks}, tokens, sums, block,
                                                                      add);
    }
};
