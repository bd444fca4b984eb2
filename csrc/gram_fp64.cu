// C += Xᵀ diag(weight) X in float64: a triangular rank-N update on float64 tensor cores.
//
// One block computes a 128 x 128 tile of the upper triangle over a range of tokens, 8 warps of 64 x 32 each:
// 64 float64 accumulators a lane (128 registers) are what fits beside the fragments in 255 registers, so one
// block of 8 warps fills a multiprocessor. X stays in its own format in shared memory and is converted when a
// fragment is loaded: a half-format fragment then costs one 16-byte load for 8 rows of A, and its conversions
// to float64 (16 a cycle and multiprocessor: 48 cycles a token) hide behind the tensor cores (128 cycles a
// token on Hopper, 256 on Ampere).
//
// Which column of X stands in which row of a fragment is free. Lane group g takes 16 / sizeof(T) consecutive
// columns, so that all its fragments come from 16-byte loads; the rows of a stage are padded by 32 bytes,
// which puts the 8 lanes of a load phase (4 tokens x 2 groups) on 8 different 16-byte banks.
#include "gram.h"
#include "mma.cuh"
#include "panels.cuh"
#include "tile_sums.cuh"
#include "values.cuh"

namespace slicegpt {
namespace {

constexpr int kTile = kSumTile;
constexpr int kThreads = kPanelThreads;
constexpr int kStages = 3;
constexpr int kStep = 4 * kDoubleSteps;
// After this many tokens the accumulators are added to the partial sums and start again at zero: the rounding
// error of a sum of n terms grows like sqrt(n), and the diagonal (all terms positive) would be 2e-14 off
// after 262144 tokens. The tests choose fewer.
#ifndef SLICEGPT_PROMOTE_TOKENS
#define SLICEGPT_PROMOTE_TOKENS 8192
#endif

template <typename T>
using Loader = PanelLoader<T, kPanelColumns* int(sizeof(T)) + 32>;
template <typename T>
constexpr int kStageBytes = 2 * Loader<T>::kPanelBytes + Loader<T>::kTokens * int(sizeof(double));
// Steps of a stage that the compiler may interleave; without tensor cores a step is long by itself (and the
// shuffles take minutes to schedule).
template <typename T>
constexpr int kUnroll = SLICEGPT_ARCH >= 800 ? Loader<T>::kTokens / kStep : 1;

struct Parameters {
    PanelSource source;
    const double* weight;
    const int* rows;       // null: all tokens
    const int* row_count;  // null: `tokens`
    int64_t tokens;
    int tile_columns;
    double* partial;
};

// Fragment f of a warp's columns: the column, relative to the warp's first, that lane group g holds.
template <int kItems>
__device__ __forceinline__ constexpr int fragment_column(int f, int g) {
    return f / kItems * 8 * kItems + g * kItems + f % kItems;
}

// The values of kFragments fragments (8 columns each) of one token, kItems adjacent columns a load.
template <typename T, int kFragments, int kItems>
__device__ __forceinline__ void load_fragments(double (&values)[kFragments], const unsigned char* row, int g) {
    struct alignas(kItems * sizeof(T)) Group {
        T items[kItems];
    };
#pragma unroll
    for (int c = 0; c < kFragments / kItems; ++c) {
        const Group group = reinterpret_cast<const Group*>(row)[c * 8 + g];
#pragma unroll
        for (int e = 0; e < kItems; ++e) values[c * kItems + e] = to_double(group.items[e]);
    }
}

// kWeighted: tokens have weights. A branch on that inside the step would end every scheduling block, and the
// conversions of the next fragments would wait for this step's products instead of running beside them.
template <typename T, bool kWeighted>
__global__ __launch_bounds__(kThreads, 1) void gram_fp64_tiles(const Parameters p) {
    constexpr int kItemsA = 16 / int(sizeof(T)), kItemsB = kItemsA < 4 ? kItemsA : 4;
    constexpr int kPitch = kPanelColumns * int(sizeof(T)) + 32, kTokens = Loader<T>::kTokens;
    unsigned char* const stages = ptx::dynamic_shared();
    const int64_t tokens = p.row_count ? int64_t(*p.row_count) : p.tokens;
    if (tokens == 0) return;
    const TokenRange range(tokens, blockIdx.y, gridDim.y, kTokens);
    const TilePosition tile = triangle_tile<1>(blockIdx.x, p.tile_columns);
    const Loader<T> loader(p.source, range.end, tile);
    const int panel_b = (loader.panels - 1) * Loader<T>::kPanelBytes;
    double* const partial = p.partial + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * (kTile * kTile);

    const auto load = [&](int s) {
        unsigned char* const stage = stages + s % kStages * kStageBytes<T>;
        const int64_t first = range.begin + int64_t(s) * kTokens;
        loader.load(stage, first, [&](int64_t k) {
            const int64_t row = p.rows ? int64_t(p.rows[k]) : k;
            return kWeighted && p.weight[row] == 0 ? int64_t(-1) : row;
        });
        if (kWeighted && threadIdx.x < kTokens) {
            const int64_t k = first + threadIdx.x;
            double* const weights = reinterpret_cast<double*>(stage + 2 * Loader<T>::kPanelBytes);
            weights[threadIdx.x] = k < range.end ? p.weight[p.rows ? p.rows[k] : k] : 0.0;
        }
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    double sums[4][4][4] = {};  // [fragment of 16 rows][of 8 columns][item]

    for (int s = 0; s < kStages - 1; ++s) {
        if (s < range.stages) load(s);
        copy_commit();
    }
    for (int it = 0; it < range.stages; ++it) {
        copy_wait<kStages - 2>();
        __syncthreads();
        const unsigned char* const stage = stages + it % kStages * kStageBytes<T>;
        [[maybe_unused]] const double* const weights =
            reinterpret_cast<const double*>(stage + 2 * Loader<T>::kPanelBytes);
#pragma unroll(kUnroll<T>)
        for (int k = 0; k < kTokens; k += kStep) {
            double a[kDoubleSteps][8], b[kDoubleSteps][4];
#pragma unroll
            for (int s = 0; s < kDoubleSteps; ++s) {
                const unsigned char* row = stage + (k + 4 * s + t) * kPitch;
                load_fragments<T, 8, kItemsA>(a[s], row + warp_row * sizeof(T), g);
                load_fragments<T, 4, kItemsB>(b[s], row + panel_b + warp_column * sizeof(T), g);
                if constexpr (kWeighted) {
                    const double weight = weights[k + 4 * s + t];
#pragma unroll
                    for (int i = 0; i < 8; ++i) a[s][i] *= weight;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                double rows[2 * kDoubleSteps];
#pragma unroll
                for (int s = 0; s < kDoubleSteps; ++s) rows[2 * s] = a[s][2 * i], rows[2 * s + 1] = a[s][2 * i + 1];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    double column[kDoubleSteps];
#pragma unroll
                    for (int s = 0; s < kDoubleSteps; ++s) column[s] = b[s][j];
                    mma_f64(sums[i][j], rows, column);
                }
            }
            // The next stage is fetched while the tensor cores are busy with this step.
            if (k == 0) {
                if (it + kStages - 1 < range.stages) load(it + kStages - 1);
                copy_commit();
            }
        }

        constexpr int kPeriod = SLICEGPT_PROMOTE_TOKENS / kTokens;
        if ((it + 1) % kPeriod == 0 || it + 1 == range.stages) {
            const bool first = it < kPeriod;
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int j = 0; j < 4; j += 2)
#pragma unroll
                        for (int q = 0; q < 2; ++q) {
                            // Fragments j and j + 1 hold neighbouring columns for every format.
                            const int row = warp_row + fragment_column<kItemsA>(2 * i + h, g);
                            const int column = warp_column + fragment_column<kItemsB>(j, 2 * t + q);
                            double2* const pair = reinterpret_cast<double2*>(partial + row * kTile + column);
                            const double2 before = first ? double2{0, 0} : *pair;
                            *pair = {before.x + sums[i][j][2 * h + q], before.y + sums[i][j + 1][2 * h + q]};
                            sums[i][j][2 * h + q] = sums[i][j + 1][2 * h + q] = 0;
                        }
        }
    }
    // A range without tokens still owns a tile of the sums.
    if (range.stages == 0)
        for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) partial[i] = 0;
}

template <typename T>
int launch_typed(const GramArguments& a, const int* rows, const int* row_count) {
    const TileSums sums(a.tokens, a.columns);
    if (a.workspace_bytes < sums.bytes) return kWorkspaceTooSmall;
    if (sums.tiles > INT32_MAX) return kTooLarge;
    double* const partial = static_cast<double*>(a.workspace);
    const Parameters p{panel_source(a.X, a.X_stride, a.columns, sizeof(T)),
                       a.weight,
                       rows,
                       row_count,
                       a.tokens,
                       sums.tile_columns,
                       partial};
    const auto kernel = a.weight ? gram_fp64_tiles<T, true> : gram_fp64_tiles<T, false>;
    const int status = ptx::launch(kernel, dim3{unsigned(sums.tiles), unsigned(sums.splits)}, kThreads,
                                   kStages * kStageBytes<T>, a.stream, p);
    if (status != kOk) return status;
    return add_tile_sums(sums, partial, a.C, a.C_stride, a.columns, row_count, a.stream);
}

}  // namespace

size_t gram_fp64_workspace(int64_t tokens, int64_t columns) {
    return tokens == 0 || columns == 0 ? 0 : TileSums(tokens, columns).bytes;
}

int gram_fp64_rows(const GramArguments& a, const int* rows, const int* row_count) {
    if (a.tokens == 0 || a.columns == 0) return kOk;
    switch (a.dtype) {
        case Dtype::kFloat16:
            return launch_typed<Float16>(a, rows, row_count);
        case Dtype::kBfloat16:
            return launch_typed<Bfloat16>(a, rows, row_count);
        case Dtype::kFloat32:
            return launch_typed<Float32>(a, rows, row_count);
        case Dtype::kFloat64:
            return launch_typed<Float64>(a, rows, row_count);
    }
    return kBadDtype;
}

int gram_fp64(const GramArguments& a) { return gram_fp64_rows(a, nullptr, nullptr); }

}  // namespace slicegpt
