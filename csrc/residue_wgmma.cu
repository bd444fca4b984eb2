// The residue products of gram_exact.cu on Hopper's wgmma, whose int8 rate mma.sync does not reach.
//
// The tile is that of the other kernel, 256 x 128, but turned: wgmma's A (64 rows an instruction) is the tile's
// columns, its B (256) the tile's rows. An instruction then reads 2 + 8 KB of shared memory in the 128 cycles
// of its 64 x 256 x 32 products (4096 a cycle): 80 of the 128 bytes a cycle that shared memory delivers. The
// other way round, 64 x 128, it would be 96. The copies write 48 more: 24 KB for the 512 cycles of a stage's
// four instructions.
//
// Two warpgroups multiply, 64 of the tile's columns each; one thread of a ninth warp copies. Planes hold 64
// tokens in the order that wgmma reads from shared memory (residues.cuh), so that a stage is three bulk copies
// of consecutive bytes, without a tensor map and without a thread's registers or instructions in between.
//
// Shared memory as wgmma sees it ("Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Matrix Descriptor
// Format" in the PTX manual's chapter on wgmma): K-major rows of 64 bytes with the 64-byte swizzle, which
// exchanges address bits 4-5 with their XOR with bits 7-8: the 16-byte chunk by the pair of rows. A pattern is 8
// rows, 512 bytes, and must start at a multiple of that, because the swizzle acts on addresses.
#include "device.h"
#include "gram.h"
#include "ptx.cuh"
#include "residue_tiles.cuh"

namespace slicegpt {
namespace {

constexpr int kSums = 128;  // accumulators of a thread: 64 x 256 over 128 threads
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 32 * (kConsumerWarps + 1);
constexpr int kStages = 8;  // 192 KB: several thousand cycles of copies under way
constexpr int kGroupBytes = kPlaneColumns * kPlaneTokens;
constexpr int kStageBytes = (kTileTall + 1) * kGroupBytes;  // the tile's rows, then its columns
constexpr int kPatternBytes = 8 * kPlaneTokens;
// 16 columns of the tile, all its rows: a warp's results
constexpr int kWarpColumns = 16, kWarpBytes = kWarpColumns * kTileRows;

struct Barriers {
    uint64_t full[kStages];   // a stage's bytes have arrived
    uint64_t empty[kStages];  // all consumer warps have read it
};

// Dynamic shared memory is aligned less than the swizzle needs.
constexpr size_t kSharedBytes =
    kPatternBytes + size_t(kStages) * kStageBytes + kConsumerWarps * kWarpBytes + sizeof(Barriers);

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

__device__ __forceinline__ void copy_stages(const ResidueTiles& p, int l, TilePosition tile,
                                            unsigned char* stages, Barriers& barriers) {
    const int64_t block_bytes = int64_t(p.padded_columns) * kPlaneTokens;
    const int8_t* source = p.planes + l * p.token_blocks * block_bytes;
    // The last tile row may have one group only. It is taken twice then: products of columns that do not exist
    // are read by nobody, but they must not be of bytes that were never written.
    const int first = tile.row * kTileTall;
    const int second = min(first + 1, p.tile_columns - 1);
    for (int it = 0; it < p.token_blocks; ++it, source += block_bytes) {
        const int s = it % kStages;
        uint64_t* const full = &barriers.full[s];
        // A new barrier counts as past its phase of parity 1: the first round does not wait.
        while (!ptx::mbarrier_try_wait(&barriers.empty[s], (it / kStages & 1) ^ 1)) {
        }
        ptx::mbarrier_arrive_expect(full, kStageBytes);
        unsigned char* const stage = stages + s * kStageBytes;
        ptx::copy_bulk(stage, source + int64_t(first) * kGroupBytes, kGroupBytes, full);
        ptx::copy_bulk(stage + kGroupBytes, source + int64_t(second) * kGroupBytes, kGroupBytes, full);
        ptx::copy_bulk(stage + kTileTall * kGroupBytes, source + int64_t(tile.column) * kGroupBytes,
                       kGroupBytes, full);
    }
}
#endif

// Empty for every architecture but sm_90a: has_residue_wgmma() tells.
__global__ __launch_bounds__(kThreads, 1) void wgmma_tiles(const ResidueTiles p) {
#if SLICEGPT_HAS_WGMMA
    const int l = blockIdx.y;
    const TilePosition tile = triangle_tile<kTileTall>(blockIdx.x, p.tile_columns);
    if (!tile_needs(p, tile, l)) return;

    unsigned char* const memory = ptx::dynamic_shared();
    unsigned char* const stages = memory + (kPatternBytes - ptx::shared_address(memory) % kPatternBytes);
    unsigned char* const turned = stages + kStages * kStageBytes;
    Barriers& barriers = *reinterpret_cast<Barriers*>(turned + kConsumerWarps * kWarpBytes);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            ptx::mbarrier_init(&barriers.full[s], 1);
            ptx::mbarrier_init(&barriers.empty[s], kConsumerWarps);
        }
        ptx::fence_proxy_async();  // the copies, of another proxy, must find them
    }
    __syncthreads();

    // The same in all lanes, and known to be: descriptors stay in uniform registers.
    const int warp = ptx::first_lane(int(threadIdx.x) / 32), lane = threadIdx.x % 32;
    if (warp == kConsumerWarps) {
        if (lane == 0) copy_stages(p, l, tile, stages, barriers);
        return;
    }

    const int group = warp / 4;
    const uint64_t rows = matrix_descriptor(stages);
    const uint64_t columns =
        matrix_descriptor(stages + kTileTall * kGroupBytes + group * kGroupColumns * kPlaneTokens);
    int sums[kSums] = {};
    for (int it = 0; it < p.token_blocks; ++it) {
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
        // One stage's instructions stay under way, so that the tensor cores never wait for this loop; those of
        // the stage before are done. Each warp says so for itself: it waited for its own share of them.
        ptx::wgmma_wait<1>(sums);
        if (it > 0 && lane == 0) ptx::mbarrier_arrive(&barriers.empty[(it - 1) % kStages]);
    }
    ptx::wgmma_wait<0>(sums);

    // sums[4 j + 2 h + q] is row (of A) g + 8 h, column 8 j + 2 t + q, with g = lane / 4 and t = lane % 4. A
    // lane's bytes lie in different rows of the tile: the warp turns its 16 columns in shared memory, where 32
    // lanes' bytes fall into 8 banks' words, and writes 16 bytes a lane.
    const Modulo modulo(l);
    unsigned char* const mine = turned + warp * kWarpBytes;
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int q = 0; q < 2; ++q)
                mine[(8 * j + lane % 4 * 2 + q) * kWarpColumns + lane / 4 + 8 * h] =
                    uint8_t(modulo(sums[4 * j + 2 * h + q]));
    __syncwarp();
    uint8_t* const out = tile_residues(p, l, gridDim.x, blockIdx.x) + warp * kWarpColumns;
#pragma unroll
    for (int row = lane; row < kTileRows; row += 32)
        *reinterpret_cast<uint4*>(out + row * kTileColumns) =
            *reinterpret_cast<const uint4*>(mine + row * kWarpColumns);
#endif
}

}  // namespace

int residue_products_wgmma(const ResidueTiles& p, int64_t tiles, int moduli, cudaStream_t stream) {
    return ptx::launch(wgmma_tiles, dim3{unsigned(tiles), unsigned(moduli)}, kThreads, kSharedBytes, stream, p);
}

// A module can hold code for sm_90a, sm_90 and PTX of compute_90, and the driver takes what fits the device:
// which it took shows in the function's registers. The accumulators alone are 128; the empty body, which every
// other architecture has, needs a few.
bool has_residue_wgmma() {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, wgmma_tiles) != cudaSuccess) {
        cudaGetLastError();  // nobody else's error
        return false;
    }
    return attributes.numRegs >= kSums;
}

}  // namespace slicegpt
