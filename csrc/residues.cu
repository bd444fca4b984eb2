// Residue planes of a token block; residues.cuh says what they are.
//
// Four memory-bound kernels: scan (read X: largest magnitude, lowest bit, norm of each column), plan (scales
// and number of moduli), hand-over (only where something does not fit: which tokens), planes (read X, write
// one byte an item and modulus). Every decision is made on the device.
#include "residues.cuh"

#include "device.h"
#include "moduli.cuh"
#include "selection.cuh"
#include "values.cuh"

namespace slicegpt {
namespace {

constexpr int kThreads = 256;
constexpr int kNoBits = -100000;
constexpr float kNothing = -1e30f;

__device__ __forceinline__ int leading_bit(const Decomposed& d) { return d.exponent + 31 - __clz(d.significand); }
__device__ __forceinline__ int lowest_bit(const Decomposed& d) { return d.exponent + __ffs(int(d.significand)) - 1; }

// Reads 16 bytes of a row of X; columns from `limit` on are zeros.
template <typename T>
struct alignas(16) Chunk {
    static constexpr int kItems = 16 / int(sizeof(T));
    T items[kItems];

    __device__ __forceinline__ void load(const T* row, int64_t column, int64_t limit, bool vectors) {
        if (vectors && column + kItems <= limit) {
            *this = *reinterpret_cast<const Chunk*>(row + column);
        } else {
#pragma unroll
            for (int e = 0; e < kItems; ++e) items[e] = column + e < limit ? row[column + e] : T{0};
        }
    }
};

// Grid (columns, splits). 32 lanes side by side read 512 bytes of a token; 8 rows of threads take every
// eighth token.
template <typename T>
__global__ __launch_bounds__(kThreads) void scan(const ResidueBlock b) {
    constexpr int kItems = Chunk<T>::kItems, kRows = kThreads / 32;
    __shared__ ColumnSpan shared[kRows][32 * kItems];
    const int lane = threadIdx.x % 32, y = threadIdx.x / 32;
    const int64_t column = (int64_t(blockIdx.x) * 32 + lane) * kItems;
    const int share = (b.tokens + b.splits - 1) / b.splits;
    const int begin = min(share * int(blockIdx.y), b.tokens), end = min(begin + share, b.tokens);
    ColumnSpan spans[kItems];
#pragma unroll
    for (int e = 0; e < kItems; ++e) spans[e] = {kNoBits, -kNoBits, 0.f, 0};
    if (column < b.columns) {
        for (int k = begin + y; k < end; k += kRows) {
            if (b.fates[k] != kTaken) continue;
            Chunk<T> chunk;
            chunk.load(static_cast<const T*>(b.X) + k * b.X_stride, column, b.columns, b.vectors);
#pragma unroll
            for (int e = 0; e < kItems; ++e) {
                const Decomposed d = decompose(chunk.items[e]);
                if (!d.finite) {
                    spans[e].unfit = 1;
                } else if (d.significand) {
                    spans[e].top = max(spans[e].top, leading_bit(d));
                    spans[e].low = min(spans[e].low, lowest_bit(d));
                    const float value = to_float(chunk.items[e]);
                    spans[e].squares = fmaf(value, value, spans[e].squares);
                }
            }
        }
    }
#pragma unroll
    for (int e = 0; e < kItems; ++e) shared[y][e * 32 + lane] = spans[e];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * kItems; i += kThreads) {
        ColumnSpan all = shared[0][i];
        for (int r = 1; r < kRows; ++r) {
            all.top = max(all.top, shared[r][i].top);
            all.low = min(all.low, shared[r][i].low);
            all.squares += shared[r][i].squares;
            all.unfit |= shared[r][i].unfit;
        }
        const int64_t target = (int64_t(blockIdx.x) * 32 + i % 32) * kItems + i / 32;
        if (target < b.columns) b.spans[blockIdx.y * int64_t(b.columns) + target] = all;
    }
}

// One block for kPlaneColumns columns: their scales, and the largest of their norms.
__global__ __launch_bounds__(kPlaneColumns) void plan_scales(const ResidueBlock b) {
    __shared__ float largest[kPlaneColumns];
    const int column = blockIdx.x * kPlaneColumns + threadIdx.x;
    ColumnSpan span{kNoBits, -kNoBits, 0.f, 0};
    if (column < b.columns) {
        for (int s = 0; s < b.splits; ++s) {
            const ColumnSpan part = b.spans[s * int64_t(b.columns) + column];
            span.top = max(span.top, part.top);
            span.low = min(span.low, part.low);
            span.squares += part.squares;
            span.unfit |= part.unfit;
        }
    }
    int scale = 0;
    float bits = kNothing;
    if (span.top > kNoBits) {
        const int lowest = span.top - (kWindow - 1);
        scale = max(span.low, lowest);
        if (span.low < lowest) span.unfit = 1;
        // The norm bounds every product sum (Cauchy-Schwarz). The float32 sum of squares is within 2^-9 where
        // it neither overflowed nor lost more than 2^-26 to underflow; the largest magnitude gives a bound in
        // every case.
        double squares = ldexp(double(b.tokens), 2 * (span.top + 1));
        if (span.top >= -50 && isfinite(span.squares)) squares = min(squares, double(span.squares) * 1.01);
        const double norm = ldexp(sqrt(squares), -scale);
        bits = float(log2(norm)) + 0.01f;
    }
    if (span.unfit) *b.unfit = 1;
    b.scale[column] = scale;
    largest[threadIdx.x] = bits;
    for (int width = kPlaneColumns / 2; width; width /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < width) largest[threadIdx.x] = max(largest[threadIdx.x], largest[threadIdx.x + width]);
    }
    if (threadIdx.x == 0) b.norm_bits[blockIdx.x] = largest[0];
}

__global__ __launch_bounds__(kThreads) void plan_moduli(const ResidueBlock b) {
    const int groups = b.padded_columns / kPlaneColumns;
    for (int i = threadIdx.x; i < groups; i += kThreads) {
        float bits = kNothing;
        for (int j = 0; j < groups; ++j) bits = max(bits, b.norm_bits[i] + b.norm_bits[j] + 1);
        b.plane_moduli[i] = moduli_for(bits);
    }
}

// A warp looks through one token for an infinity, a NaN or a bit below its column's scale.
template <typename T>
__global__ __launch_bounds__(kThreads) void hand_over(const ResidueBlock b) {
    if (!*b.unfit) return;
    const int k = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (k >= b.tokens || b.fates[k] != kTaken) return;
    const T* row = static_cast<const T*>(b.X) + k * b.X_stride;
    bool fits = true;
    for (int column = lane; column < b.columns; column += 32) {
        const Decomposed d = decompose(row[column]);
        if (!d.finite || (d.significand && lowest_bit(d) < b.scale[column])) fits = false;
    }
    if (ptx::ballot(!fits) && lane == 0) b.fates[k] = kHandedOver;
}

// 2^s modulo each of the sixteen moduli, one byte each.
struct PowerTable {
    uint32_t words[kWindow][kMaxModuli / 4];
    constexpr PowerTable() : words() {
        for (int l = 0; l < kMaxModuli; ++l) {
            uint32_t power = 1;
            for (int s = 0; s < kWindow; ++s) {
                words[s][l / 4] |= power << 8 * (l % 4);
                power = power * 2 % modulus(l);
            }
        }
    }
};
__constant__ PowerTable kPowers = PowerTable();

// A value of X in units of its column's scale: significand * 2^shift, negated or not.
struct Scaled {
    uint32_t significand;
    bool negative;
    uint4 powers;  // 2^shift modulo the moduli
};

template <typename T>
__device__ __forceinline__ Scaled scaled(T x, int scale, bool taken, const uint4* powers) {
    const Decomposed d = decompose(x);
    int shift = d.exponent - scale;
    uint32_t significand = d.significand;
    if (shift < 0) {
        // Zeros only, where the value is exact; with a digit count, rounding to nearest.
        const int down = min(-shift, 31);
        significand = (significand + (1u << (down - 1))) >> down;
        shift = 0;
    }
    if (!taken || significand == 0) significand = 0, shift = 0;
    return {significand, d.negative, powers[shift]};
}

// The symmetric residues modulo modulus l of four tokens, packed.
template <typename T, int l>
__device__ __forceinline__ uint32_t pack_residues(const Scaled (&values)[4]) {
    constexpr uint32_t kModulus = modulus(l), kReciprocal = reciprocal(l);
    // A multiple of the modulus above 2^19, the largest product of a half-format significand and a power.
    constexpr uint32_t kOffset = ((1u << 19) / kModulus + 1) * kModulus + centre(l);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t powers[4] = {values[i].powers.x, values[i].powers.y, values[i].powers.z, values[i].powers.w};
        uint32_t product = values[i].significand * (powers[l / 4] >> 8 * (l % 4) & 255u);
        // A float32 significand has 24 bits: one reduction more, to less than 2 p.
        if constexpr (sizeof(T) == 4) product -= __umulhi(product, uint32_t((uint64_t(1) << 32) / kModulus)) * kModulus;
        const uint32_t shifted = values[i].negative ? kOffset - product : kOffset + product;
        const uint32_t residue = shifted - __umulhi(shifted, kReciprocal) * kModulus - centre(l);
        word |= (residue & 255u) << 8 * i;
    }
    return word;
}

template <typename T, int l>
__device__ __forceinline__ void write_planes(const Scaled (&values)[4], int moduli, int8_t* target,
                                             int64_t plane_bytes) {
    if constexpr (l < kMaxModuli) {
        if (l >= moduli) return;
        *reinterpret_cast<uint32_t*>(target) = pack_residues<T, l>(values);
        write_planes<T, l + 1>(values, moduli, target + plane_bytes, plane_bytes);
    }
}

// A block turns 128 tokens x 64 columns. X passes through shared memory: read by rows, taken out by columns,
// a lane holding four consecutive tokens of one column, which are one word of each plane; a warp writes 2 x
// 64 bytes.
template <typename T>
__global__ __launch_bounds__(kThreads) void planes(const ResidueBlock b) {
    constexpr int kTokens = 128, kColumns = 64, kItems = Chunk<T>::kItems;
    constexpr int kWords = kColumns * int(sizeof(T)) / 4, kChunks = kColumns / kItems;
    __shared__ uint32_t items[kTokens][kWords];
    alignas(16) __shared__ uint32_t powers[kWindow][kMaxModuli / 4];
    const int64_t column0 = int64_t(blockIdx.y) * kColumns;
    const int token0 = blockIdx.x * kTokens;
    const int moduli = b.plane_moduli[column0 / kPlaneColumns];
    if (moduli == 0) return;

    for (int i = threadIdx.x; i < kWindow * kMaxModuli / 4; i += kThreads)
        powers[i / 4][i % 4] = kPowers.words[i / 4][i % 4];
    for (int i = threadIdx.x; i < kTokens * kChunks; i += kThreads) {
        const int token = i / kChunks, k = token0 + token;
        Chunk<T> chunk{};
        if (k < b.tokens)
            chunk.load(static_cast<const T*>(b.X) + k * b.X_stride, column0 + i % kChunks * kItems, b.columns,
                       b.vectors);
        uint4 words;
        memcpy(&words, &chunk, sizeof(words));
        // Words are permuted by token, so that 32 lanes reading one column at every fourth token hit 32
        // banks.
        const int word = i % kChunks * 4, swizzle = token / 4 % 32;
        items[token][word ^ swizzle] = words.x;
        items[token][(word + 1) ^ swizzle] = words.y;
        items[token][(word + 2) ^ swizzle] = words.z;
        items[token][(word + 3) ^ swizzle] = words.w;
    }
    __syncthreads();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token_block = token0 / kPlaneTokens + lane / 16;
    if (token_block >= b.token_blocks) return;
    bool taken[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int k = token0 + 4 * lane + i;
        taken[i] = k < b.tokens && b.fates[k] == kTaken;
    }
    const int64_t plane_bytes = int64_t(b.token_blocks) * b.padded_columns * kPlaneTokens;
#pragma unroll 1
    for (int c = warp * 8; c < warp * 8 + 8; ++c) {
        const int scale = b.scale[column0 + c];
        Scaled values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int per_word = 4 / int(sizeof(T));
            const uint32_t word = items[4 * lane + i][(c / per_word) ^ lane];
            T item;
            item.bits = decltype(item.bits)(word >> (c % per_word * 16));
            values[i] = scaled(item, scale, taken[i], reinterpret_cast<const uint4*>(powers));
        }
        int8_t* target = b.planes + (int64_t(token_block) * b.padded_columns + column0) * kPlaneTokens +
                         plane_chunk(c, lane % 16 / 4) + lane % 4 * 4;
        write_planes<T, 0>(values, moduli, target, plane_bytes);
    }
}

template <typename T>
int write_typed(const ResidueBlock& b, cudaStream_t stream) {
    const unsigned strips = unsigned(divide_up(b.columns, 32 * Chunk<T>::kItems));
    int status = ptx::launch(scan<T>, dim3{strips, unsigned(b.splits)}, kThreads, 0, stream, b);
    if (status) return status;
    const unsigned groups = unsigned(b.padded_columns / kPlaneColumns);
    status = ptx::launch(plan_scales, dim3{groups}, kPlaneColumns, 0, stream, b);
    if (status) return status;
    status = ptx::launch(plan_moduli, dim3{1}, kThreads, 0, stream, b);
    if (status) return status;
    const unsigned token_warps = unsigned(divide_up(b.tokens, kThreads / 32));
    status = ptx::launch(hand_over<T>, dim3{token_warps}, kThreads, 0, stream, b);
    if (status) return status;
    const dim3 grid{unsigned(divide_up(b.token_blocks, 2)), unsigned(b.padded_columns / 64)};
    return ptx::launch(planes<T>, grid, kThreads, 0, stream, b);
}

}  // namespace

int write_residues(const ResidueBlock& b, cudaStream_t stream) {
    switch (b.dtype) {
        case Dtype::kFloat16:
            return write_typed<Float16>(b, stream);
        case Dtype::kBfloat16:
            return write_typed<Bfloat16>(b, stream);
        case Dtype::kFloat32:
            return write_typed<Float32>(b, stream);
        default:
            return kBadDtype;
    }
}

}  // namespace slicegpt
