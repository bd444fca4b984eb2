// The upper triangle of a symmetric matrix: which tiles cover it, and how a tile's values are added on both
// sides.
#pragma once

#include "ptx.cuh"

namespace slicegpt {

struct TilePosition {
    int row;     // in tile rows
    int column;  // in tile columns
};

// Tiles that are kTall tile columns high and one wide; those that touch the upper triangle, numbered row by
// row. kTall = 1 gives square tiles.
template <int kTall>
__host__ __device__ inline int64_t triangle_tiles(int64_t tile_columns) {
    const int64_t rows = (tile_columns + kTall - 1) / kTall;
    return rows * tile_columns - kTall * (rows * (rows - 1) / 2);
}

template <int kTall>
__device__ inline TilePosition triangle_tile(int index, int tile_columns) {
    int row = 0;
    while (index >= tile_columns - kTall * row) {
        index -= tile_columns - kTall * row;
        ++row;
    }
    return {row, kTall * row + index};
}

// The number of a tile, as triangle_tile counts.
template <int kTall>
__device__ inline int64_t triangle_index(TilePosition tile, int tile_columns) {
    return int64_t(tile.row) * tile_columns - kTall * (int64_t(tile.row) * (tile.row - 1) / 2) + tile.column -
           kTall * tile.row;
}

constexpr int kAddThreads = 256;

// Adds value(r, x) to C[row0 + r][column0 + x], r, x < 32, for the items on or above the diagonal, and copies
// the sums to the mirrored items. One block of kAddThreads; the transposition goes through shared memory so
// that both writes are coalesced. An item that is not finite becomes NaN (an infinity may have met its
// opposite in another order).
template <typename Value>
__device__ void add_symmetric_block(double* C, int64_t stride, int64_t columns, int64_t row0, int64_t column0,
                                    Value value) {
    __shared__ double sums[32][33];
    const int x = threadIdx.x % 32, y = threadIdx.x / 32;
#pragma unroll
    for (int r = y; r < 32; r += kAddThreads / 32) {
        const int64_t row = row0 + r, column = column0 + x;
        double sum = 0;
        if (row <= column && column < columns) {
            double* item = C + row * stride + column;
            sum = *item + value(r, x);
            if (!isfinite(sum)) sum = __longlong_as_double(0x7ff8000000000000ll);
            *item = sum;
        }
        sums[r][x] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int r = y; r < 32; r += kAddThreads / 32) {
        const int64_t row = column0 + r, column = row0 + x;
        if (row > column && row < columns) C[row * stride + column] = sums[x][r];
    }
}

}  // namespace slicegpt
