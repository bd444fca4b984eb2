// Partial sums of the upper triangle: float64 tiles of 128 x 128, row-major, one for each tile and range of
// tokens. Adding them in the order of the ranges gives the same bits on every run; atomics would not.
#pragma once

#include "gram.h"

namespace slicegpt {

constexpr int kSumTile = 128;

struct TileSums {
    int tile_columns;
    int64_t tiles;
    int splits;    // ranges of tokens, so many that all multiprocessors finish at about the same time
    size_t bytes;  // [splits][tiles][kSumTile][kSumTile] doubles

    TileSums(int64_t tokens, int64_t columns);
};

// C += the sum over the ranges, mirrored. Does nothing where row_count is given and *row_count == 0.
int add_tile_sums(const TileSums& sums, const double* partial, double* C, int64_t C_stride, int64_t columns,
                  const int* row_count, cudaStream_t stream);

}  // namespace slicegpt
