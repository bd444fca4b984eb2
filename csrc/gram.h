// C += Xᵀ diag(weight) X: the launchers. Plain C++, no torch: device pointers, sizes, strides (in items) and
// a stream. Every launcher returns 0, a CUDA error code (> 0) or a Status (< 0), and synchronises nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace slicegpt {

// C: float64, symmetric, [columns, columns] with row stride C_stride; X: [tokens, columns] with row stride
// X_stride, columns contiguous; weight: float64 [tokens], contiguous, or null. A token of weight 0 is absent:
// whatever its row of X holds does not reach C. Only the upper triangle of C is read; both triangles are
// written. A result that is not finite is stored as NaN.
struct GramArguments {
    double* C;
    int64_t C_stride;
    const void* X;
    int64_t X_stride;
    Dtype dtype;
    const double* weight;
    int64_t tokens;
    int64_t columns;
    void* workspace;
    size_t workspace_bytes;
    cudaStream_t stream;
};

// Float64 products and sums (tensor cores on sm_80 and later), any dtype.
size_t gram_fp64_workspace(int64_t tokens, int64_t columns);
int gram_fp64(const GramArguments& arguments);

// The same over the `*row_count` tokens listed in `rows` (both in device memory, at most arguments.tokens):
// the way in which gram_exact and gram_fast hand over what their arithmetic cannot represent.
int gram_fp64_rows(const GramArguments& arguments, const int* rows, const int* row_count);

// Exact integer products on int8 tensor cores; float16, bfloat16, float32. All kernels give the same bits. kAutomatic
// is mma.sync until the wgmma kernel has been measured on hardware; kWgmma, and kWgmmaPairs (the same by pairs of
// thread blocks that copy for each other), are refused with kNoWgmma where gram_exact_has_wgmma() is false.
enum class ExactKernel : int { kAutomatic = 0, kMmaSync = 1, kWgmma = 2, kWgmmaPairs = 3 };
size_t gram_exact_workspace(int64_t tokens, int64_t columns, Dtype dtype);
int gram_exact(const GramArguments& arguments, ExactKernel kernel);

// Whether the current device is of compute capability 9.0 and runs the code compiled for sm_90a.
bool gram_exact_has_wgmma();

// Half-precision products, compensated float32 sums; float16, bfloat16.
size_t gram_fast_workspace(int64_t tokens, int64_t columns);
int gram_fast(const GramArguments& arguments);

}  // namespace slicegpt
