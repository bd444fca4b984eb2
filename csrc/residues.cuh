// From a block of tokens of X to int8 residue planes: the memory-bound half of the exact Gram product.
#pragma once

#include "gram.h"

namespace slicegpt {

// Column j of a token block is held as integers q = x / 2^scale[j], |q| < 2^kWindow. 53: then 2 * 53 +
// log2(tokens) + 1 bits of result fit sixteen moduli with 131071 tokens, and a float32 column may span 30
// binades.
constexpr int kWindow = 53;

constexpr int kPlaneColumns = 128;  // columns that share one count of moduli
constexpr int kPlaneTokens = 64;    // bytes of one column in a plane's block of tokens

struct ColumnSpan {
    int top;        // exponent of the leading bit of the largest magnitude; kNoBits without a finite nonzero value
    int low;        // exponent of the lowest bit set in any value
    float squares;  // sum of squares
    int unfit;      // an infinity or NaN was seen
};

// Offset of a 16-byte chunk (16 tokens) from row 0 of a token block's rows (columns of X) in a plane. Rows are
// 64 bytes, and their four chunks are permuted by pairs of rows: in shared memory the same chunk of 8
// consecutive rows then touches all 32 banks, and the permutation is wgmma's 64-byte swizzle
// (residue_wgmma.cu). Planes hold it in global memory already, so that a copy of any 8-row-aligned piece is a
// plain copy of consecutive bytes.
__host__ __device__ __forceinline__ int plane_chunk(int row, int chunk) {
    return row * kPlaneTokens + ((chunk ^ (row >> 1 & 3)) << 4);
}

// One block of tokens. Planes are K-major, which int8 tensor cores ask for: the byte of (modulus l, token k,
// column j) stands at (l * token_blocks + k / 64) * padded_columns * 64 + plane_chunk(j, k % 64 / 16) + k % 16,
// so that a tile's operands are contiguous.
struct ResidueBlock {
    const void* X;  // the block's first token
    int64_t X_stride;
    Dtype dtype;
    bool vectors;  // 16-byte loads are aligned
    int tokens;
    int columns;
    int padded_columns;  // a multiple of kPlaneColumns
    int token_blocks;    // of kPlaneTokens tokens
    int splits;          // of the tokens, in the scan

    uint8_t* fates;     // [tokens], from select_by_weight; tokens that do not fit are handed over
    ColumnSpan* spans;  // [splits, columns]
    int* scale;         // [padded_columns]
    float* norm_bits;   // [padded_columns / kPlaneColumns]: log2 of the largest column norm, in units of 2^scale
    int* plane_moduli;  // [padded_columns / kPlaneColumns]: planes that any product with these columns needs
    int* unfit;         // whether any value may not fit
    int8_t* planes;
};

// Measures the spans, chooses the scales, hands over the tokens that do not fit, and writes the planes.
int write_residues(const ResidueBlock& block, cudaStream_t stream);

}  // namespace slicegpt
