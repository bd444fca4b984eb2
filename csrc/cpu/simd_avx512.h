// Sixteen floats or eight doubles at a time. Included once, into the unnamed namespace of avx512.cpp.
#pragma once

struct Vec {
    __m512 v;
    static constexpr int kLanes = 16;
    static constexpr int kRegisters = 32;
    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec product(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static Vec plus(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    static Vec difference(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    static Vec quotient(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    // b where either is not a number.
    static Vec least(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
    static Vec most(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
    // 2^n of 1.5 * 2^23 + n.
    static Vec power_of_two(Vec shifted) {
        const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(0x4b400000 - 127));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(n, 23))};
    }
    float sum() const { return _mm512_reduce_add_ps(v); }

    // The sums of eight, each added in the order of `sum`: 23 operations where eight of those take 64.
    static void sums(const Vec (&of)[8], float* out) {
        __m512 halves[4], quarters[2];
        for (int i = 0; i < 4; ++i) {
            const __m512 a = of[2 * i].v, b = of[2 * i + 1].v;
            halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        }
        for (int i = 0; i < 2; ++i) {
            const __m512 a = halves[2 * i], b = halves[2 * i + 1];
            quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        }
        const __m512 pairs = _mm512_add_ps(_mm512_shuffle_ps(quarters[0], quarters[1], 0x44),
                                           _mm512_shuffle_ps(quarters[0], quarters[1], 0xee));
        const __m512 sums = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums)));
    }
};

// `Values<D>`: kChunk items of D, 64 bytes of them, become kParts vectors of floats, in an order of its own that is
// the same for weights and for what they are multiplied with. `load_first` reads `count` items, zeros follow.
template <typename D>
struct Values;

template <>
struct Values<float> {
    static constexpr bool kInterleaved = false;
    static constexpr int kChunk = 16, kParts = 1;
    static void load(const float* p, Vec* out) { out[0] = Vec::load(p); }
    static void load_first(const float* p, int count, Vec* out) {
        out[0] = {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
    }
};

template <>
struct Values<BFloat16> {
    static constexpr bool kInterleaved = true;
    static constexpr int kChunk = 32, kParts = 2;
    static void spread(__m512i pairs, Vec* out) {
        // The even items and the odd ones: a shift and a mask, where keeping the order would take a permutation.
        out[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
        out[1] = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
    }
    static void load(const BFloat16* p, Vec* out) { spread(_mm512_loadu_si512(p), out); }
    static void load_first(const BFloat16* p, int count, Vec* out) {
        spread(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p), out);
    }
};

template <>
struct Values<Float16> {
    static constexpr bool kInterleaved = false;
    static constexpr int kChunk = 32, kParts = 2;
    static void load(const Float16* p, Vec* out) {
        const __m256i* halves = reinterpret_cast<const __m256i*>(p);
        out[0] = {_mm512_cvtph_ps(_mm256_loadu_si256(halves))};
        out[1] = {_mm512_cvtph_ps(_mm256_loadu_si256(halves + 1))};
    }
    static void load_first(const Float16* p, int count, Vec* out) {
        const __m512i both = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
        out[0] = {_mm512_cvtph_ps(_mm512_castsi512_si256(both))};
        out[1] = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
    }
};

inline float to_float(Float16 x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }

// kLanes items in their order, as floats and as doubles; and sums of either kind added to doubles.
inline void read(const float* p, Vec& out) { out = Vec::load(p); }
inline void read(const BFloat16* p, Vec& out) {
    const __m256i items = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    out = {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(items), 16))};
}
inline void read(const Float16* p, Vec& out) {
    out = {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// kLanes floats rounded to the nearest, ties to even.
inline void write(float* p, Vec x) { x.store(p); }
inline void write(BFloat16* p, Vec x) {
#ifdef __AVX512BF16__
    // One instruction; what is below 2^-126 becomes 0.
    const __m256bh rounded = _mm512_cvtneps_pbh(x.v);
    std::memcpy(p, &rounded, sizeof rounded);
#else
    const __m512i bits = _mm512_castps_si512(x.v),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 number = _mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q);
    const __m512i halves = _mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), number, rounded, 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(halves));
#endif
}
inline void write(Float16* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// For quantized.h: 16-bit integers of two neighbouring items of 16 rows, and what they are multiplied with.
struct Pair {
    __m512i v;
    static Pair of(const int16_t* p) {
        int both;
        std::memcpy(&both, p, sizeof both);
        return {_mm512_set1_epi32(both)};
    }
};
struct Words {
    __m512i v;
    static Words of_bytes(const uint8_t* p) {
        return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
};
// Four codes in each of these.
struct FourCodes {
    __m512i v;
    static FourCodes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
    template <int N>
    Words get() const {
        const __m512i shifted = N ? _mm512_srli_epi16(v, 4 * N) : v;
        return {N == 3 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16(15))};
    }
};
struct Sums {
    __m512i v;
    static Sums all(int32_t x) { return {_mm512_set1_epi32(x)}; }
    static Sums multiply_add(const Words& w, Pair x, Sums c) {
#ifdef __AVX512VNNI__
        return {_mm512_dpwssd_epi32(c.v, w.v, x.v)};
#else
        c = {_mm512_add_epi32(c.v, _mm512_madd_epi16(w.v, x.v))};
        asm("" : "+v"(c.v));  // see simd_avx2.h
        return c;
#endif
    }
    void floats(Vec* out) const { out[0] = {_mm512_cvtepi32_ps(v)}; }
};

struct Doubles {
    __m512d v;
    static constexpr int kLanes = 8;
    static Doubles zero() { return {_mm512_setzero_pd()}; }
    static Doubles all(double x) { return {_mm512_set1_pd(x)}; }
    static Doubles load(const double* p) { return {_mm512_loadu_pd(p)}; }
    void store(double* p) const { _mm512_storeu_pd(p, v); }
    static Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
    static Doubles product(Doubles a, Doubles b) { return {_mm512_mul_pd(a.v, b.v)}; }
};
inline void read(const double* p, Doubles& out) { out = Doubles::load(p); }
inline void read(const float* p, Doubles& out) { out = {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
inline void read(const BFloat16* p, Doubles& out) {
    const __m128i items = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    out = {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(items), 16)))};
}
inline void read(const Float16* p, Doubles& out) {
    out = {_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void add_to(double* p, Doubles x) { _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), x.v)); }
inline void add_to(double* p, Vec x) {
    add_to(p, Doubles{_mm512_cvtps_pd(_mm512_castps512_ps256(x.v))});
    add_to(p + 8, Doubles{_mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))});
}
