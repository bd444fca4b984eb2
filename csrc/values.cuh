// The number formats of X, as raw bits: conversion to float64 and decomposition into integer times power of
// two.
#pragma once

#include "ptx.cuh"

namespace slicegpt {

// Formats are told apart by type, so that kernels can be templates over them.
struct Float16 {
    uint16_t bits;
};
struct Bfloat16 {
    uint16_t bits;
};
struct Float32 {
    uint32_t bits;
};
struct Float64 {
    uint64_t bits;
};

template <typename T>
struct Format;
template <>
struct Format<Float16> {
    static constexpr int kFraction = 10, kExponent = 5;
};
template <>
struct Format<Bfloat16> {
    static constexpr int kFraction = 7, kExponent = 8;
};
template <>
struct Format<Float32> {
    static constexpr int kFraction = 23, kExponent = 8;
};

__device__ __forceinline__ float to_float(Float16 x) { return ptx::half_to_float(x.bits); }
__device__ __forceinline__ float to_float(Bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float32 x) { return __uint_as_float(x.bits); }
// Rounded to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ Float32 from_float<Float32>(float value) {
    return {__float_as_uint(value)};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) {
    return {ptx::float_to_half(value)};
}
template <>
__device__ __forceinline__ Bfloat16 from_float<Bfloat16>(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};  // a NaN stays one
    return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <typename T>
__device__ __forceinline__ double to_double(T x) {
    return to_float(x);
}
__device__ __forceinline__ double to_double(Float64 x) { return __longlong_as_double((long long)x.bits); }

// x = (negative ? -1 : 1) * significand * 2^exponent, significand < 2^(fraction bits + 1); an infinity or NaN
// has finite == false.
struct Decomposed {
    uint32_t significand;
    int exponent;
    bool negative;
    bool finite;
};

template <typename T>
__device__ __forceinline__ Decomposed decompose(T x) {
    constexpr int kFraction = Format<T>::kFraction, kExponent = Format<T>::kExponent;
    constexpr uint32_t kLargest = (1u << kExponent) - 1;
    constexpr int kBias = (1 << (kExponent - 1)) - 1;
    const uint32_t bits = x.bits;
    const uint32_t field = (bits >> kFraction) & kLargest;
    const uint32_t fraction = bits & ((1u << kFraction) - 1);
    Decomposed d;
    d.significand = field ? fraction | (1u << kFraction) : fraction;
    d.exponent = int(field ? field : 1u) - kBias - kFraction;
    d.negative = bits >> (kFraction + kExponent);
    d.finite = field != kLargest;
    return d;
}

}  // namespace slicegpt
