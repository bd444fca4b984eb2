// The tiles in which the exact Gram product is computed, and what the kernels that compute them share: one on
// mma.sync for every architecture (gram_exact.cu), one on wgmma for Hopper (residue_wgmma.cu).
#pragma once

#include "moduli.cuh"
#include "residues.cuh"
#include "triangle.cuh"

namespace slicegpt {

constexpr int kTileRows = 256, kTileColumns = 128;
constexpr int kTileTall = kTileRows / kTileColumns;
static_assert(kTileColumns == kPlaneColumns, "a tile column has one count of moduli");

struct ResidueTiles {
    const int8_t* planes;
    const float* norm_bits;
    uint8_t* residues;  // [modulus][tile][kTileRows][kTileColumns], 0 <= residue < modulus
    int padded_columns;
    int tile_columns;
    int token_blocks;
};

// Whether any product of this tile needs modulus l: by the larger of the norms of its two row groups.
__device__ __forceinline__ bool tile_needs(const ResidueTiles& p, TilePosition tile, int l) {
    const int group = tile.row * kTileTall;
    float row_bits = p.norm_bits[group];
    if (group + 1 < p.tile_columns) row_bits = max(row_bits, p.norm_bits[group + 1]);
    return l < moduli_for(row_bits + p.norm_bits[tile.column] + 1);
}

__device__ __forceinline__ uint8_t* tile_residues(const ResidueTiles& p, int l, int64_t index) {
    return p.residues + (l * triangle_tiles<kTileTall>(p.tile_columns) + index) * (kTileRows * kTileColumns);
}

// residue = (sum mod p), for any int32 sum
struct Modulo {
    uint32_t p, reciprocal, offset;
    __device__ __forceinline__ explicit Modulo(int l) {
        p = 0;
#pragma unroll
        for (int i = 0; i < kMaxModuli; ++i) p = i == l ? modulus(i) : p;
        reciprocal = uint32_t((uint64_t(1) << 32) / p);
        offset = ((1u << 31) / p + 1) * p;  // a multiple of p that makes every sum positive
    }
    __device__ __forceinline__ uint32_t operator()(int sum) const {
        const uint32_t value = uint32_t(sum) + offset;
        const uint32_t remainder = value - __umulhi(value, reciprocal) * p;  // the quotient is at most 1 too small
        return min(remainder, remainder - p);  // unsigned: a negative difference is larger
    }
};

// The wgmma kernel for `moduli` moduli, in clusters of `blocks` (1 or 2) thread blocks. It runs only where
// has_residue_wgmma().
int residue_products_wgmma(const ResidueTiles& p, int moduli, int blocks, cudaStream_t stream);

// Whether the code that the driver loaded for the current device holds the wgmma kernel.
bool has_residue_wgmma();

}  // namespace slicegpt
