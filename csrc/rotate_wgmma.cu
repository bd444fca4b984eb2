// rotate_add for many rows on Hopper's wgmma: h_next = [a | h] [W | S]' + bias, or a W' + h + bias, and the sums of
// squares of its rows.
//
// A dense shortcut is a second source of one K loop: the same barriers, stages and accumulators, other tensor maps.
// Nothing is drained between them.
//
// The tile is 128 x 256, the two warpgroups that multiply take 64 rows each: an instruction reads 2 + 8 KB of shared
// memory in the 128 cycles of its 64 x 256 x 16 products, 80 of the 128 bytes a cycle. A stage is 64 columns of both
// operands, 48 KB in 1024 cycles. A pair of blocks, two tiles one above the other, reads the same weights: each copies
// one half of their rows for both, and 32 of the 48 bytes a cycle are left to come from L2.
//
// Persistent: a block (or pair) takes every so-many-th tile, and the thread that copies runs ahead into the next one
// while the results of this one are stored. Barriers are those of residue_wgmma.cu, but that the last stage of a tile
// is given back before the results are stored.
//
// Results stay in registers until they are stored: four lanes exchange what they hold of 32 columns, so that each
// stores (and reads of the residual) 16 bytes. Those 32 columns are also one sum of squares.
#include "device.h"
#include "rotate_wgmma.h"
#include "values.cuh"

namespace slicegpt {
namespace {

constexpr int kSums = 128;  // accumulators of a thread: 64 x 256 over 128 threads
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 32 * (kConsumerWarps + 1);
constexpr int kTileRows = 128, kTileColumns = 256;
constexpr int kStages = 4;
constexpr int kBoxBytes = ptx::kTileBoxRows * ptx::kTileBoxColumns * 2;
constexpr int kHalves = kTileColumns / ptx::kTileBoxRows;  // boxes of the weights
constexpr int kStageBytes = (1 + kHalves) * kBoxBytes;     // the tile's rows, then those of the weights
constexpr int kPatternBytes = 1024;                        // 8 rows of 128 bytes, which the swizzle acts on
static_assert(kTileRows == ptx::kTileBoxRows);

struct Barriers {
    uint64_t full[kStages];   // a stage's bytes have arrived
    uint64_t empty[kStages];  // it was read, here and in every block that the copy into it writes to as well
};

// Dynamic shared memory is aligned less than the swizzle needs.
constexpr size_t kSharedBytes = kPatternBytes + size_t(kStages) * kStageBytes + sizeof(Barriers);
static_assert(kSharedBytes <= 227 * 1024, "what a block can have");

struct RotateTiles {
    ptx::TensorMap a, weight, h, shortcut;
    const void* residual;  // or null
    int64_t residual_stride;
    int residual_columns;
    const void* bias;  // or null
    void* out;
    int64_t out_stride;
    float* sumsq;
    int rows, columns;
    int own_steps, steps;  // of 64 columns: of a, and of a and h
    int row_tiles, column_tiles;
};

#if SLICEGPT_HAS_WGMMA
constexpr int kGroupTiles = 16;  // rows of tiles that pass over the weights together
constexpr int kGroupRows = 64;   // of a warpgroup
constexpr int kStepBytes = 32;   // of a row, that one instruction contracts

// The matrix that starts at this address, in 16-byte units: the address, the leading offset (ignored with a swizzle, 1
// by convention), the stride from one 8 rows to the next, swizzle mode 1 (128 bytes). Fields do not carry into each
// other below 256 KB, so that offsets can be added to the descriptor.
__device__ __forceinline__ uint64_t matrix_descriptor(const unsigned char* shared) {
    return uint64_t(ptx::shared_address(shared) >> 4) | uint64_t(1) << 16 | uint64_t(kPatternBytes >> 4) << 32 |
           uint64_t(1) << 62;
}

// First row and column of this block's part of a tile; a tile of a pair has 2 * kTileRows rows. kGroupTiles rows of
// tiles pass over the weights together, which then come from L2.
template <int kBlocks>
__device__ __forceinline__ int2 tile_origin(const RotateTiles& p, int tile) {
    constexpr int kGroup = kGroupTiles / kBlocks;
    const int group = tile / (kGroup * p.column_tiles), inside = tile - group * kGroup * p.column_tiles;
    const int height = min(p.row_tiles - group * kGroup, kGroup);
    const int row = group * kGroup + inside % height;
    const int rank = kBlocks == 1 ? 0 : ptx::cluster_rank();
    return {(row * kBlocks + rank) * kTileRows, inside / height * kTileColumns};
}

template <int kBlocks>
__device__ __forceinline__ void copy_stages(const RotateTiles& p, unsigned char* stages, Barriers& barriers) {
    int it = 0;
    for (int tile = blockIdx.x / kBlocks; tile < p.row_tiles * p.column_tiles; tile += gridDim.x / kBlocks) {
        const int2 origin = tile_origin<kBlocks>(p, tile);
        for (int step = 0; step < p.steps; ++step, ++it) {
            const bool own = step < p.own_steps;
            const ptx::TensorMap &rows = own ? p.a : p.h, &weights = own ? p.weight : p.shortcut;
            const int k = (own ? step : step - p.own_steps) * ptx::kTileBoxColumns;
            const int s = it % kStages;
            uint64_t* const full = &barriers.full[s];
            unsigned char* const stage = stages + s * kStageBytes;
            // A new barrier counts as past its phase of parity 1: the first round does not wait.
            while (!ptx::mbarrier_try_wait(&barriers.empty[s], (it / kStages & 1) ^ 1)) {
            }
            // Bytes from the other block may have come before they are announced here: this arrival completes the
            // phase in either order.
            ptx::mbarrier_arrive_expect(full, kStageBytes);
            ptx::copy_tile(stage, rows, origin.x, k, full);
            if constexpr (kBlocks == 1) {
#pragma unroll
                for (int half = 0; half < kHalves; ++half)
                    ptx::copy_tile(stage + (1 + half) * kBoxBytes, weights, origin.y + half * ptx::kTileBoxRows, k,
                                   full);
            } else {
                static_assert(kBlocks == kHalves);
                const int half = ptx::cluster_rank();
                ptx::copy_tile_multicast(stage + (1 + half) * kBoxBytes, weights, origin.y + half * ptx::kTileBoxRows,
                                         k, full, (1u << kBlocks) - 1);
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[kSums], uint64_t rows, uint64_t weights);
template <>
__device__ __forceinline__ void multiply<Float16>(float (&sums)[kSums], uint64_t rows, uint64_t weights) {
    ptx::wgmma_m64n256k16_f16(sums, rows, weights);
}
template <>
__device__ __forceinline__ void multiply<Bfloat16>(float (&sums)[kSums], uint64_t rows, uint64_t weights) {
    ptx::wgmma_m64n256k16_bf16(sums, rows, weights);
}

// A stage is read: here, and for a pair in the block that copied a part of it.
template <int kBlocks>
__device__ __forceinline__ void give_back(uint64_t* empty) {
    const int lane = threadIdx.x % 32;
    if constexpr (kBlocks == 1) {
        if (lane == 0) ptx::mbarrier_arrive(empty);
    } else {
        if (lane < kBlocks) ptx::mbarrier_arrive_at(empty, lane);
    }
}

// The sums of a warpgroup's 64 rows with all columns of the tile, from the stages `it` on; `it` moves to the next tile.
template <typename T, int kBlocks>
__device__ __forceinline__ void sum_stages(float (&sums)[kSums], int& it, int steps, int group, unsigned char* stages,
                                           Barriers& barriers) {
    const uint64_t rows = matrix_descriptor(stages + group * kGroupRows * 2 * ptx::kTileBoxColumns);
    const uint64_t weights = matrix_descriptor(stages + kBoxBytes);
    const int end = it + steps;
    for (bool first = true; it < end; ++it, first = false) {
        const int s = it % kStages;
        while (!ptx::mbarrier_try_wait(&barriers.full[s], it / kStages & 1)) {
        }
        ptx::wgmma_fence(sums);
#pragma unroll
        for (int k = 0; k < 2 * ptx::kTileBoxColumns / kStepBytes; ++k) {
            // Within a pattern the swizzle acts on the sum of the start address and the row's offset.
            const int offset = (s * kStageBytes + k * kStepBytes) >> 4;
            multiply<T>(sums, rows + offset, weights + offset);
        }
        ptx::wgmma_commit();
        // One stage's instructions stay in flight, so that the tensor cores never wait for this loop; those of the
        // stage before are done. Each warp says so for itself: it waited for its own share of them.
        ptx::wgmma_wait<1>(sums);
        if (!first) give_back<kBlocks>(&barriers.empty[(it - 1) % kStages]);
    }
    ptx::wgmma_wait<0>(sums);
    give_back<kBlocks>(&barriers.empty[(it - 1) % kStages]);
}

// Lane t of four holds word i of chunk t and gets word t of chunk i, or the other way round.
__device__ __forceinline__ void transpose_words(uint32_t (&w)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t other = ptx::shuffle_xor(odd ? w[i] : w[i + 1], 1);
        w[i] = odd ? other : w[i];
        w[i + 1] = odd ? w[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t other = ptx::shuffle_xor(upper ? w[i] : w[i + 2], 2);
        w[i] = upper ? other : w[i];
        w[i + 2] = upper ? w[i + 2] : other;
    }
}

template <typename T>
__device__ __forceinline__ float low(uint32_t word) {
    return to_float(T{uint16_t(word)});
}
template <typename T>
__device__ __forceinline__ float high(uint32_t word) {
    return to_float(T{uint16_t(word >> 16)});
}

template <typename T>
__device__ __forceinline__ uint32_t rounded(float x, float y);
template <>
__device__ __forceinline__ uint32_t rounded<Float16>(float x, float y) {
    return ptx::floats_to_half2(x, y);
}
template <>
__device__ __forceinline__ uint32_t rounded<Bfloat16>(float x, float y) {
    return ptx::floats_to_bfloat2(x, y);
}

// Eight columns of the residual, zeros where there are none.
__device__ __forceinline__ uint4 residual_piece(const uint16_t* row, int columns, int column) {
    return column < columns ? ptx::load_once_16(row + column) : uint4{0u, 0u, 0u, 0u};
}

// sums[4 j + 2 h + q] is row g + 8 h of a warp's 16, column 8 j + 2 t + q, with g = lane / 4 and t = lane % 4. Once a
// tile the tensor cores wait for these some 800 instructions.
template <typename T, bool kResidual, bool kBias>
__device__ __forceinline__ void store_tile(const RotateTiles& p, const float (&sums)[kSums], int first_row,
                                           int first_column) {
    constexpr int kGroups = kTileColumns / kSumColumns;
    const int t = threadIdx.x % 4, row = first_row + threadIdx.x % 32 / 4;
    const int column = first_column + 8 * t;  // of this lane's 16 bytes
    const int parts = (p.columns + kSumColumns - 1) / kSumColumns;
    uint16_t* out[2];
    const uint16_t* residual[2];
    float* sumsq[2];
    int columns[2], residual_columns[2];  // 0 for a row that there is not
    uint4 ahead[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int64_t here = row + 8 * h;
        columns[h] = here < p.rows ? p.columns : 0;
        out[h] = static_cast<uint16_t*>(p.out) + here * p.out_stride;
        sumsq[h] = p.sumsq + here * parts;
        if constexpr (kResidual) {
            residual[h] = static_cast<const uint16_t*>(p.residual) + here * p.residual_stride;
            residual_columns[h] = here < p.rows ? p.residual_columns : 0;
            ahead[h] = residual_piece(residual[h], residual_columns[h], column);
        }
    }
#pragma unroll
    for (int c = 0; c < kGroups; ++c) {
        const int offset = c * kSumColumns;
        uint32_t words[2][4], bias[4] = {};
        if constexpr (kResidual) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                words[h][0] = ahead[h].x, words[h][1] = ahead[h].y, words[h][2] = ahead[h].z, words[h][3] = ahead[h].w;
                transpose_words(words[h]);
                if (c + 1 < kGroups)
                    ahead[h] = residual_piece(residual[h], residual_columns[h], column + offset + kSumColumns);
            }
        }
        if constexpr (kBias) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int at = first_column + offset + 8 * j + 2 * t;
                if (at < p.columns)
                    bias[j] = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p.bias) + at);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float square = 0.f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = 4 * (4 * c + j) + 2 * h;
                float x = sums[i], y = sums[i + 1];
                if constexpr (kBias) x += low<T>(bias[j]), y += high<T>(bias[j]);
                if constexpr (kResidual) x += low<T>(words[h][j]), y += high<T>(words[h][j]);
                words[h][j] = rounded<T>(x, y);
                x = low<T>(words[h][j]), y = high<T>(words[h][j]);
                square = fmaf(x, x, fmaf(y, y, square));
            }
            square += ptx::shuffle_xor(square, 1);
            square += ptx::shuffle_xor(square, 2);
            transpose_words(words[h]);
            if (column + offset < columns[h])
                *reinterpret_cast<uint4*>(out[h] + column + offset) = {words[h][0], words[h][1], words[h][2],
                                                                       words[h][3]};
            if (t == 0 && first_column + offset < columns[h]) sumsq[h][(first_column + offset) / kSumColumns] = square;
        }
    }
}
#endif

// Empty for every architecture but sm_90a: has_rotate_wgmma() tells.
template <typename T, int kBlocks>
__global__ __launch_bounds__(kThreads, 1) void rotate_tiles(const __grid_constant__ RotateTiles p) {
#if SLICEGPT_HAS_WGMMA
    unsigned char* const memory = ptx::dynamic_shared();
    unsigned char* const stages = memory + (kPatternBytes - ptx::shared_address(memory) % kPatternBytes);
    Barriers& barriers = *reinterpret_cast<Barriers*>(stages + kStages * kStageBytes);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(&barriers.full[s], 1);
            ptx::mbarrier_init(&barriers.empty[s], kBlocks * kConsumerWarps);
        }
        ptx::fence_proxy_async();  // the copies, of another proxy, must find them
        // The other block arrives at them, and its copies count at them.
        if constexpr (kBlocks > 1) ptx::fence_mbarrier_init();
    }
    if constexpr (kBlocks == 1)
        __syncthreads();
    else
        ptx::cluster_sync();

    // The same in all lanes, and known to be: descriptors stay in uniform registers.
    const int warp = ptx::first_lane(int(threadIdx.x) / 32);
    if (warp == kConsumerWarps) {
        if (threadIdx.x % 32 == 0) copy_stages<kBlocks>(p, stages, barriers);
    } else {
        int it = 0;
        for (int tile = blockIdx.x / kBlocks; tile < p.row_tiles * p.column_tiles; tile += gridDim.x / kBlocks) {
            float sums[kSums] = {};
            sum_stages<T, kBlocks>(sums, it, p.steps, warp / 4, stages, barriers);
            const int2 origin = tile_origin<kBlocks>(p, tile);
            const int row = origin.x + 16 * warp;
            if (p.residual)
                p.bias ? store_tile<T, true, true>(p, sums, row, origin.y)
                       : store_tile<T, true, false>(p, sums, row, origin.y);
            else
                p.bias ? store_tile<T, false, true>(p, sums, row, origin.y)
                       : store_tile<T, false, false>(p, sums, row, origin.y);
        }
    }
    // The other block arrives at barriers of this one until it is done.
    if constexpr (kBlocks > 1) ptx::cluster_sync();
#endif
}

template <typename T>
int launch_tiles(const RotateTiles& p, int blocks, cudaStream_t stream) {
    const int64_t tiles = int64_t(p.row_tiles) * p.column_tiles;
    const unsigned clusters = unsigned(min(tiles, int64_t(max(1, multiprocessors() / blocks))));
    const dim3 grid{clusters * unsigned(blocks)};
    if (blocks == 1) return ptx::launch(rotate_tiles<T, 1>, grid, kThreads, kSharedBytes, stream, p);
    return ptx::launch_clusters(2, rotate_tiles<T, 2>, grid, kThreads, kSharedBytes, stream, p);
}

bool aligned(const void* pointer, int64_t stride) { return uintptr_t(pointer) % 16 == 0 && stride % 8 == 0; }

}  // namespace

int rotate_add_wgmma(const RotateAddArguments& a, int blocks, cudaStream_t stream) {
    if (!has_rotate_wgmma()) return kNoWgmma;
    const bool half = a.dtype == Dtype::kFloat16 || a.dtype == Dtype::kBfloat16;
    if (!half) return kBadDtype;
    if ((blocks != 1 && blocks != 2) || a.rank || a.K < 1 || a.N % 8 || (!a.shortcut && a.d % 8) ||
        !aligned(a.a, a.a_stride) || !aligned(a.weight, a.weight_stride) || !aligned(a.h, a.h_stride) ||
        !aligned(a.h_next, a.h_next_stride) || (a.shortcut && !aligned(a.shortcut, a.shortcut_stride)) ||
        uintptr_t(a.bias) % 4)
        return kBadConfig;
    if (divide_up(a.tokens, kTileRows) * divide_up(a.N, kTileColumns) > INT32_MAX) return kTooLarge;
    RotateTiles p{};
    if (int error = ptx::make_tensor_map(&p.a, a.a, a.tokens, a.K, a.a_stride)) return error;
    if (int error = ptx::make_tensor_map(&p.weight, a.weight, a.N, a.K, a.weight_stride)) return error;
    p.steps = p.own_steps = int(divide_up(a.K, ptx::kTileBoxColumns));
    if (a.shortcut) {
        if (int error = ptx::make_tensor_map(&p.h, a.h, a.tokens, a.d, a.h_stride)) return error;
        if (int error = ptx::make_tensor_map(&p.shortcut, a.shortcut, a.N, a.d, a.shortcut_stride)) return error;
        p.steps += int(divide_up(a.d, ptx::kTileBoxColumns));
    } else {
        p.residual = a.h, p.residual_stride = a.h_stride, p.residual_columns = a.d;
    }
    p.bias = a.bias, p.out = a.h_next, p.out_stride = a.h_next_stride, p.sumsq = a.sumsq;
    p.rows = a.tokens, p.columns = a.N;
    p.row_tiles = int(divide_up(a.tokens, int64_t(blocks) * kTileRows));
    p.column_tiles = int(divide_up(a.N, kTileColumns));
    return a.dtype == Dtype::kFloat16 ? launch_tiles<Float16>(p, blocks, stream)
                                      : launch_tiles<Bfloat16>(p, blocks, stream);
}

// As has_residue_wgmma(): by the registers of the code that the driver took.
bool has_rotate_wgmma() {
    cudaFuncAttributes attributes{};
    return !report(cudaFuncGetAttributes(&attributes, rotate_tiles<Bfloat16, 1>)) && attributes.numRegs >= kSums;
}

}  // namespace slicegpt
