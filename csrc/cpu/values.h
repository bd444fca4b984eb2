// The stored number formats as bits, and what every instruction set does with them in the same way. Included into an
// unnamed namespace of each: nothing here may be merged between files that are compiled for different processors.
#pragma once

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Range {
    int64_t begin, end;
};

// A thread's share of `total` items, in units that keep threads off each other's cache lines.
inline Range share(int64_t total, int64_t unit, int thread, int threads) {
    const int64_t units = (total + unit - 1) / unit;
    return {least(units * thread / threads * unit, total), least(units * (thread + 1) / threads * unit, total)};
}
constexpr int kUnit = 8;
