// The CPU's `gram_` and `cross_gram_`: C += leftᵀ diag(weight) right in float64, the operands upcast while they are
// packed.
//
// A run of tokens of both operands is packed into panels of a few columns, [panel][token][column], which the tiles of C
// are then computed from: a tile's sums stay in registers for the whole run and are added to C once. Which thread does
// a tile changes nothing of what it is computed from, nor the order.
#pragma once

#include <cstdint>

#include "../types.h"

namespace slicegpt {
namespace cpu {

struct Kernels;

// Tokens that are packed at a time.
constexpr int kPackedTokens = 32;

// Strides are in items.
struct Columns {
    const void* data;
    int64_t row_stride, column_stride, count;
};

struct Gram {
    Columns left;   // [N, K]
    Columns right;  // [N, D]; for a triangle: left
    Dtype dtype;
    const int64_t* rows;   // [tokens], those of left and right that count; or null: 0, 1, ...
    const double* weight;  // [tokens] or null: ones
    int64_t tokens;
    double* C;      // [K, D], contiguous
    bool triangle;  // K = D: the upper triangle of C is read and computed, the lower one is its mirror image
    bool fast;      // float32 products and sums within a run
};

// Tokens [first, first + count), kPackedTokens or fewer, of one operand, to positions [at, at + count) of panels that
// hold `run` tokens.
struct Packing {
    const Columns& from;
    Dtype dtype;
    const int64_t* rows;
    const double* weight;
    int64_t first, count, at, run;
    void* plain;     // or null
    void* weighted;  // or null; with `weight` null the same as plain
};

// Panels [first_left, last_left) of the left operand times one panel of the right one.
struct Tiles {
    const void *left, *right;  // the first panels of all
    int64_t tokens, run;
    int64_t first_left, last_left, panel;
    int64_t K, D;
    double* C;
    bool triangle;
};

// One instruction set's implementation with products in float64, in float32, or of bfloat16.
struct GramKernels {
    int panel_columns, item_bytes;
    void (*pack)(const Packing&);
    void (*multiply)(const Tiles&);
};

// The whole operation. Infinities among the sums become NaN, as the columns they come from have no covariance.
void run_gram(const Kernels& kernels, const Gram& op, int threads);

}  // namespace cpu
}  // namespace slicegpt
