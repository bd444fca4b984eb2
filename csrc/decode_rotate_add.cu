// rotate_add for 1 to 16 rows: output projection, shortcut, residual and the sums of squares in one pass over the
// weights.
#include "decode.cuh"

namespace slicegpt {
namespace {

constexpr int kFactorStep = 16;  // rows of the factor that a warp contracts at a time

struct Parameters {
    Product product;
    RotateAddArguments a;
};

// What a lane reads for one step of 16 rows: four rows of four columns, and its tokens' z of them.
struct FactorStep {
    uint32_t f[4][2], tokens[4];
};

// `less` [token][row of the tile] = z F' for the tile's columns, 0 beyond its d. F' is stored [rank, d], the other way
// round than the weights, because norm_linear reads the same bytes as rows of its own: shortly before, so that they
// come from L2 here. A warp takes 32 columns: row r of F' is 64 contiguous bytes there. The tokens are mma's rows and
// the columns of F' its columns: lane (g, t) holds columns 4g ... 4g + 3 of rows 4t ... 4t + 3, and pairs of rows are
// put together by byte permutes. Float32: a lane is a column.
template <typename T, int kTokens>
__device__ __forceinline__ void subtract_factor(const Parameters& parameters, float* warps, float* less) {
    const RotateAddArguments& a = parameters.a;
    const Product& p = parameters.product;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int blocks = kWarpRows * p.row_warps / kSumColumns;
    const int workers = p.row_warps * p.column_warps / blocks, worker = warp / blocks;
    const int column0 = int(blockIdx.x) * kWarpRows * p.row_warps + warp % blocks * kSumColumns;
    const T *const factor = static_cast<const T*>(a.factor), *const z = static_cast<const T*>(a.z);
    const int first = (int(blockIdx.y) * workers + worker) * kFactorStep, step = int(gridDim.y) * workers * kFactorStep;
    float* const mine = warps + warp * a.tokens * kSumColumns;

    if constexpr (sizeof(T) == 4) {
        float sums[kMaxDecodeTokens] = {};
        const int column = column0 + lane;
        for (int r0 = first; r0 < a.rank; r0 += step)
            for (int r = r0; r < min(r0 + kFactorStep, a.rank); ++r) {
                const float f = column < a.d ? to_float(factor[r * a.factor_stride + column]) : 0.f;
#pragma unroll
                for (int n = 0; n < kMaxDecodeTokens; ++n)
                    if (n < a.tokens) sums[n] = fmaf(to_float(z[n * a.z_stride + r]), f, sums[n]);
            }
#pragma unroll
        for (int n = 0; n < kMaxDecodeTokens; ++n)
            if (n < a.tokens) mine[n * kSumColumns + lane] = sums[n];
    } else {
        constexpr int kTokenHalves = kTokens / 8;
        const int g = lane / 4, t = lane % 4, column = column0 + 4 * g;
        const bool aligned = (uintptr_t(factor) | uintptr_t(a.factor_stride * int64_t(sizeof(T)))) % 8 == 0;
        float sums[4][4] = {};
        // Two steps' loads are on their way at a time, as in the walk over the weights: one by one, each would wait for
        // L2's latency.
        FactorStep even, odd;
        const auto load = [&](FactorStep& s, int r0) {
            s = {};
            const int r = r0 + 4 * t;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (r + i >= a.rank) continue;
                const T* const row = factor + (r + i) * a.factor_stride;
                if (aligned && column + 4 <= a.d) {
                    const uint2 four = *reinterpret_cast<const uint2*>(row + column);
                    s.f[i][0] = four.x, s.f[i][1] = four.y;
                } else {
#pragma unroll
                    for (int q = 0; q < 4; ++q)
                        if (column + q < a.d) s.f[i][q / 2] |= uint32_t(row[column + q].bits) << q % 2 * 16;
                }
#pragma unroll
                for (int h = 0; h < kTokenHalves; ++h)
                    if (g + 8 * h < a.tokens)
                        s.tokens[i / 2 * 2 + h] |= uint32_t(z[(g + 8 * h) * a.z_stride + r + i].bits) << i % 2 * 16;
            }
        };
        const auto contract = [&](const FactorStep& s) {
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const uint32_t pick = q % 2 ? 0x7632u : 0x5410u;  // the upper or lower halves of two words
                const uint32_t pairs[2] = {ptx::permute_bytes(s.f[0][q / 2], s.f[1][q / 2], pick),
                                           ptx::permute_bytes(s.f[2][q / 2], s.f[3][q / 2], pick)};
                mma_half<WarpSums<T, 8>::kBfloat16>(sums[q], s.tokens, pairs);
            }
        };
        load(even, first);
        load(odd, first + step);
        for (int r0 = first; r0 < a.rank; r0 += 2 * step) {
            contract(even);
            load(even, r0 + 2 * step);
            contract(odd);  // zeros beyond the rank
            load(odd, r0 + 3 * step);
        }
        // sums[q][2h + i]: token g + 8h, mma's column 2t + i, which is column 4 (2t + i) + q of the 32.
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (g + i / 2 * 8 < a.tokens)
                    mine[(g + i / 2 * 8) * kSumColumns + 4 * (2 * t + i % 2) + q] = sums[q][i];
    }
    __syncthreads();
    const int rows = kWarpRows * p.row_warps;
    for (int i = threadIdx.x; i < a.tokens * rows; i += blockDim.x) {
        const int token = i / rows, row = i % rows;
        float sum = 0.f;
        for (int w = 0; w < workers; ++w)
            sum += warps[((w * blocks + row / kSumColumns) * a.tokens + token) * kSumColumns + row % kSumColumns];
        less[i] = sum;
    }
    __syncthreads();
}

template <typename T, int kTokens, bool kAligned>
__global__ __launch_bounds__(kMaxDecodeThreads, kBlocksPerProcessor<T, kTokens, kAligned>) void rotate_add_decode(
    const Parameters parameters) {
    const Product& p = parameters.product;
    const RotateAddArguments& a = parameters.a;
    const int rows = kWarpRows * p.row_warps, all_warps = p.row_warps * p.column_warps;
    float* const warps = reinterpret_cast<float*>(ptx::dynamic_shared());
    float* const sums = warps + all_warps * kTokens * (a.factor ? kSumColumns : kSumPitch);
    float* const less = sums + kTokens * rows;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int tile_begin = int(blockIdx.x) * rows, begin = tile_begin + warp / p.column_warps * kWarpRows;
    const int low = min(begin + g, a.N - 1), high = min(begin + g + 8, a.N - 1);

    WarpWalk<T, kTokens, kAligned> walk(p, blockIdx.y, gridDim.y, low, high, begin >= a.N);
    if (p.overlap || a.factor) {
        if constexpr (kAligned && SLICEGPT_ARCH >= 900) {
            for (int r = warp; r < rows; r += all_warps)
                if (tile_begin + r < a.N) walk.prefetch_row(blockIdx.y, gridDim.y, tile_begin + r);
        } else {
            walk.prefetch();
        }
    }
    ptx::wait_for_previous_kernels();
    ptx::allow_next_kernel();
    if (a.factor) subtract_factor<T, kTokens>(parameters, warps, less);  // while the first weights come into L2
    walk.start();
    WarpSums<T, kTokens> mine;
    walk.run(mine);
    mine.store(warps + warp * kTokens * kSumPitch, lane);
    __syncthreads();
    if (!add_up(p, warps, kTokens, a.factor ? less : nullptr, sums)) return;

    const T *const h = static_cast<const T*>(a.h), *const bias = static_cast<const T*>(a.bias);
    const int blocks = (a.N + kSumColumns - 1) / kSumColumns;
    // A multiple of 32 items: a warp has one token and 32 columns.
    for (int i = threadIdx.x; i < a.tokens * rows; i += blockDim.x) {
        const int token = i / rows, n = tile_begin + i % rows;
        float square = 0.f;
        if (n < a.N) {
            float value = sums[i];
            if (bias) value += to_float(bias[n]);
            if (!a.shortcut && n < a.d) value += to_float(h[token * a.h_stride + n]);
            const T stored = from_float<T>(value);
            static_cast<T*>(a.h_next)[token * a.h_next_stride + n] = stored;
            square = to_float(stored) * to_float(stored);
        }
        square = warp_sum(square);
        if (lane == 0 && n < a.N) a.sumsq[int64_t(token) * blocks + n / kSumColumns] = square;
    }
}

template <typename T, int kTokens>
int launch(const Parameters& parameters, const DecodeLaunch& config) {
    const RotateAddArguments& a = parameters.a;
    const bool aligned =
        aligned_16(parameters.product.first, sizeof(T)) && aligned_16(parameters.product.second, sizeof(T));
    const auto kernel = aligned ? rotate_add_decode<T, kTokens, true> : rotate_add_decode<T, kTokens, false>;
    const int rows = kWarpRows * config.row_warps, warps = config.row_warps * config.column_warps;
    const size_t shared =
        a.factor ? sizeof(float) * kTokens * size_t(warps * kSumColumns + 2 * rows) : decode_shared(config, kTokens);
    return ptx::launch_overlapped(config.overlap, kernel,
                                  dim3(unsigned(divide_up(a.N, rows)), unsigned(config.split_k)), 32 * warps, shared,
                                  config.stream, parameters);
}

template <typename T>
int launch_dtype(const RotateAddArguments& a, const DecodeLaunch& config) {
    const Source first{a.weight, a.weight_stride, a.a, a.a_stride, a.K};
    const Source second = a.shortcut ? Source{a.shortcut, a.shortcut_stride, a.h, a.h_stride, a.d} : first;
    const int first_chunks = int(divide_up(a.K, kChunkItems<T>));
    const int chunks = first_chunks + (a.shortcut ? int(divide_up(a.d, kChunkItems<T>)) : 0);
    const Parameters parameters{{first, second, first_chunks, chunks, a.tokens, config.row_warps, config.column_warps,
                                 config.partial, config.arrivals, config.overlap},
                                a};
    return a.tokens <= kFewTokens<T> ? launch<T, kFewTokens<T>>(parameters, config)
                                     : launch<T, kMaxDecodeTokens>(parameters, config);
}

}  // namespace

int decode_rotate_add(const RotateAddArguments& a, const DecodeLaunch& config) {
    if (!decode_takes(a.dtype)) return kBadDtype;
    // A sum of squares covers 32 columns of one block.
    if (!valid(config, a.tokens) || config.row_warps % 2) return kBadConfig;
    switch (a.dtype) {
        case Dtype::kFloat16:
            return launch_dtype<Float16>(a, config);
        case Dtype::kBfloat16:
            return launch_dtype<Bfloat16>(a, config);
        default:
            return launch_dtype<Float32>(a, config);
    }
}

}  // namespace slicegpt
