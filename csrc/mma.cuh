// Tensor-core steps of one shape on every architecture: composed from what the architecture has.
// Fragment layouts are those of the PTX manual's larger shapes; with g = lane / 4 and t = lane % 4:
//   A[16 x K] (row): rows g and g + 8
//   B[K x 8] (col): column g
//   C[16 x 8]: c[2h + p] at row g + 8h, column 2t + p
#pragma once

#include "ptx.cuh"

namespace slicegpt {

// Tokens a float64 step contracts: 8 on Hopper (DMMA.16x8x8), 4 elsewhere.
#if SLICEGPT_ARCH >= 900
constexpr int kDoubleSteps = 2;
#else
constexpr int kDoubleSteps = 1;
#endif

// C[16x8] += A[16 x 4S] B[4S x 8], S = kDoubleSteps: a[2s + h] is row g + 8h, k = 4s + t; b[s] is k = 4s + t,
// column g.
__device__ __forceinline__ void mma_f64(double (&c)[4], const double (&a)[2 * kDoubleSteps],
                                        const double (&b)[kDoubleSteps]) {
#if SLICEGPT_ARCH >= 900
    ptx::mma_f64_m16n8k8(c, a, b);
#elif SLICEGPT_ARCH >= 800
    ptx::mma_f64_m8n8k4(c[0], c[1], a[0], b[0]);
    ptx::mma_f64_m8n8k4(c[2], c[3], a[1], b[0]);
#else
    // No float64 tensor cores: the same fragments by shuffles. A Turing card does 2 float64 FMA a cycle and
    // SM, so the 8 FMA of a lane (256 a warp, 128 cycles) hide the 16 shuffles of 64 bits.
    const int lane = threadIdx.x % 32, g4 = lane & ~3, t = lane & 3;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const double upper = ptx::shuffle(a[0], g4 + k), lower = ptx::shuffle(a[1], g4 + k);
        const double left = ptx::shuffle(b[0], 8 * t + k), right = ptx::shuffle(b[0], 8 * t + 4 + k);
        c[0] = fma(upper, left, c[0]);
        c[1] = fma(upper, right, c[1]);
        c[2] = fma(lower, left, c[2]);
        c[3] = fma(lower, right, c[3]);
    }
#endif
}

// C[16x8] += A[16x32] B[32x8] of int8, exact in int32.
// a[2j + h]: row g + 8h, k = 16j + 4t ... + 3; b[j]: k = 16j + 4t ... + 3, column g.
__device__ __forceinline__ void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if SLICEGPT_ARCH >= 800
    ptx::mma_s8_m16n8k32(c, a, b);
#else
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        ptx::mma_s8_m8n8k16(c[0], c[1], a[2 * j], b[j]);
        ptx::mma_s8_m8n8k16(c[2], c[3], a[2 * j + 1], b[j]);
    }
#endif
}

// C[16x8] += A[16x16] B[16x8] in half precision with float32 accumulators.
// a[2j + h]: row g + 8h, k = 8j + 2t, + 1; b[j]: k = 8j + 2t, + 1, column g.
template <bool kBfloat16>
__device__ __forceinline__ void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if SLICEGPT_ARCH >= 800
    if constexpr (kBfloat16)
        ptx::mma_bf16_m16n8k16(c, a, b);
    else
        ptx::mma_f16_m16n8k16(c, a, b);
#else
    // Turing has no bfloat16 tensor cores; gram_supports keeps such calls away.
    if constexpr (!kBfloat16) {
        ptx::mma_f16_m16n8k8(c, a[0], a[1], b[0]);
        ptx::mma_f16_m16n8k8(c, a[2], a[3], b[1]);
    }
#endif
}

// Asynchronous copies where the architecture has them, plain ones on Turing.
__device__ __forceinline__ void copy_16(void* shared, const void* global, int bytes) {
#if SLICEGPT_ARCH >= 800
    ptx::cp_async_16(shared, global, bytes);
#else
    if (bytes == 16) {
        *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
        return;
    }
    // The rest of a row's last 16 bytes may lie outside of the allocation: items are read one by one.
#pragma unroll
    for (int i = 0; i < 8; ++i)
        static_cast<uint16_t*>(shared)[i] = 2 * i < bytes ? static_cast<const uint16_t*>(global)[i] : uint16_t(0);
#endif
}
__device__ __forceinline__ void copy_commit() {
#if SLICEGPT_ARCH >= 800
    ptx::cp_async_commit();
#endif
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
#if SLICEGPT_ARCH >= 800
    ptx::cp_async_wait<kPending>();
#endif
}

}  // namespace slicegpt
