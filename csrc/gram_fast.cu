// C += Xᵀ diag(weight) X with half-precision tensor cores: for those who take 1e-7 of error for the speed.
//
// Products of half-format numbers are exact in float32; the tensor core's sums are not (they are truncated,
// so the diagonal comes out small, by about 2^-25 of the running sum for each step of 16 tokens: 1e-7 after
// kPromote tokens). Then a sum leaves the tensor core for a pair of float32, not for a float64: converting
// and adding a tile's 16384 values takes 1024 cycles on Hopper and 8192 on cards with few float64 units, the
// pair's 4 instructions 512 on all of them, against 1650 cycles of tensor core work for 128 tokens (62 % of
// its peak).
//
// Sums beyond float32's range become NaN. Tokens with a weight other than 0 and 1 go through the float64
// kernel.
#include <climits>

#include "device.h"
#include "gram.h"
#include "mma.cuh"
#include "panels.cuh"
#include "selection.cuh"
#include "tile_sums.cuh"
#include "values.cuh"

namespace slicegpt {
namespace {

constexpr int kTile = kSumTile;
constexpr int kThreads = kPanelThreads;
constexpr int kStages = 3;
constexpr int kPromote = 128;
// 16 bytes of padding put the 8 rows of a matrix load on different banks.
constexpr int kPitch = kPanelColumns * 2 + 16;

template <typename T>
using Loader = PanelLoader<T, kPitch>;
constexpr int kStageBytes = 2 * Loader<Float16>::kPanelBytes;

struct Parameters {
    PanelSource source;
    const uint8_t* fates;  // null: all tokens are taken
    int64_t tokens;
    int tile_columns;
    double* partial;
};

// high + low += value (Dekker). Exact but for the rounding of `low` where |high| >= |value|; else the error
// is at most 2^-24 |value|, no more than what the tensor core's sum carries already.
__device__ __forceinline__ void add(float& high, float& low, float value) {
    const float sum = high + value;
    low += value - (sum - high);
    high = sum;
}

template <typename T, bool kBfloat16>
__global__ __launch_bounds__(kThreads, 1) void gram_fast_tiles(const Parameters p) {
    constexpr int kTokens = Loader<T>::kTokens;
    unsigned char* const stages = ptx::dynamic_shared();
    const TokenRange range(p.tokens, blockIdx.y, gridDim.y, kTokens);
    const TilePosition tile = triangle_tile<1>(blockIdx.x, p.tile_columns);
    const Loader<T> loader(p.source, range.end, tile);
    const int panel_b = (loader.panels - 1) * Loader<T>::kPanelBytes;
    const auto load = [&](int s) {
        loader.load(stages + s % kStages * kStageBytes, range.begin + int64_t(s) * kTokens,
                    [&](int64_t k) { return p.fates && p.fates[k] != kTaken ? int64_t(-1) : k; });
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    // A lane's row address in a transposed matrix load: A in the order (columns 0-7, 8-15) x (tokens 0-7,
    // 8-15), B in the order (tokens 0-7, 8-15) x (columns 0-7, 8-15).
    const int a_offset = (lane % 8 + lane / 16 * 8) * kPitch + (warp_row + lane / 8 % 2 * 8) * 2;
    const int b_offset = (lane % 8 + lane / 8 % 2 * 8) * kPitch + (warp_column + lane / 16 * 8) * 2 + panel_b;
    float sums[4][4][4] = {}, high[4][4][4] = {}, low[4][4][4] = {};

    for (int s = 0; s < kStages - 1; ++s) {
        if (s < range.stages) load(s);
        copy_commit();
    }
    for (int it = 0; it < range.stages; ++it) {
        copy_wait<kStages - 2>();
        __syncthreads();
        const unsigned char* const stage = stages + it % kStages * kStageBytes;
#pragma unroll
        for (int k = 0; k < kTokens; k += 16) {
            uint32_t b[4][2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t pair[4];
                ptx::ldmatrix_x4_trans(pair, stage + b_offset + k * kPitch + 32 * j);
                b[2 * j][0] = pair[0], b[2 * j][1] = pair[1];
                b[2 * j + 1][0] = pair[2], b[2 * j + 1][1] = pair[3];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t a[4];
                ptx::ldmatrix_x4_trans(a, stage + a_offset + k * kPitch + 32 * i);
#pragma unroll
                for (int j = 0; j < 4; ++j) mma_half<kBfloat16>(sums[i][j], a, b[j]);
            }
            // The next stage is fetched while the tensor cores are busy with this step.
            if (k == 0) {
                if (it + kStages - 1 < range.stages) load(it + kStages - 1);
                copy_commit();
            }
        }
        if ((it + 1) % (kPromote / kTokens) == 0 || it + 1 == range.stages) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int q = 0; q < 4; ++q) {
                        add(high[i][j][q], low[i][j][q], sums[i][j][q]);
                        sums[i][j][q] = 0;
                    }
        }
    }

    double* const partial = p.partial + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * (kTile * kTile);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const int row = warp_row + 16 * i + q / 2 * 8 + lane / 4;
                const int column = warp_column + 8 * j + lane % 4 * 2 + q % 2;
                partial[row * kTile + column] = double(high[i][j][q]) + double(low[i][j][q]);
            }
}

// Where everything stands in the workspace; the float64 kernel reuses the partial sums' place.
struct Layout {
    TileSums sums;
    size_t count, fates, rows, bytes;
    Layout(int64_t tokens, int64_t columns) : sums(tokens, columns) {
        count = round_up(sums.bytes, 256);
        fates = count + 256;
        rows = fates + round_up(tokens, 256);
        bytes = rows + tokens * sizeof(int);
    }
};

template <typename T, bool kBfloat16>
int launch_typed(const GramArguments& a) {
    const Layout at(a.tokens, a.columns);
    if (a.workspace_bytes < at.bytes) return kWorkspaceTooSmall;
    if (a.tokens > INT_MAX || at.sums.tiles > INT_MAX) return kTooLarge;
    unsigned char* const base = static_cast<unsigned char*>(a.workspace);
    int* const count = reinterpret_cast<int*>(base + at.count);
    int* const rows = reinterpret_cast<int*>(base + at.rows);
    uint8_t* const fates = a.weight ? base + at.fates : nullptr;
    double* const partial = reinterpret_cast<double*>(base);
    const Parameters p{panel_source(a.X, a.X_stride, a.columns, sizeof(T)), fates, a.tokens, at.sums.tile_columns,
                       partial};
    int status = kOk;
    if (a.weight) {
        status = report(cudaMemsetAsync(count, 0, sizeof(int), a.stream));
        if (status == kOk) status = select_by_weight(a.weight, a.tokens, fates, a.stream);
        if (status == kOk) status = append_handed_over(fates, a.tokens, 0, rows, count, a.stream);
    }
    const dim3 grid{unsigned(at.sums.tiles), unsigned(at.sums.splits)};
    if (status == kOk)
        status = ptx::launch(gram_fast_tiles<T, kBfloat16>, grid, kThreads, kStages * kStageBytes, a.stream, p);
    if (status == kOk) status = add_tile_sums(at.sums, partial, a.C, a.C_stride, a.columns, nullptr, a.stream);
    if (status != kOk || !a.weight) return status;
    return gram_fp64_rows(a, rows, count);
}

}  // namespace

size_t gram_fast_workspace(int64_t tokens, int64_t columns) {
    return tokens == 0 || columns == 0 ? 0 : Layout(tokens, columns).bytes;
}

int gram_fast(const GramArguments& a) {
    // Turing's tensor cores know no bfloat16.
    if (a.dtype != Dtype::kFloat16 && !(a.dtype == Dtype::kBfloat16 && capability_major() >= 8)) return kBadDtype;
    if (a.tokens == 0 || a.columns == 0) return kOk;
    return a.dtype == Dtype::kFloat16 ? launch_typed<Float16, false>(a) : launch_typed<Bfloat16, true>(a);
}

}  // namespace slicegpt
