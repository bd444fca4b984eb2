// norm_linear and rotate_add for 1 to 16 rows: the launchers. Device pointers, sizes, strides in items, a stream;
// the columns of a matrix are contiguous. Every launcher returns 0, a CUDA error code (> 0) or a Status (< 0).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace slicegpt {

constexpr int kMaxDecodeTokens = 16;

// Launch configuration, chosen in slicegpt/ops/cuda/decode.py, and what a launch works with. A block multiplies a tile
// of 16 * row_warps rows of the weights (tile_n) with row_warps * column_warps warps, over one of split_k ranges of K.
// With split_k > 1, `partial` holds split_k * tiles * tokens * 16 * row_warps float32, and `arrivals` a zero for each
// tile (zero again afterwards).
struct DecodeLaunch {
    int row_warps;
    int column_warps;
    int split_k;
    float* partial;
    unsigned* arrivals;
    bool overlap;  // programmatic dependent launch: start before the kernel ahead in the stream has ended (9.0 on)
    cudaStream_t stream;
};

// y [tokens, columns] = [act(s (h W1') + bias) | h W2'], s = rsqrt(sum of squares / divisor + eps); W1 the first
// n_scaled rows of weight [N, d]. sumsq: float32 [tokens, parts] with row stride parts, or null: summed from h. gated:
// the first half of W1 gates the second.
struct NormLinearArguments {
    const void* h;
    int64_t h_stride;
    const void* weight;
    int64_t weight_stride;
    const void* bias;
    const float* sumsq;
    int parts;
    void* y;
    int64_t y_stride;
    Dtype dtype;
    int tokens, d, N, n_scaled;
    Activation activation;
    bool gated;
    float divisor, eps;
};

// h_next [tokens, N] = a W' + (shortcut ? h S' : h padded) + bias - (z F' padded), and the sums of its squares over
// every 32 columns. factor: F' as [rank, d] (the last rows of norm_linear's weight), or null; z: [tokens, rank].
struct RotateAddArguments {
    const void* a;
    int64_t a_stride;
    const void* weight;
    int64_t weight_stride;
    const void* h;
    int64_t h_stride;
    const void* shortcut;
    int64_t shortcut_stride;
    const void* bias;
    const void* z;
    int64_t z_stride;
    const void* factor;
    int64_t factor_stride;
    void* h_next;
    int64_t h_next_stride;
    float* sumsq;
    Dtype dtype;
    int tokens, K, d, N, rank;
};

int decode_norm_linear(const NormLinearArguments& arguments, const DecodeLaunch& config);
int decode_rotate_add(const RotateAddArguments& arguments, const DecodeLaunch& config);

// The epilogues alone, for any number of rows: `product` is float32 [tokens, N] with row stride N, what a library's
// GEMM left. norm_linear reads h for its sums of squares only, and ignores weight; rotate_add reads h only where
// `second`, the product with the shortcut, is null.
int norm_linear_epilogue(const NormLinearArguments& arguments, const float* product, cudaStream_t stream);
int rotate_add_epilogue(const RotateAddArguments& arguments, const float* product, const float* second,
                        cudaStream_t stream);

}  // namespace slicegpt
