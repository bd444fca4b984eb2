// The CPU's decode kernels: `norm_linear`, `rotate_add` and attention for a few rows, each byte of weights read once.
//
// Every operation is a function of a thread's number: it does that thread's share and touches nothing of the others',
// so it runs alone or as one step of a parallel region. What an output value is computed from, and in which order,
// depends neither on the thread that does it nor on their number. Strides are in items.
#pragma once

#include <cstdint>

#include "gram.h"

namespace slicegpt {
namespace cpu {

// Weights of 8 or 4 bits: (code - zero) * scale. 16 rows make a panel, whose codes stand as quantized.h reads them, 32
// items of all 16 rows a block; rows and items that are missing are zeros. slicegpt/ops/cpu/quantized.py makes them.
struct Quantized {
    const uint8_t* data;   // [panels, blocks, 512 or 256 bytes]; null: there are none
    const void* scales;    // [panels, groups, 16] of scale_dtype
    const uint8_t* zeros;  // [panels, groups, 16], codes of 0 to 15; or null: int4 has 8, int8 (signed) has 0
    Dtype scale_dtype;
    int bits;
    int64_t blocks, groups, group_blocks;
};

struct NormLinear {
    const void* h;  // [tokens, d]
    int64_t h_stride;
    // [N, d]; where `quantized` has the first n_scaled rows, the others alone. Of gates and values the panels of both
    // begin anew.
    const void* weight;
    int64_t weight_stride;
    const void* bias;    // [n_scaled] or null
    const float* sumsq;  // [tokens, parts] or null: computed from h
    int64_t parts;
    void* y;  // [tokens, N], with gates [tokens, N - n_scaled / 2]
    int64_t y_stride;
    int64_t tokens, d, N, n_scaled;
    Activation activation;
    bool gated;
    double divisor, eps;
    Quantized quantized;
};

struct RotateAdd {
    const void* a;  // [tokens, K]
    int64_t a_stride;
    const void* weight;  // [N, K]; where `quantized` has the first columns, the last ones alone
    int64_t weight_stride;
    const void* h;  // [tokens, d]
    int64_t h_stride;
    const void* shortcut;  // [N, d] or null: the identity, d <= N
    int64_t shortcut_stride;
    const void* bias;  // [N] or null
    void* h_next;      // [tokens, N]
    int64_t h_next_stride;
    float* sumsq;  // [tokens, ceil(N / kSumColumns)], see `row_sums`
    int64_t tokens, K, d, N;
    Quantized quantized;
    int64_t quantized_columns;  // of K
};

// One new token in each row of a batch: its key and value go into the cache, its query sees what the cache holds.
struct Attention {
    void* rows;  // [batch, v | k | q | anything]; attended values replace q
    int64_t rows_stride;
    void* keys;  // [batch, key_heads, capacity, head_dim]
    void* values;
    int64_t batch_stride, head_stride;
    const uint8_t* valid;  // [batch, capacity], 0 where a row is padded; or null
    int64_t valid_stride;
    const void* rotary;  // [positions, 2, rotary_dim], cosines and signed sines (the first half negative); or null
    const int64_t* positions;  // [batch], those of the new tokens; negative ones (padding) count as 0
    const void* norm;          // [key_heads + heads, head_dim], scales of the norm of keys and queries, or null
    double norm_eps;
    bool rotate_first;  // the norm comes behind the rotation
    int64_t batch, heads, key_heads, head_dim, rotary_dim;
    int64_t first, slot;  // slots [first, slot) of the cache are seen, `slot` is the new token's
};

// One instruction set's implementation.
struct Kernels {
    const char* name;
    void (*norm_linear)(Dtype, const NormLinear&, int thread, int threads);
    // The same without its product, which is there in the stored dtype; without gates `y` may be that.
    void (*finish)(Dtype, const NormLinear&, const void* product, int64_t stride, int thread, int threads);
    // Without the sums of squares, which need all of a row: `row_sums` once all threads are through.
    void (*rotate_add)(Dtype, const RotateAdd&, int thread, int threads);
    void (*row_sums)(Dtype, const RotateAdd&, int thread, int threads);
    void (*attend)(Dtype, const Attention&, int thread, int threads);
    GramKernels gram_fp64, gram_fast;
    const GramKernels* gram_bf16;  // "fast" sums of bfloat16 without weights, in products of it; or null
};

#if defined(__x86_64__) || defined(_M_X64)
// Null where the compiler or the processor has no such instructions; those that AVX-512 is a part of are not asked
// whether the processor has that.
const Kernels* amx();
const Kernels* avx512_bf16();
extern const Kernels kAvx512;
extern const Kernels kAvx2;
#endif
extern const Kernels kPortable;

}  // namespace cpu
}  // namespace slicegpt
