// Rows of a matrix: 16 bytes at a time, sums over them by one warp, the scale of the norm.
#pragma once

#include "decode.h"
#include "values.cuh"

namespace slicegpt {

template <typename T>
constexpr int kPieceItems = 16 / int(sizeof(T));

// 16 bytes at items k ... of a row, zeros beyond its end. Not aligned: item by item.
template <typename T, bool kAligned, bool kOnce>
__device__ __forceinline__ uint4 load_piece(const T* row, int k, int columns) {
    uint4 v{0u, 0u, 0u, 0u};
    if constexpr (kAligned) {
        // Here a row has no incomplete piece.
        if (k < columns) {
            if constexpr (kOnce)
                v = ptx::load_once_16(row + k);
            else
                v = *reinterpret_cast<const uint4*>(row + k);
        }
    } else {
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < kPieceItems<T>; ++i)
            if (k + i < columns) words[i * int(sizeof(T)) / 4] |= uint32_t(row[k + i].bits) << i * sizeof(T) * 8 % 32;
        v = {words[0], words[1], words[2], words[3]};
    }
    return v;
}

// Sum over the warp, the same in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) value += ptx::shuffle_xor(value, mask);
    return value;
}

template <typename T>
__device__ __forceinline__ float add_squares(float sum, const uint4& piece) {
    const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            sum = fmaf(__uint_as_float(words[i]), __uint_as_float(words[i]), sum);
        } else {
            const float x = to_float(T{uint16_t(words[i])}), y = to_float(T{uint16_t(words[i] >> 16)});
            sum = fmaf(y, y, fmaf(x, x, sum));
        }
    }
    return sum;
}

// The sum of squares of a row, from the sums of its parts, or from its items where those are not given. In float32, in
// an order that does not depend on the launch; the largest square of a float16, 4.3e9, leaves room for 1e28 of them.
template <typename T>
__device__ __forceinline__ float row_square(const NormLinearArguments& a, int64_t token) {
    constexpr int kStep = 32 * kPieceItems<T>;
    const int lane = threadIdx.x % 32;
    const T* const row = static_cast<const T*>(a.h) + token * a.h_stride;
    float sum = 0.f;
    if (a.sumsq) {
        const float* const parts = a.sumsq + token * a.parts;
        for (int i = lane; i < a.parts; i += 32) sum += parts[i];
    } else if (uintptr_t(row) % 16 == 0 && a.d % kPieceItems<T> == 0) {
#pragma unroll 4
        for (int k = lane * kPieceItems<T>; k < a.d; k += kStep)
            sum = add_squares<T>(sum, load_piece<T, true, false>(row, k, a.d));
    } else {
        for (int k = lane * kPieceItems<T>; k < a.d; k += kStep)
            sum = add_squares<T>(sum, load_piece<T, false, false>(row, k, a.d));
    }
    return warp_sum(sum);
}

template <typename T>
__device__ __forceinline__ float row_scale(const NormLinearArguments& a, int64_t token) {
    return rsqrtf(row_square<T>(a, token) / a.divisor + a.eps);
}

}  // namespace slicegpt
