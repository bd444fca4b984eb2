// The residue products of gram_exact.cu on Hopper's wgmma, whose int8 rate mma.sync does not reach.
//
// The tile is that of the other kernel, 256 x 128, but turned: wgmma's A (64 rows an instruction) is the tile's
// columns, its B (256) the tile's rows. An instruction then reads 2 + 8 KB of shared memory in the 128 cycles
// of its 64 x 256 x 32 products (4096 a cycle): 80 of the 128 bytes a cycle that shared memory delivers. The
// other way round, 64 x 128, it would be 96. The copies write the other 48: 24 KB in the 512 cycles of a stage's
// four instructions.
//
// Those 48 bytes a cycle come from L2, to all multiprocessors at once, and that may be more than it delivers. So
// there is a kernel for pairs as well: two thread blocks of a cluster take tiles side by side in one tile row, and
// each copies one of the row's two column groups for both. That leaves 32. Neither has been measured.
//
// Two warpgroups multiply, 64 of the tile's columns each; one thread of a ninth warp copies. Planes hold 64
// tokens in the order that wgmma reads from shared memory (residues.cuh), so that a stage is three bulk copies
// of consecutive bytes, without a tensor map and without a thread's registers or instructions in between.
//
// Shared memory as wgmma sees it ("Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Matrix Descriptor
// Format" in the PTX manual's chapter on wgmma): K-major rows of 64 bytes with the 64-byte swizzle, which
// replaces address bits 4-5 by their XOR with bits 7-8: the 16-byte chunk by the pair of rows. A pattern is 8
// rows, 512 bytes, and must start at a multiple of that, because the swizzle acts on addresses. The same chunk of
// 8 rows lies in all 8 chunks of the 128 bytes that the banks hold: read without conflicts.
#include "device.h"
#include "gram.h"
#include "ptx.cuh"
#include "residue_tiles.cuh"

namespace slicegpt {
namespace {

constexpr int kSums = 128;  // accumulators of a thread: 64 x 256 over 128 threads
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 32 * (kConsumerWarps + 1);
constexpr int kStages = 8;  // 192 KB: several thousand cycles of copies in flight
constexpr int kGroupBytes = kPlaneColumns * kPlaneTokens;
constexpr int kStageBytes = (kTileTall + 1) * kGroupBytes;  // the tile's rows, then its columns
constexpr int kPatternBytes = 8 * kPlaneTokens;
// 16 columns of the tile, all its rows: a warp's results
constexpr int kWarpColumns = 16, kWarpBytes = kWarpColumns * kTileRows;

struct Barriers {
    uint64_t full[kStages];   // a stage's bytes have arrived
    uint64_t empty[kStages];  // it was read, here and in every block that the copy into it writes to as well
};

// Dynamic shared memory is aligned less than the swizzle needs.
constexpr size_t kSharedBytes =
    kPatternBytes + size_t(kStages) * kStageBytes + kConsumerWarps * kWarpBytes + sizeof(Barriers);
static_assert(kSharedBytes <= 227 * 1024, "what a block can have");

#if SLICEGPT_HAS_WGMMA
constexpr int kGroupColumns = 64;  // of a warpgroup
constexpr int kStepBytes = 32;     // of a row, that one instruction contracts

// The matrix that starts at this address, in 16-byte units: the address, the leading offset (ignored with a
// swizzle, 1 by convention), the stride from one 8 rows to the next, swizzle mode 2 (64 bytes). Fields do not
// carry into each other below 256 KB, so that offsets can be added to the descriptor.
__device__ __forceinline__ uint64_t matrix_descriptor(const unsigned char* shared) {
    return uint64_t(ptx::shared_address(shared) >> 4) | uint64_t(1) << 16 | uint64_t(kPatternBytes >> 4) << 32 |
           uint64_t(2) << 62;
}

struct Work {
    TilePosition tile;
    bool stored;
};

// The tile of this block. The tiles of a pair fill a square of two groups by two, so that pairs are counted as
// squares; where the number of groups is odd, the last tile of every row is multiplied by both blocks.
template <int kBlocks>
__device__ __forceinline__ Work work_of_block(int tile_columns) {
    if constexpr (kBlocks == 1) {
        return {triangle_tile<kTileTall>(blockIdx.x, tile_columns), true};
    } else {
        static_assert(kBlocks == kTileTall);
        const TilePosition square = triangle_tile<1>(blockIdx.x / kBlocks, (tile_columns + 1) / kBlocks);
        const int column = square.column * kBlocks + ptx::cluster_rank();
        return {{square.row, min(column, tile_columns - 1)}, column < tile_columns};
    }
}

// The same answer in all blocks of a cluster.
template <int kBlocks>
__device__ __forceinline__ bool work_needs(const ResidueTiles& p, TilePosition tile, int l) {
    if constexpr (kBlocks == 1) return tile_needs(p, tile, l);
    const int first = tile.column / kBlocks * kBlocks, second = min(first + 1, p.tile_columns - 1);
    return tile_needs(p, {tile.row, first}, l) || tile_needs(p, {tile.row, second}, l);
}

template <int kBlocks>
__device__ __forceinline__ void copy_stages(const ResidueTiles& p, int l, TilePosition tile, unsigned char* stages,
                                            Barriers& barriers) {
    const int64_t block_bytes = int64_t(p.padded_columns) * kPlaneTokens;
    const int8_t* source = p.planes + l * p.token_blocks * block_bytes;
    // The last tile row may have one group only. It is taken twice then: products of columns that do not exist
    // are read by nobody, but they must not be of bytes that were never written.
    const int groups[kTileTall] = {tile.row * kTileTall, min(tile.row * kTileTall + 1, p.tile_columns - 1)};
    for (int it = 0; it < p.token_blocks; ++it, source += block_bytes) {
        const int s = it % kStages;
        uint64_t* const full = &barriers.full[s];
        unsigned char* const stage = stages + s * kStageBytes;
        // A new barrier counts as past its phase of parity 1: the first round does not wait.
        while (!ptx::mbarrier_try_wait(&barriers.empty[s], (it / kStages & 1) ^ 1)) {
        }
        // Bytes from the other block may have come before they are announced here: this arrival completes the
        // phase in either order.
        ptx::mbarrier_arrive_expect(full, kStageBytes);
        ptx::copy_bulk(stage + kTileTall * kGroupBytes, source + int64_t(tile.column) * kGroupBytes, kGroupBytes, full);
        if constexpr (kBlocks == 1) {
#pragma unroll
            for (int g = 0; g < kTileTall; ++g)
                ptx::copy_bulk(stage + g * kGroupBytes, source + int64_t(groups[g]) * kGroupBytes, kGroupBytes, full);
        } else {
            const int rank = ptx::cluster_rank();
            ptx::copy_bulk_multicast(stage + rank * kGroupBytes,
                                     source + int64_t(rank ? groups[1] : groups[0]) * kGroupBytes, kGroupBytes, full,
                                     (1u << kBlocks) - 1);
        }
    }
}

// The sums of a warpgroup's 64 columns with all rows of the tile.
template <int kBlocks>
__device__ __forceinline__ void sum_stages(int (&sums)[kSums], int token_blocks, int group, unsigned char* stages,
                                           Barriers& barriers) {
    const uint64_t rows = matrix_descriptor(stages);
    const uint64_t columns = matrix_descriptor(stages + kTileTall * kGroupBytes + group * kGroupColumns * kPlaneTokens);
    const int lane = threadIdx.x % 32;
    for (int it = 0; it < token_blocks; ++it) {
        const int s = it % kStages;
        while (!ptx::mbarrier_try_wait(&barriers.full[s], it / kStages & 1)) {
        }
        ptx::wgmma_fence(sums);
#pragma unroll
        for (int k = 0; k < kPlaneTokens / kStepBytes; ++k) {
            // Within a pattern the swizzle acts on the sum of the start address and the row's offset.
            const int offset = (s * kStageBytes + k * kStepBytes) >> 4;
            ptx::wgmma_m64n256k32_s8(sums, columns + offset, rows + offset);
        }
        ptx::wgmma_commit();
        // One stage's instructions stay in flight, so that the tensor cores never wait for this loop; those of
        // the stage before are done. Each warp says so for itself: it waited for its own share of them.
        ptx::wgmma_wait<1>(sums);
        if (it == 0) continue;
        uint64_t* const empty = &barriers.empty[(it - 1) % kStages];
        if constexpr (kBlocks == 1) {
            if (lane == 0) ptx::mbarrier_arrive(empty);
        } else {
            if (lane < kBlocks) ptx::mbarrier_arrive_at(empty, lane);
        }
    }
    ptx::wgmma_wait<0>(sums);
}

// sums[4 j + 2 h + q] is row (of A) g + 8 h, column 8 j + 2 t + q, with g = lane / 4 and t = lane % 4. A lane's
// bytes lie in different rows of the tile: the warp turns its 16 columns in shared memory, where 32 lanes' bytes
// fall into 8 banks' words, and writes 16 bytes a lane.
__device__ __forceinline__ void store_residues(const int (&sums)[kSums], const Modulo& modulo, unsigned char* turned,
                                               uint8_t* out) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int q = 0; q < 2; ++q)
                turned[(8 * j + lane % 4 * 2 + q) * kWarpColumns + lane / 4 + 8 * h] =
                    uint8_t(modulo(sums[4 * j + 2 * h + q]));
    __syncwarp();
#pragma unroll
    for (int row = lane; row < kTileRows; row += 32)
        *reinterpret_cast<uint4*>(out + row * kTileColumns) =
            *reinterpret_cast<const uint4*>(turned + row * kWarpColumns);
}
#endif

// Empty for every architecture but sm_90a: has_residue_wgmma() tells.
template <int kBlocks>
__global__ __launch_bounds__(kThreads, 1) void wgmma_tiles(const ResidueTiles p) {
#if SLICEGPT_HAS_WGMMA
    const int l = blockIdx.y;
    const Work work = work_of_block<kBlocks>(p.tile_columns);
    if (!work_needs<kBlocks>(p, work.tile, l)) return;

    unsigned char* const memory = ptx::dynamic_shared();
    unsigned char* const stages = memory + (kPatternBytes - ptx::shared_address(memory) % kPatternBytes);
    unsigned char* const turned = stages + kStages * kStageBytes;
    Barriers& barriers = *reinterpret_cast<Barriers*>(turned + kConsumerWarps * kWarpBytes);
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
        if (threadIdx.x % 32 == 0) copy_stages<kBlocks>(p, l, work.tile, stages, barriers);
    } else {
        int sums[kSums] = {};
        sum_stages<kBlocks>(sums, p.token_blocks, warp / 4, stages, barriers);
        const int64_t index = triangle_index<kTileTall>(work.tile, p.tile_columns);
        if (work.stored)
            store_residues(sums, Modulo(l), turned + warp * kWarpBytes,
                           tile_residues(p, l, index) + warp * kWarpColumns);
    }
    // The other block arrives at barriers of this one until it is done.
    if constexpr (kBlocks > 1) ptx::cluster_sync();
#endif
}

}  // namespace

int residue_products_wgmma(const ResidueTiles& p, int moduli, int blocks, cudaStream_t stream) {
    if (blocks == 1) {
        const dim3 grid{unsigned(triangle_tiles<kTileTall>(p.tile_columns)), unsigned(moduli)};
        return ptx::launch(wgmma_tiles<1>, grid, kThreads, kSharedBytes, stream, p);
    }
    const int64_t squares = triangle_tiles<1>((p.tile_columns + 1) / 2);
    const dim3 grid{unsigned(2 * squares), unsigned(moduli)};
    return ptx::launch_clusters(2, wgmma_tiles<2>, grid, kThreads, kSharedBytes, stream, p);
}

// A module can hold code for sm_90a, sm_90 and PTX of compute_90, and the driver takes what fits the device:
// which it took shows in the function's registers. The accumulators alone are 128; the empty body, which every
// other architecture has, needs a few.
bool has_residue_wgmma() {
    cudaFuncAttributes attributes{};
    return !report(cudaFuncGetAttributes(&attributes, wgmma_tiles<1>)) && attributes.numRegs >= kSums;
}

}  // namespace slicegpt
