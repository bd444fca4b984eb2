// Plain C++, eight floats or four doubles at a time: what a compiler turns into the vectors of any machine. Included
// once, into the unnamed namespace of portable.cpp.
#pragma once

inline float to_float(Float16 x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
    if (exponent == 0) {
        const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24, the smallest subnormal
        return sign ? -value : value;
    }
    const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return from_bits(sign | wide << 23 | fraction << 13);
}

inline Float16 to_float16(float x) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00;  // not a number
    } else if (magnitude >= 0x477ff000u) {
        half = 0x7c00;  // rounds to 65536 or more
    } else if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 makes the float's own rounding happen at 2^-24.
        half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
}

template <typename T, int LANES>
struct Lanes {
    T v[LANES];
    static constexpr int kLanes = LANES;
    static constexpr int kRegisters = 16;
    static Lanes zero() { return all(0); }
    static Lanes all(T x) {
        Lanes r;
        for (T& lane : r.v) lane = x;
        return r;
    }
    static Lanes load(const T* p) {
        Lanes r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    void store(T* p) const { std::memcpy(p, v, sizeof v); }
    static Lanes fma(const Lanes& a, const Lanes& b, Lanes c) {
        for (int i = 0; i < LANES; ++i) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    static Lanes product(Lanes a, const Lanes& b) {
        for (int i = 0; i < LANES; ++i) a.v[i] *= b.v[i];
        return a;
    }
    // These as in simd_avx512.h.
    static Lanes plus(Lanes a, const Lanes& b) {
        for (int i = 0; i < LANES; ++i) a.v[i] += b.v[i];
        return a;
    }
    static Lanes difference(Lanes a, const Lanes& b) {
        for (int i = 0; i < LANES; ++i) a.v[i] -= b.v[i];
        return a;
    }
    static Lanes quotient(Lanes a, const Lanes& b) {
        for (int i = 0; i < LANES; ++i) a.v[i] /= b.v[i];
        return a;
    }
    static Lanes least(Lanes a, const Lanes& b) {
        for (int i = 0; i < LANES; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    static Lanes most(Lanes a, const Lanes& b) {
        for (int i = 0; i < LANES; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    static Lanes power_of_two(Lanes shifted) {
        for (T& lane : shifted.v) lane = from_bits((to_bits(lane) - (0x4b400000u - 127u)) << 23);
        return shifted;
    }
    // Of eight.
    T sum() const { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
};
using Vec = Lanes<float, 8>;
using Doubles = Lanes<double, 4>;

template <typename D>
struct Values {
    static constexpr bool kInterleaved = false;
    static constexpr int kChunk = 8, kParts = 1;
    static void load(const D* p, Vec* out) {
        for (int i = 0; i < 8; ++i) out[0].v[i] = to_float(p[i]);
    }
};

// Rounded to the nearest, ties to even.
inline void store_value(float* p, float x) { *p = x; }
inline void store_value(BFloat16* p, float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    p->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}
inline void store_value(Float16* p, float x) { *p = to_float16(x); }

// See simd_avx512.h.
template <typename D, typename V>
inline void read(const D* p, V& out) {
    for (int i = 0; i < V::kLanes; ++i) out.v[i] = to_float(p[i]);
}
template <typename D>
inline void write(D* p, const Vec& x) {
    for (int i = 0; i < Vec::kLanes; ++i) store_value(p + i, x.v[i]);
}
inline void read(const double* p, Doubles& out) { out = Doubles::load(p); }
template <typename V>
inline void add_to(double* p, const V& x) {
    for (int i = 0; i < V::kLanes; ++i) p[i] += x.v[i];
}

// For quantized.h: 16-bit integers of two neighbouring items of 16 rows, and what they are multiplied with.
struct Pair {
    int16_t v[2];
    static Pair of(const int16_t* p) { return {{p[0], p[1]}}; }
};
struct Words {
    int16_t v[32];
    static Words of_bytes(const uint8_t* p) {
        Words words;
        for (int i = 0; i < 32; ++i) words.v[i] = static_cast<int8_t>(p[i]);
        return words;
    }
};
// Four codes in each of these.
struct FourCodes {
    uint16_t v[32];
    static FourCodes load(const uint8_t* p) {
        FourCodes codes;
        for (int i = 0; i < 32; ++i) codes.v[i] = static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8);
        return codes;
    }
    template <int N>
    Words get() const {
        Words words;
        for (int i = 0; i < 32; ++i) words.v[i] = static_cast<int16_t>(v[i] >> (4 * N) & 15);
        return words;
    }
};
struct Sums {
    int32_t v[16];
    static Sums all(int32_t x) {
        Sums sums;
        for (int32_t& lane : sums.v) lane = x;
        return sums;
    }
    static Sums multiply_add(const Words& w, Pair x, Sums c) {
        for (int i = 0; i < 16; ++i) c.v[i] += int32_t{w.v[2 * i]} * x.v[0] + int32_t{w.v[2 * i + 1]} * x.v[1];
        return c;
    }
    void floats(Vec* out) const {
        for (int i = 0; i < 16; ++i) out[i / 8].v[i % 8] = static_cast<float>(v[i]);
    }
};
