// norm_linear for 1 to 16 rows: the norm's row scale, bias and activation as the epilogue of one pass over the weights.
#include "activation.cuh"
#include "decode.cuh"

namespace slicegpt {
namespace {

struct Parameters {
    Product product;
    NormLinearArguments a;
    int gated_tiles;  // a gated tile has a gate row beside the row that it gates: 8 of each for a warp
};

template <typename T, int kTokens, bool kAligned>
__global__ __launch_bounds__(kMaxDecodeThreads, kBlocksPerProcessor<T, kTokens, kAligned>) void norm_linear_decode(
    const Parameters parameters) {
    const Product& p = parameters.product;
    const NormLinearArguments& a = parameters.a;
    __shared__ float scales[kMaxDecodeTokens];
    float* const warps = reinterpret_cast<float*>(ptx::dynamic_shared());
    float* const sums = warps + p.row_warps * p.column_warps * kTokens * kSumPitch;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int tile = blockIdx.x, half = a.n_scaled / 2;
    const bool gated = tile < parameters.gated_tiles;
    const int tile_rows = (gated ? kWarpRows / 2 : kWarpRows) * p.row_warps;
    const int tile_begin =
        gated ? tile * tile_rows : (a.gated ? a.n_scaled : 0) + (tile - parameters.gated_tiles) * tile_rows;
    const int tile_end = min(tile_begin + tile_rows, gated ? half : a.N);
    const int begin = tile_begin + warp / p.column_warps * (gated ? 8 : 16);
    // Rows beyond the end repeat the last one.
    const int low = min(begin + g, tile_end - 1), high = gated ? half + low : min(begin + g + 8, tile_end - 1);

    WarpWalk<T, kTokens, kAligned> walk(p, blockIdx.y, gridDim.y, low, high, begin >= tile_end);
    if (p.overlap) {
        if constexpr (kAligned && SLICEGPT_ARCH >= 900) {
            for (int r = warp; r < kWarpRows * p.row_warps; r += int(blockDim.x) / 32) {
                const int row = tile_begin + r / kWarpRows * (gated ? 8 : 16) + r % (gated ? 8 : 16);
                const bool up = gated && r % kWarpRows >= 8;
                if (row < tile_end) walk.prefetch_row(blockIdx.y, gridDim.y, up ? half + row : row);
            }
        } else {
            walk.prefetch();
        }
    }
    ptx::wait_for_previous_kernels();
    ptx::allow_next_kernel();
    walk.start();
    // While the first weights are in flight.
    for (int token = warp; token < a.tokens; token += int(blockDim.x) / 32) {
        const float scale = row_scale<T>(a, token);
        if (lane == 0) scales[token] = scale;
    }
    WarpSums<T, kTokens> mine;
    walk.run(mine);
    mine.store(warps + warp * kTokens * kSumPitch, lane);
    __syncthreads();
    if (!add_up(p, warps, kTokens, nullptr, sums)) return;

    const T* const bias = static_cast<const T*>(a.bias);
    const int sum_rows = kWarpRows * p.row_warps, columns = tile_end - tile_begin;
    for (int i = threadIdx.x; i < a.tokens * tile_rows; i += blockDim.x) {
        const int token = i / tile_rows, j = i % tile_rows;
        if (j >= columns) continue;
        const float* const row = sums + token * sum_rows;
        const float scale = scales[token];
        const int n = tile_begin + j;  // row of the weights
        float value;
        int column = n;
        if (gated) {
            const int at = j / 8 * 16 + j % 8;
            float gate = row[at] * scale, up = row[at + 8] * scale;
            if (bias) gate += to_float(bias[n]), up += to_float(bias[half + n]);
            value = activate(gate, a.activation) * up;
        } else {
            value = row[j];
            if (n < a.n_scaled) {
                value *= scale;
                if (bias) value += to_float(bias[n]);
                value = activate(value, a.activation);
            }
            if (a.gated) column -= half;
        }
        static_cast<T*>(a.y)[token * a.y_stride + column] = from_float<T>(value);
    }
}

template <typename T, int kTokens>
int launch(const Parameters& parameters, const DecodeLaunch& config, int tiles) {
    const bool aligned = aligned_16(parameters.product.first, sizeof(T));
    const auto kernel = aligned ? norm_linear_decode<T, kTokens, true> : norm_linear_decode<T, kTokens, false>;
    return ptx::launch_overlapped(config.overlap, kernel, dim3(unsigned(tiles), unsigned(config.split_k)),
                                  32 * config.row_warps * config.column_warps, decode_shared(config, kTokens),
                                  config.stream, parameters);
}

template <typename T>
int launch_dtype(const NormLinearArguments& a, const DecodeLaunch& config) {
    const int gated_tiles = a.gated ? int(divide_up(a.n_scaled / 2, 8 * config.row_warps)) : 0;
    const int plain_rows = a.gated ? a.N - a.n_scaled : a.N;
    const int tiles = gated_tiles + int(divide_up(plain_rows, kWarpRows * config.row_warps));
    const int chunks = int(divide_up(a.d, kChunkItems<T>));
    const Source source{a.weight, a.weight_stride, a.h, a.h_stride, a.d};
    const Parameters parameters{{source, source, chunks, chunks, a.tokens, config.row_warps, config.column_warps,
                                 config.partial, config.arrivals, config.overlap},
                                a,
                                gated_tiles};
    return a.tokens <= kFewTokens<T> ? launch<T, kFewTokens<T>>(parameters, config, tiles)
                                     : launch<T, kMaxDecodeTokens>(parameters, config, tiles);
}

}  // namespace

int decode_norm_linear(const NormLinearArguments& a, const DecodeLaunch& config) {
    if (!decode_takes(a.dtype)) return kBadDtype;
    if (!valid(config, a.tokens)) return kBadConfig;
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
