// Products of a few rows (1 to 16 tokens) with a large weight matrix: what the decode kernels share.
//
// Such a product is bound by reading the weights, so everything serves one aim: enough bytes in flight. By Little's law
// an H200 needs 4.8 TB/s * 0.7 us = 3.4 MB, 25 KB on each of its 132 multiprocessors (an H100 18 KB). A lane keeps two
// chunks of 4 loads of 16 bytes: 128 bytes, and 64 while it waits for the older chunk. With 16 warps on a
// multiprocessor that is 32 to 64 KB, with the 32 that 64 registers allow 64 to 128 KB.
//
// Half precision goes through the tensor cores even for one token: the 16 rows of mma.m16n8k16 are rows of the weights,
// its columns are tokens (those beyond the last repeat it and are dropped). On CUDA cores 8 tokens would cost 83 of the
// 128 FMA a cycle and multiprocessor at that bandwidth, and as many conversions. The contraction does not care for the
// order of k as long as both operands agree, so lane t of a quad takes 8 consecutive k of a row, one load of 16 bytes,
// where the instruction's layout has two pairs apart. The weights go straight to registers: no other warp needs them.
// The tokens' rows come through L1; the warps of a block that work on other rows of the weights read the same ones.
//
// Float32 has the same shape, with FMA and a sum over the quad at the end (tf32 tensor cores would drop 13 bits).
#pragma once

#include "decode.h"
#include "device.h"
#include "mma.cuh"
#include "rows.cuh"
#include "values.cuh"

namespace slicegpt {

constexpr int kWarpRows = 16;
constexpr int kMaxDecodeThreads = 512;
constexpr int kMaxDecodeWarps = kMaxDecodeThreads / 32;
// Floats between tokens in a warp's sums: a quad's lanes write 2 tokens apart, 40 t + g modulo 32 differ for all lanes.
constexpr int kSumPitch = kWarpRows + 4;

// input [tokens, columns] times weight [*, columns] transposed.
struct Source {
    const void* weight;
    int64_t weight_stride;
    const void* input;
    int64_t input_stride;
    int columns;
};

struct Product {
    Source first, second;
    int first_chunks, chunks;  // of the first source, of both
    int tokens;
    int row_warps, column_warps;
    float* partial;
    unsigned* arrivals;
    bool overlap;
};

// A warp reads 128 bytes of each of its rows at a time.
template <typename T>
constexpr int kChunkItems = 8 * kPieceItems<T>;

// Two pieces of two rows (g and g + 8 of the warp's 16).
struct WeightChunk {
    uint4 low[2], high[2];
};

// A warp's 16 rows times the tokens; kTokens is tokens rounded up to what the registers are laid out for.
template <typename T, int kTokens>
struct WarpSums {
    static constexpr bool kBfloat16 = sizeof(T) == 2 && Format<T>::kExponent == 8;
    float c[kTokens / 8][4] = {};

    template <bool kAligned>
    __device__ __forceinline__ void add(const WeightChunk& w, const Source& source, int tokens, int k, int columns,
                                        int g) {
        uint4 b[kTokens / 8][2];
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n) {
            const T* row = static_cast<const T*>(source.input) + min(g + 8 * n, tokens - 1) * source.input_stride;
#pragma unroll
            for (int j = 0; j < 2; ++j)
                b[n][j] = load_piece<T, kAligned, false>(row, k + j * 4 * kPieceItems<T>, columns);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t first[4] = {w.low[j].x, w.high[j].x, w.low[j].y, w.high[j].y};
            const uint32_t second[4] = {w.low[j].z, w.high[j].z, w.low[j].w, w.high[j].w};
#pragma unroll
            for (int n = 0; n < kTokens / 8; ++n) {
                const uint32_t front[2] = {b[n][j].x, b[n][j].y}, back[2] = {b[n][j].z, b[n][j].w};
                mma_half<kBfloat16>(c[n], first, front);
                mma_half<kBfloat16>(c[n], second, back);
            }
        }
    }

    // To [token][row of the warp], kSumPitch apart.
    __device__ __forceinline__ void store(float* target, int lane) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) target[(8 * n + 2 * t + i % 2) * kSumPitch + g + i / 2 * 8] = c[n][i];
    }
};

template <int kTokens>
struct WarpSums<Float32, kTokens> {
    float c[kTokens][2] = {};

    template <bool kAligned>
    __device__ __forceinline__ void add(const WeightChunk& w, const Source& source, int tokens, int k, int columns,
                                        int) {
#pragma unroll
        for (int n = 0; n < kTokens; ++n) {
            if (n >= tokens) break;
            const Float32* row = static_cast<const Float32*>(source.input) + n * source.input_stride;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint4 b = load_piece<Float32, kAligned, false>(row, k + j * 16, columns);
                c[n][0] = dot(w.low[j], b, c[n][0]);
                c[n][1] = dot(w.high[j], b, c[n][1]);
            }
        }
    }
    __device__ __forceinline__ static float dot(const uint4& w, const uint4& b, float sum) {
        sum = fmaf(__uint_as_float(w.x), __uint_as_float(b.x), sum);
        sum = fmaf(__uint_as_float(w.y), __uint_as_float(b.y), sum);
        sum = fmaf(__uint_as_float(w.z), __uint_as_float(b.z), sum);
        return fmaf(__uint_as_float(w.w), __uint_as_float(b.w), sum);
    }

    __device__ __forceinline__ void store(float* target, int lane) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int n = 0; n < kTokens; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float sum = c[n][h];
                sum += ptx::shuffle_xor(sum, 1);
                sum += ptx::shuffle_xor(sum, 2);
                if (t == n % 4) target[n * kSumPitch + g + 8 * h] = sum;
            }
    }
};

// The registers' layouts: half precision for 8 and 16 tokens, float32 for 4 and 16.
template <typename T>
constexpr int kFewTokens = sizeof(T) == 4 ? 4 : 8;

// 64 registers a thread where they suffice, else 128.
template <typename T, int kTokens, bool kAligned>
constexpr int kBlocksPerProcessor = kAligned && kTokens <= 8 && sizeof(T) == 2 ? 2 : 1;

// Turns of all warps along K whose chunks are fetched into L2 ahead of everything else.
constexpr int kPrefetchTurns = 4;

// A warp's walk over the chunks of its rows. low and high are the rows of the weights that this lane reads.
template <typename T, int kTokens, bool kAligned>
class WarpWalk {
  public:
    __device__ WarpWalk(const Product& p, int split, int split_k, int64_t low, int64_t high, bool idle)
        : p_(p), low_(low), high_(high) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        lane_ = lane, k_ = lane % 4 * kPieceItems<T>;
        chunk_ = int(int64_t(p.chunks) * split / split_k) + warp % p.column_warps;
        end_ = idle ? 0 : int(int64_t(p.chunks) * (split + 1) / split_k);
    }

    // Before the tokens' rows may be read: the first chunks on their way into L2. Not into registers: what the previous
    // kernel wrote could be weights, and a prefetch has no value to be stale.
    __device__ void prefetch() const {
        const int chunk = chunk_ + lane_ % 4 * p_.column_warps;
        if (chunk >= end_) return;
        const Position at = position(chunk);
        ptx::prefetch_l2(at.weight + low_ * at.stride + at.k);
        ptx::prefetch_l2(at.weight + high_ * at.stride + at.k);
    }

    // The same from Hopper on, where one instruction fetches all that the block's warps will read of a row at first:
    // the chunks of 4 turns, which lie one behind the other. Called with a row that all lanes agree on. Vectors only:
    // what it takes are multiples of 16 bytes.
    __device__ void prefetch_row(int split, int split_k, int64_t row) const {
        static_assert(kAligned);
        const int first = int(int64_t(p_.chunks) * split / split_k);
        int last = min(first + kPrefetchTurns * p_.column_warps, int(int64_t(p_.chunks) * (split + 1) / split_k));
        // Not beyond the first source: the second one's turn comes much later.
        if (first < p_.first_chunks) last = min(last, p_.first_chunks);
        const Position at = position(first);
        const int items = min((last - first) * kChunkItems<T>, at.columns - at.k);
        if (lane_ == 0 && items > 0)
            ptx::prefetch_bulk_l2(at.weight + row * at.stride + at.k, uint32_t(items) * uint32_t(sizeof(T)));
    }

    // The two oldest chunks on their way into registers.
    __device__ void start() {
        fetch(even_, chunk_);
        fetch(odd_, chunk_ + p_.column_warps);
    }

    __device__ void run(WarpSums<T, kTokens>& sums) {
        const int step = p_.column_warps;
        for (int chunk = chunk_; chunk < end_; chunk += 2 * step) {
            add(sums, even_, chunk);
            fetch(even_, chunk + 2 * step);
            if (chunk + step < end_) add(sums, odd_, chunk + step);
            fetch(odd_, chunk + 3 * step);
        }
    }

  private:
    struct Position {
        const T* weight;
        int64_t stride;
        int k, columns;
    };
    __device__ __forceinline__ Position position(int chunk) const {
        const bool second = chunk >= p_.first_chunks;
        return {static_cast<const T*>(second ? p_.second.weight : p_.first.weight),
                second ? p_.second.weight_stride : p_.first.weight_stride,
                (second ? chunk - p_.first_chunks : chunk) * kChunkItems<T>,
                second ? p_.second.columns : p_.first.columns};
    }
    __device__ __forceinline__ void fetch(WeightChunk& w, int chunk) const {
        const Position at = position(chunk);
        const int columns = chunk < end_ ? at.columns : 0;
        const T *low = at.weight + low_ * at.stride, *high = at.weight + high_ * at.stride;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int k = at.k + k_ + j * 4 * kPieceItems<T>;
            w.low[j] = load_piece<T, kAligned, true>(low, k, columns);
            w.high[j] = load_piece<T, kAligned, true>(high, k, columns);
        }
    }
    __device__ __forceinline__ void add(WarpSums<T, kTokens>& sums, const WeightChunk& w, int chunk) const {
        const Position at = position(chunk);
        const Source source{nullptr, 0, chunk >= p_.first_chunks ? p_.second.input : p_.first.input,
                            chunk >= p_.first_chunks ? p_.second.input_stride : p_.first.input_stride, 0};
        sums.template add<kAligned>(w, source, p_.tokens, at.k + k_, at.columns, lane_ / 4);
    }

    const Product& p_;
    int64_t low_, high_;
    int lane_, k_, chunk_, end_;
    WeightChunk even_, odd_;
};

// Adds up what the block's warps hold, in fixed order, and with split_k > 1 what the blocks of the other splits hold.
// `sums` becomes [token][row of the tile]. True in the block that finishes the tile: the last to arrive, which adds all
// of them in the order of the splits, whoever that is. `more`: null, or something to subtract, shaped as `sums`.
__device__ inline bool add_up(const Product& p, const float* warps, int kept_tokens, const float* more, float* sums) {
    const int rows = kWarpRows * p.row_warps, items = p.tokens * rows;
    const int tile = blockIdx.x, split = blockIdx.y, split_k = gridDim.y;
    float* const partial = p.partial + (int64_t(tile) * split_k) * items;
    for (int i = threadIdx.x; i < items; i += blockDim.x) {
        const int token = i / rows, row = i % rows;
        const float* from =
            warps + (row / kWarpRows * p.column_warps * kept_tokens + token) * kSumPitch + row % kWarpRows;
        float sum = more ? -more[i] : 0.f;
        for (int w = 0; w < p.column_warps; ++w) sum += from[w * kept_tokens * kSumPitch];
        if (split_k == 1)
            sums[i] = sum;
        else
            partial[int64_t(split) * items + i] = sum;
    }
    if (split_k == 1) {
        __syncthreads();
        return true;
    }
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(p.arrivals + tile, 1u) == unsigned(split_k - 1);
        if (last) p.arrivals[tile] = 0;  // for the next launch, or the next replay of a CUDA graph
    }
    __syncthreads();
    if (!last) return false;
    __threadfence();
    for (int i = threadIdx.x; i < items; i += blockDim.x) {
        float sum = 0.f;
        for (int s = 0; s < split_k; ++s) sum += partial[int64_t(s) * items + i];
        sums[i] = sum;
    }
    __syncthreads();
    return true;
}

inline bool aligned_16(const void* pointer, int64_t stride, int64_t columns, size_t item) {
    return (uintptr_t(pointer) | uintptr_t(stride * int64_t(item)) | uintptr_t(columns * int64_t(item))) % 16 == 0;
}
inline bool aligned_16(const Source& source, size_t item) {
    return aligned_16(source.weight, source.weight_stride, source.columns, item) &&
           aligned_16(source.input, source.input_stride, source.columns, item);
}

// Shared memory of a launch: the warps' sums, the tile's.
inline size_t decode_shared(const DecodeLaunch& config, int kept_tokens) {
    return sizeof(float) * kept_tokens *
           size_t(config.row_warps * config.column_warps * kSumPitch + config.row_warps * kWarpRows);
}

inline bool valid(const DecodeLaunch& config, int tokens) {
    return tokens >= 1 && tokens <= kMaxDecodeTokens && config.row_warps >= 1 && config.column_warps >= 1 &&
           config.split_k >= 1 && config.row_warps * config.column_warps <= kMaxDecodeWarps &&
           config.split_k <= 65535 && (config.split_k == 1 || (config.partial && config.arrivals));
}

// Turing's tensor cores know no bfloat16.
inline bool decode_takes(Dtype dtype) {
    return dtype == Dtype::kFloat16 || dtype == Dtype::kFloat32 ||
           (dtype == Dtype::kBfloat16 && capability_major() >= 8);
}

}  // namespace slicegpt
