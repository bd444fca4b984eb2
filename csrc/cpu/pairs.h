// Products of bfloat16 as it is stored, two of them a lane and instruction, summed in float32: twice float32's rate,
// and nothing to convert. Each is exact in float32 but for numbers below 2^-126, which count as 0. Included into an
// unnamed namespace after simd_avx512.h, for processors with AVX512-BF16.
#pragma once

struct Pairs {
    __m512i v;
    static constexpr int kLanes = 16;
    static Pairs all(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
    static Pairs load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
    void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
    static Vec fma(Pairs a, Pairs b, Vec c) { return {_mm512_dpbf16_ps(c.v, a.halves(), b.halves())}; }
    __m512bh halves() const {
        __m512bh x;
        std::memcpy(&x, &v, sizeof x);
        return x;
    }
};

// For product.h: neighbours in a row are a pair.
struct RowPairs {
    using Stored = BFloat16;
    using Item = uint32_t;
    using Factor = Pairs;
    static constexpr int kChunk = 32, kParts = 1;
    static void load(const BFloat16* p, Pairs* out) { out[0] = {_mm512_loadu_si512(p)}; }
    static void load_first(const BFloat16* p, int count, Pairs* out) {
        out[0] = {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p)};
    }
};
