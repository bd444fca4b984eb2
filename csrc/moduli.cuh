// The moduli of the exact Gram product, and integers represented by their residues (Chinese remainder
// theorem).
//
// Sixteen pairwise coprime numbers of at most 8 bits, the largest that there are: their symmetric residues
// fit int8, and the product of the first L is 2^7.84 per modulus or more. An integer v with 2 |v| < product
// is determined by its residues.
#pragma once

#include "ptx.cuh"

namespace slicegpt {

constexpr int kMaxModuli = 16;

constexpr uint32_t modulus(int l) {
    constexpr uint32_t values[kMaxModuli] = {256, 255, 253, 251, 247, 241, 239, 233,
                                             229, 227, 223, 217, 211, 199, 197, 193};
    return values[l];
}

constexpr bool pairwise_coprime() {
    for (int i = 0; i < kMaxModuli; ++i)
        for (int j = 0; j < i; ++j) {
            uint32_t a = modulus(i), b = modulus(j);
            while (b) {
                const uint32_t rest = a % b;
                a = b;
                b = rest;
            }
            if (a != 1) return false;
        }
    return true;
}
static_assert(pairwise_coprime(), "residues determine an integer only for coprime moduli");

// Bits, rounded down, of the product of the first `count` moduli.
__host__ __device__ constexpr float product_bits(int count) {
    constexpr float values[kMaxModuli + 1] = {0.f,    8.f,    15.99f, 23.97f, 31.94f,  39.89f,  47.80f,  55.70f, 63.57f,
                                              71.41f, 79.23f, 87.03f, 94.79f, 102.51f, 110.15f, 117.77f, 125.36f};
    return values[count];
}

// How many moduli hold every integer of at most `bits` bits, sign included.
__host__ __device__ inline int moduli_for(float bits) {
    int count = 0;
    while (count < kMaxModuli && product_bits(count) < bits) ++count;
    return count;
}

// Half of an odd modulus rounded down, 128 of 256: residues r - centre, 0 <= r < p, fit int8.
constexpr uint32_t centre(int l) { return modulus(l) / 2; }

// floor(v / p) = umulhi(v, reciprocal) for v < 2^21: the reciprocal is at most 1 / 2^32 too large, relative
// to 1 / p.
constexpr uint32_t reciprocal(int l) { return uint32_t(((uint64_t(1) << 32) + modulus(l) - 1) / modulus(l)); }

constexpr uint32_t inverse(uint32_t value, uint32_t p) {
    uint32_t candidate = 1;
    while (value % p * candidate % p != 1 % p) ++candidate;
    return candidate;
}

template <int l>
__device__ __forceinline__ uint32_t small_remainder(uint32_t value) {
    constexpr uint32_t kModulus = modulus(l), kReciprocal = reciprocal(l);
    return value - __umulhi(value, kReciprocal) * kModulus;
}

// The integer given by residues[0 .. count), as sign and magnitude in float64 (two roundings at most).
// Mixed radix (Garner): v = d0 + p0 (d1 + p1 (d2 + ...)); digit l comes from residue l and the digits before
// it.
struct MixedRadix {
    unsigned __int128 value = 0, weight = 1;
    uint32_t digits[kMaxModuli];
};

template <int l, int m>
__device__ __forceinline__ uint32_t next_digit(const MixedRadix& number, uint32_t residue) {
    if constexpr (m == l) {
        return residue;
    } else {
        constexpr uint32_t kInverse = inverse(modulus(m), modulus(l));
        // 2 p_l keeps the difference positive: digits of larger moduli reach 255 < 2 * 193.
        const uint32_t difference = residue + 2 * modulus(l) - number.digits[m];
        return next_digit<l, m + 1>(number, small_remainder<l>(difference * kInverse));
    }
}

template <int l, typename Residue>
__device__ __forceinline__ void add_digits(MixedRadix& number, int count, Residue residue) {
    if constexpr (l < kMaxModuli) {
        if (l >= count) return;
        number.digits[l] = next_digit<l, 0>(number, residue(l));
        number.value += number.weight * number.digits[l];
        number.weight *= modulus(l);
        add_digits<l + 1>(number, count, residue);
    }
}

template <typename Residue>
__device__ __forceinline__ double from_residues(int count, Residue residue) {
    MixedRadix number;
    add_digits<0>(number, count, residue);
    const bool negative = number.value > number.weight / 2;
    const unsigned __int128 magnitude = negative ? number.weight - number.value : number.value;
    const double value = double(uint64_t(magnitude >> 64)) * 0x1p64 + double(uint64_t(magnitude));
    return negative ? -value : value;
}

}  // namespace slicegpt
