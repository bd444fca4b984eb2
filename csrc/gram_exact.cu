// C += Xᵀ diag(weight) X from exact integer arithmetic on int8 tensor cores.
//
// A block of T tokens of X holds integers times a power of two per column (residues.cuh). The products of two
// such columns sum to an integer of B = log2(norm_i norm_j) + 1 bits, and an integer is known by its residues
// modulo enough coprime numbers of 8 bits; each modulus costs one triangular int8 product, summed without
// error in int32 (128 * 128 * 131071 < 2^31).
//
// Why residues and not digits: with X cut into s digits of 7 bits, the squares trick needs s (s + 1) / 2
// triangular products; residues need about (2 b + log2 T + 1) / 7.85 for values of b bits (b by the norm, not
// by the maximum).
//   float16 Gaussian, T = 16384: 4 digits, 10 products; residues of 63 bits, 8 products
//   bfloat16 Gaussian:           5 digits, 15 products; about 71 bits, 9 products (10, 11 in some tiles)
//   float16, whole range:        6 digits, 21 products; 94 bits, 12 products
// and the number stays linear in the span, so that float32 fits as well (13 to 16). The count is taken per
// pair of column groups from the measured norms, on the device: blocks of unneeded moduli leave at once.
//
// What does not fit 53 bits a column (residues.cu hands those tokens over) goes through the float64 kernel at
// the end.
#include <climits>

#include "device.h"
#include "gram.h"
#include "mma.cuh"
#include "residue_tiles.cuh"
#include "selection.cuh"

namespace slicegpt {
namespace {

// A tile is 256 x 128, a warp's share 64 x 64: a step of 32 tokens then loads 8 KB of fragments for 32 tensor
// instructions, half of what shared memory delivers in their time; 64 x 32 would be bound by it.
constexpr int kRows = kTileRows, kColumns = kTileColumns, kDepth = kPlaneTokens;
constexpr int kThreads = 256;
constexpr int kStageBytes = (kRows + kColumns) * kDepth;
#if SLICEGPT_ARCH == 0 || SLICEGPT_ARCH >= 800
constexpr int kStages = 4;
#else
constexpr int kStages = 2;  // 64 KB of shared memory, and copies are not asynchronous
#endif

constexpr int kMaxBlockTokens = 131071 / kPlaneTokens * kPlaneTokens;
// Bytes for the planes of one token block. Larger blocks mean fewer passes over C and the residues; at this
// size and 4096 columns a pass is 16384 tokens and those passes a few percent of the time. The tests choose a
// small limit.
#ifndef SLICEGPT_PLANE_BYTES
#define SLICEGPT_PLANE_BYTES (size_t(1) << 30)
#endif

__global__ __launch_bounds__(kThreads, 1) void residue_products(const ResidueTiles p) {
    const int l = blockIdx.y;
    const TilePosition tile = triangle_tile<kTileTall>(blockIdx.x, p.tile_columns);
    if (!tile_needs(p, tile, l)) return;

    unsigned char* const stages = ptx::dynamic_shared();
    const int64_t block_bytes = int64_t(p.padded_columns) * kDepth;
    const int8_t* const plane = p.planes + l * p.token_blocks * block_bytes;
    // A thread copies 6 of a stage's 1536 chunks; only the token block changes from stage to stage.
    const int copy_row = threadIdx.x / 4, copy_chunk = threadIdx.x % 4;
    const auto load = [&](int stage, int token_block) {
        const int8_t* const source = plane + token_block * block_bytes;
        unsigned char* const target = stages + stage * kStageBytes;
#pragma unroll
        for (int i = 0; i < (kRows + kColumns) / 64; ++i) {
            const int row = copy_row + 64 * i;
            const int column = row < kRows ? tile.row * kRows + row : tile.column * kColumns + row - kRows;
            const bool inside = column < p.padded_columns;
            copy_16(target + row * kDepth + copy_chunk * 16, source + (inside ? column * kDepth + copy_chunk * 16 : 0),
                    inside ? 16 : 0);
        }
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 2 * 64, warp_column = warp % 2 * 64;
    // The row and chunk whose address this lane gives in a matrix load: A in the order (rows 0-7, 8-15) x (k
    // 0-15, 16-31), B in the order (k 0-15, 16-31) x (columns 0-7, 8-15).
    const int a_row = warp_row + lane % 16, a_chunk = lane / 16;
    const int b_row = kRows + warp_column + lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
    int sums[4][8][4] = {};

    for (int s = 0; s < kStages - 1; ++s) {
        if (s < p.token_blocks) load(s, s);
        copy_commit();
    }
    for (int it = 0; it < p.token_blocks; ++it) {
        copy_wait<kStages - 2>();
        __syncthreads();
        const unsigned char* const stage = stages + it % kStages * kStageBytes;
#pragma unroll
        for (int k = 0; k < kDepth / 32; ++k) {
            uint32_t a[4][4], b[8][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) ptx::ldmatrix_x4(a[i], stage + plane_chunk(a_row + 16 * i, 2 * k + a_chunk));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t pair[4];
                ptx::ldmatrix_x4(pair, stage + plane_chunk(b_row + 16 * j, 2 * k + b_chunk));
                b[2 * j][0] = pair[0], b[2 * j][1] = pair[1];
                b[2 * j + 1][0] = pair[2], b[2 * j + 1][1] = pair[3];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) mma_s8(sums[i][j], a[i], b[j]);
            // The next stage is fetched while the tensor cores are busy with this step.
            if (k == 0) {
                const int next = it + kStages - 1;
                if (next < p.token_blocks) load(next % kStages, next);
                copy_commit();
            }
        }
    }

    const Modulo modulo(l);
    uint8_t* const out = tile_residues(p, l, blockIdx.x);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int row = warp_row + 16 * i + 8 * h + lane / 4, column = warp_column + 8 * j + lane % 4 * 2;
                const uint32_t pair = modulo(sums[i][j][2 * h]) | modulo(sums[i][j][2 * h + 1]) << 8;
                *reinterpret_cast<uint16_t*>(out + row * kColumns + column) = uint16_t(pair);
            }
}

// Residues to integers, integers to float64, and on to C.
__global__ __launch_bounds__(kAddThreads) void combine_residues(const ResidueTiles p, const int* scale, double* C,
                                                                int64_t C_stride, int64_t columns) {
    const TilePosition tile = triangle_tile<kTileTall>(blockIdx.x, p.tile_columns);
    const int row = blockIdx.y / 4 * 32, column = blockIdx.y % 4 * 32;
    const int64_t row0 = int64_t(tile.row) * kRows + row, column0 = int64_t(tile.column) * kColumns + column;
    if (row0 > column0 || column0 >= columns) return;
    const int count = moduli_for(p.norm_bits[row0 / kPlaneColumns] + p.norm_bits[tile.column] + 1);
    if (count == 0) return;
    const int64_t modulus_bytes = int64_t(gridDim.x) * (kRows * kColumns);
    add_symmetric_block(C, C_stride, columns, row0, column0, [&](int r, int x) {
        const uint8_t* item = p.residues + int64_t(blockIdx.x) * (kRows * kColumns) + (row + r) * kColumns + column + x;
        const double value = from_residues(count, [&](int l) { return uint32_t(item[l * modulus_bytes]); });
        return ldexp(value, scale[row0 + r] + scale[column0 + x]);
    });
}

// The most moduli that a token block can need.
int most_moduli(Dtype dtype, int block_tokens) {
    // float16 spans 2^-24 to 2^16, everything else is cut off at the window.
    const int bits = dtype == Dtype::kFloat16 ? 40 : kWindow;
    return moduli_for(2 * bits + float(log2(double(block_tokens))) + 1.1f);
}

// Where everything stands in the workspace.
struct Layout {
    int block_tokens, padded_columns, moduli, splits;
    int64_t tiles;
    size_t fates, rows, counters, spans, scale, norm_bits, plane_moduli, residues, planes, bytes;

    Layout(int64_t tokens, int64_t columns, Dtype dtype) {
        padded_columns = int(round_up(columns, kPlaneColumns));
        const int64_t whole = int64_t(round_up(tokens, kPlaneTokens));
        const int64_t most = min(whole, int64_t(kMaxBlockTokens));
        moduli = most_moduli(dtype, int(most));
        const int64_t fitting = int64_t(SLICEGPT_PLANE_BYTES / (size_t(padded_columns) * moduli));
        block_tokens = int(min(most, max(fitting / kPlaneTokens, int64_t(1)) * kPlaneTokens));
        tiles = triangle_tiles<kTileTall>(padded_columns / kColumns);
        // Enough blocks of the scan to fill the device several times over.
        const int64_t strips = divide_up(columns, 32 * (dtype == Dtype::kFloat32 ? 4 : 8));
        splits = int(min(max(8 * multiprocessors() / strips, int64_t(1)), divide_up(block_tokens, 64)));

        size_t end = 0;
        const auto place = [&](size_t size) {
            const size_t start = end;
            end = round_up(end + size, 256);
            return start;
        };
        counters = place(2 * sizeof(int));
        fates = place(block_tokens);
        rows = place(tokens * sizeof(int));
        spans = place(size_t(splits) * columns * sizeof(ColumnSpan));
        scale = place(padded_columns * sizeof(int));
        norm_bits = place(padded_columns / kPlaneColumns * sizeof(float));
        plane_moduli = place(padded_columns / kPlaneColumns * sizeof(int));
        residues = place(size_t(moduli) * tiles * kRows * kColumns);
        // The float64 kernel runs last, over the planes.
        planes = place(max(size_t(moduli) * block_tokens * padded_columns, gram_fp64_workspace(tokens, columns)));
        bytes = end;
    }
};

}  // namespace

size_t gram_exact_workspace(int64_t tokens, int64_t columns, Dtype dtype) {
    if (tokens == 0 || columns == 0) return 0;
    return Layout(tokens, columns, dtype).bytes;
}

bool gram_exact_has_wgmma() { return has_residue_wgmma(); }

int gram_exact(const GramArguments& a, ExactKernel kernel) {
    if (a.dtype == Dtype::kFloat64) return kBadDtype;
    const bool wgmma = kernel == ExactKernel::kWgmma || kernel == ExactKernel::kWgmmaPairs;
    if (wgmma && !has_residue_wgmma()) return kNoWgmma;
    if (a.tokens == 0 || a.columns == 0) return kOk;
    if (a.tokens > INT_MAX || a.columns > INT_MAX / 2 / kDepth) return kTooLarge;
    const Layout at(a.tokens, a.columns, a.dtype);
    if (a.workspace_bytes < at.bytes) return kWorkspaceTooSmall;
    unsigned char* const base = static_cast<unsigned char*>(a.workspace);
    const int item = a.dtype == Dtype::kFloat32 ? 4 : 2;

    int* const handed_over = reinterpret_cast<int*>(base + at.counters);
    int* const rows = reinterpret_cast<int*>(base + at.rows);
    ResidueBlock block{};
    block.X_stride = a.X_stride;
    block.dtype = a.dtype;
    block.vectors = reinterpret_cast<uintptr_t>(a.X) % 16 == 0 && a.X_stride * item % 16 == 0;
    block.columns = int(a.columns);
    block.padded_columns = at.padded_columns;
    block.splits = at.splits;
    block.fates = base + at.fates;
    block.spans = reinterpret_cast<ColumnSpan*>(base + at.spans);
    block.scale = reinterpret_cast<int*>(base + at.scale);
    block.norm_bits = reinterpret_cast<float*>(base + at.norm_bits);
    block.plane_moduli = reinterpret_cast<int*>(base + at.plane_moduli);
    block.unfit = handed_over + 1;
    block.planes = reinterpret_cast<int8_t*>(base + at.planes);
    ResidueTiles p{
        block.planes, block.norm_bits, base + at.residues, at.padded_columns, at.padded_columns / kColumns, 0};

    int status = report(cudaMemsetAsync(handed_over, 0, sizeof(int), a.stream));
    const int stages = capability_major() >= 8 ? 4 : 2;  // as kStages in the device code
    for (int64_t first = 0; first < a.tokens && status == kOk; first += at.block_tokens) {
        const int64_t tokens = min(a.tokens - first, int64_t(at.block_tokens));
        block.X = static_cast<const unsigned char*>(a.X) + first * a.X_stride * item;
        block.tokens = int(tokens);
        block.token_blocks = p.token_blocks = int(divide_up(tokens, kPlaneTokens));
        const double* const weight = a.weight ? a.weight + first : nullptr;
        const auto step = [&](auto&& launch) {
            if (status == kOk) status = launch();
        };
        step([&] { return report(cudaMemsetAsync(block.unfit, 0, sizeof(int), a.stream)); });
        step([&] { return select_by_weight(weight, tokens, block.fates, a.stream); });
        step([&] { return write_residues(block, a.stream); });
        step([&] { return append_handed_over(block.fates, tokens, first, rows, handed_over, a.stream); });
        step([&] {
            if (wgmma)
                return residue_products_wgmma(p, at.moduli, kernel == ExactKernel::kWgmmaPairs ? 2 : 1, a.stream);
            return ptx::launch(residue_products, dim3{unsigned(at.tiles), unsigned(at.moduli)}, kThreads,
                               size_t(stages) * kStageBytes, a.stream, p);
        });
        step([&] {
            return ptx::launch(combine_residues, dim3{unsigned(at.tiles), 32}, kAddThreads, 0, a.stream, p,
                               static_cast<const int*>(block.scale), a.C, a.C_stride, a.columns);
        });
    }
    if (status != kOk) return status;
    GramArguments rest = a;
    rest.workspace = block.planes;
    rest.workspace_bytes = at.bytes - at.planes;
    return gram_fp64_rows(rest, rows, handed_over);
}

}  // namespace slicegpt
