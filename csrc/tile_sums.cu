#include "tile_sums.cuh"

#include "device.h"
#include "triangle.cuh"

namespace slicegpt {
namespace {

constexpr int kMaxSplits = 64;
constexpr size_t kLimit = size_t(512) << 20;

__global__ __launch_bounds__(kAddThreads) void add_tiles(const double* partial, int tile_columns, int splits, double* C,
                                                         int64_t C_stride, int64_t columns, const int* row_count) {
    if (row_count && *row_count == 0) return;
    const TilePosition tile = triangle_tile<1>(blockIdx.x, tile_columns);
    const int row = blockIdx.y / 4 * 32, column = blockIdx.y % 4 * 32;
    const int64_t row0 = int64_t(tile.row) * kSumTile + row, column0 = int64_t(tile.column) * kSumTile + column;
    if (row0 > column0 || column0 >= columns) return;
    add_symmetric_block(C, C_stride, columns, row0, column0, [&](int r, int x) {
        double sum = 0;
        for (int s = 0; s < splits; ++s)
            sum += partial[(int64_t(s) * gridDim.x + blockIdx.x) * (kSumTile * kSumTile) + (row + r) * kSumTile +
                           column + x];
        return sum;
    });
}

int choose_splits(int64_t tokens, int64_t tiles) {
    const int64_t processors = multiprocessors();
    const int64_t by_memory = int64_t(kLimit / (sizeof(double) * kSumTile * kSumTile)) / tiles;
    const int64_t most = max(int64_t(1), min(min(int64_t(kMaxSplits), by_memory), divide_up(tokens, 512)));
    int best = 1;
    int64_t best_cost = INT64_MAX;
    for (int64_t splits = 1; splits <= most; ++splits) {
        // Waves of blocks, times the tokens a block walks through and what its start and its partial sums
        // cost.
        const int64_t cost = divide_up(tiles * splits, processors) * (divide_up(tokens, splits) + 256);
        if (cost < best_cost) best_cost = cost, best = int(splits);
    }
    return best;
}

}  // namespace

TileSums::TileSums(int64_t tokens, int64_t columns)
    : tile_columns(int(divide_up(columns, kSumTile))),
      tiles(triangle_tiles<1>(tile_columns)),
      splits(choose_splits(tokens, tiles)),
      bytes(sizeof(double) * kSumTile * kSumTile * tiles * splits) {}

int add_tile_sums(const TileSums& sums, const double* partial, double* C, int64_t C_stride, int64_t columns,
                  const int* row_count, cudaStream_t stream) {
    constexpr unsigned kBlocks = (kSumTile / 32) * (kSumTile / 32);
    return ptx::launch(add_tiles, dim3{unsigned(sums.tiles), kBlocks}, kAddThreads, 0, stream, partial,
                       sums.tile_columns, sums.splits, C, C_stride, columns, row_count);
}

}  // namespace slicegpt
