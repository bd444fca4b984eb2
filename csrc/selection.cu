// Selection of tokens on the device: no count ever comes back to the host, so nothing synchronises.
#include "selection.cuh"

#include "device.h"
#include "ptx.cuh"

namespace slicegpt {
namespace {

constexpr int kThreads = 1024;

__global__ __launch_bounds__(kThreads) void select_by_weight_kernel(const double* weight, int64_t tokens,
                                                                    uint8_t* fates) {
    const int64_t token = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (token >= tokens) return;
    const double value = weight ? weight[token] : 1.0;
    fates[token] = value == 1 ? kTaken : value == 0 ? kAbsent : kHandedOver;
}

// One block, so that the order is that of the tokens: a running offset, and in each step the ranks within the
// warps.
__global__ __launch_bounds__(kThreads) void append_kernel(const uint8_t* fates, int64_t tokens, int64_t first,
                                                          int* rows, int* count) {
    __shared__ int warp_counts[kThreads / 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int offset = *count;
    for (int64_t start = 0; start < tokens; start += kThreads) {
        const int64_t token = start + threadIdx.x;
        const bool handed_over = token < tokens && fates[token] == kHandedOver;
        const unsigned mask = ptx::ballot(handed_over);
        if (lane == 0) warp_counts[warp] = __popc(mask);
        __syncthreads();
        int before = 0, total = 0;
        for (int w = 0; w < kThreads / 32; ++w) {
            before += w < warp ? warp_counts[w] : 0;
            total += warp_counts[w];
        }
        if (handed_over) rows[offset + before + __popc(mask & ((1u << lane) - 1))] = int(first + token);
        offset += total;
        __syncthreads();
    }
    if (threadIdx.x == 0) *count = offset;
}

}  // namespace

int select_by_weight(const double* weight, int64_t tokens, uint8_t* fates, cudaStream_t stream) {
    return ptx::launch(select_by_weight_kernel, dim3{unsigned(divide_up(tokens, kThreads))}, kThreads, 0, stream,
                       weight, tokens, fates);
}

int append_handed_over(const uint8_t* fates, int64_t tokens, int64_t first, int* rows, int* count,
                       cudaStream_t stream) {
    return ptx::launch(append_kernel, dim3{1}, kThreads, 0, stream, fates, tokens, first, rows, count);
}

}  // namespace slicegpt
