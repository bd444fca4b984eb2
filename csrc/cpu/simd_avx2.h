// Eight floats or four doubles at a time, with FMA and F16C. Included once, into the unnamed namespace of avx2.cpp.
#pragma once

struct Vec {
    __m256 v;
    static constexpr int kLanes = 8;
    static constexpr int kRegisters = 16;
    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec all(float x) { return {_mm256_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec product(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
    // These as in simd_avx512.h.
    static Vec plus(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
    static Vec difference(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
    static Vec quotient(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
    static Vec least(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
    static Vec most(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
    static Vec power_of_two(Vec shifted) {
        const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(shifted.v), _mm256_set1_epi32(0x4b400000 - 127));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(n, 23))};
    }
    float sum() const {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
};

// See simd_avx512.h; a chunk is 32 bytes here.
template <typename D>
struct Values;

template <>
struct Values<float> {
    static constexpr bool kInterleaved = false;
    static constexpr int kChunk = 8, kParts = 1;
    static void load(const float* p, Vec* out) { out[0] = Vec::load(p); }
};

template <>
struct Values<BFloat16> {
    static constexpr bool kInterleaved = true;
    static constexpr int kChunk = 16, kParts = 2;
    static void load(const BFloat16* p, Vec* out) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        out[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))};
        out[1] = {_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
    }
};

template <>
struct Values<Float16> {
    static constexpr bool kInterleaved = false;
    static constexpr int kChunk = 16, kParts = 2;
    static void load(const Float16* p, Vec* out) {
        const __m128i* halves = reinterpret_cast<const __m128i*>(p);
        out[0] = {_mm256_cvtph_ps(_mm_loadu_si128(halves))};
        out[1] = {_mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    }
};

inline float to_float(Float16 x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }

// See simd_avx512.h.
inline void read(const float* p, Vec& out) { out = Vec::load(p); }
inline void read(const BFloat16* p, Vec& out) {
    const __m128i items = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    out = {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(items), 16))};
}
inline void read(const Float16* p, Vec& out) {
    out = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

inline void write(float* p, Vec x) { x.store(p); }
inline void write(BFloat16* p, Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_ORD_Q));
    const __m256i halves = _mm256_blendv_epi8(_mm256_set1_epi32(0x7fc0), _mm256_srli_epi32(rounded, 16), number);
    // Packing works on each half of a vector: quarters 0 and 2 are the result.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void write(Float16* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// For quantized.h: 16-bit integers of two neighbouring items of 16 rows, and what they are multiplied with.
struct Pair {
    __m256i v;
    static Pair of(const int16_t* p) {
        int both;
        std::memcpy(&both, p, sizeof both);
        return {_mm256_set1_epi32(both)};
    }
};
struct Words {
    __m256i low, high;
    static Words of_bytes(const uint8_t* p) {
        const __m128i* halves = reinterpret_cast<const __m128i*>(p);
        return {_mm256_cvtepi8_epi16(_mm_loadu_si128(halves)), _mm256_cvtepi8_epi16(_mm_loadu_si128(halves + 1))};
    }
};
// Four codes in each of these.
struct FourCodes {
    Words v;
    static FourCodes load(const uint8_t* p) {
        const __m256i* halves = reinterpret_cast<const __m256i*>(p);
        return {{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
    }
    template <int N>
    Words get() const {
        return {code<N>(v.low), code<N>(v.high)};
    }

  private:
    template <int N>
    static __m256i code(__m256i x) {
        const __m256i shifted = N ? _mm256_srli_epi16(x, 4 * N) : x;
        return N == 3 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16(15));
    }
};
struct Sums {
    __m256i low, high;
    static Sums all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    static Sums multiply_add(const Words& w, Pair x, Sums c) {
        c = {_mm256_add_epi32(c.low, _mm256_madd_epi16(w.low, x.v)),
             _mm256_add_epi32(c.high, _mm256_madd_epi16(w.high, x.v))};
        // One after the other: as a tree, which GCC makes of it, the products do not fit into the registers.
        asm("" : "+x"(c.low), "+x"(c.high));
        return c;
    }
    void floats(Vec* out) const {
        out[0] = {_mm256_cvtepi32_ps(low)};
        out[1] = {_mm256_cvtepi32_ps(high)};
    }
};

struct Doubles {
    __m256d v;
    static constexpr int kLanes = 4;
    static Doubles zero() { return {_mm256_setzero_pd()}; }
    static Doubles all(double x) { return {_mm256_set1_pd(x)}; }
    static Doubles load(const double* p) { return {_mm256_loadu_pd(p)}; }
    void store(double* p) const { _mm256_storeu_pd(p, v); }
    static Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
    static Doubles product(Doubles a, Doubles b) { return {_mm256_mul_pd(a.v, b.v)}; }
};
inline void read(const double* p, Doubles& out) { out = Doubles::load(p); }
inline void read(const float* p, Doubles& out) { out = {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
inline void read(const BFloat16* p, Doubles& out) {
    const __m128i items = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    out = {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(items), 16)))};
}
inline void read(const Float16* p, Doubles& out) {
    out = {_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void add_to(double* p, Doubles x) { _mm256_storeu_pd(p, _mm256_add_pd(_mm256_loadu_pd(p), x.v)); }
inline void add_to(double* p, Vec x) {
    add_to(p, Doubles{_mm256_cvtps_pd(_mm256_castps256_ps128(x.v))});
    add_to(p + 4, Doubles{_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1))});
}
