// The epilogues of norm_linear and rotate_add alone, after a library's GEMM with float32 products: on Turing,
// whose tensor cores Triton does not reach, and anywhere else. Memory-bound: a block takes some columns of one token.
#include "activation.cuh"
#include "device.h"
#include "rows.cuh"

namespace slicegpt {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4 * kThreads;  // of the output, for a block

template <typename T>
__global__ __launch_bounds__(kThreads) void finish_norm_linear(const NormLinearArguments a, const float* product) {
    const int64_t token = blockIdx.x;
    const float scale = row_scale<T>(a, token);
    const T* const bias = static_cast<const T*>(a.bias);
    const float* const row = product + token * a.N;
    T* const y = static_cast<T*>(a.y) + token * a.y_stride;
    const int half = a.gated ? a.n_scaled / 2 : 0, scaled = a.gated ? half : a.n_scaled;
    const int end = min(int(blockIdx.y + 1) * kColumns, a.N - half);
    for (int n = int(blockIdx.y) * kColumns + int(threadIdx.x); n < end; n += kThreads) {
        float value;
        if (n >= scaled) {
            value = row[n + half];
        } else {
            value = row[n] * scale;
            if (bias) value += to_float(bias[n]);
            value = activate(value, a.activation);
            if (a.gated) {
                float up = row[half + n] * scale;
                if (bias) up += to_float(bias[half + n]);
                value *= up;
            }
        }
        y[n] = from_float<T>(value);
    }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void finish_rotate_add(const RotateAddArguments a, const float* product,
                                                              const float* second) {
    const int64_t token = blockIdx.x;
    const int parts = (a.N + kSumColumns - 1) / kSumColumns;
    const T *const h = static_cast<const T*>(a.h) + token * a.h_stride, *const bias = static_cast<const T*>(a.bias);
    const int begin = int(blockIdx.y) * kColumns;
    // Whole warps: 32 columns each.
    for (int i = threadIdx.x; i < kColumns; i += kThreads) {
        const int n = begin + i;
        float square = 0.f;
        if (n < a.N) {
            float value = product[token * a.N + n];
            if (second) value += second[token * a.N + n];
            if (bias) value += to_float(bias[n]);
            if (!second && n < a.d) value += to_float(h[n]);
            const T stored = from_float<T>(value);
            static_cast<T*>(a.h_next)[token * a.h_next_stride + n] = stored;
            square = to_float(stored) * to_float(stored);
        }
        square = warp_sum(square);
        if (threadIdx.x % 32 == 0 && n < a.N) a.sumsq[token * parts + n / kSumColumns] = square;
    }
}

// Calls `with` on a value of the format's type.
template <typename F>
int by_dtype(Dtype dtype, F with) {
    switch (dtype) {
        case Dtype::kFloat16:
            return with(Float16{});
        case Dtype::kBfloat16:
            return with(Bfloat16{});
        case Dtype::kFloat32:
            return with(Float32{});
        default:
            return kBadDtype;
    }
}

}  // namespace

int norm_linear_epilogue(const NormLinearArguments& a, const float* product, cudaStream_t stream) {
    const int columns = a.N - (a.gated ? a.n_scaled / 2 : 0);
    if (divide_up(columns, kColumns) > 65535) return kTooLarge;
    const dim3 grid(unsigned(a.tokens), unsigned(divide_up(columns, kColumns)));
    return by_dtype(a.dtype, [&](auto item) {
        return ptx::launch(finish_norm_linear<decltype(item)>, grid, kThreads, 0, stream, a, product);
    });
}

int rotate_add_epilogue(const RotateAddArguments& a, const float* product, const float* second, cudaStream_t stream) {
    if (divide_up(a.N, kColumns) > 65535) return kTooLarge;
    const dim3 grid(unsigned(a.tokens), unsigned(divide_up(a.N, kColumns)));
    return by_dtype(a.dtype, [&](auto item) {
        return ptx::launch(finish_rotate_add<decltype(item)>, grid, kThreads, 0, stream, a, product, second);
    });
}

}  // namespace slicegpt
