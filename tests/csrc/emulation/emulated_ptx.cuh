// csrc/ptx.cuh for the host: each instruction as the PTX manual describes it, with its fragment layout.
// Lane l has g = l / 4 and t = l % 4 throughout.
#pragma once

#include <cuda_runtime.h>

#include "emulated_hopper.cuh"

// As in code for sm_90a.
#define SLICEGPT_HAS_WGMMA (SLICEGPT_ARCH >= 900)

namespace slicegpt::ptx {

using emulation::exchange;

inline unsigned char* dynamic_shared() { return emulation::own_block().shared.data(); }
inline int lane() { return int(emulation::current->index % 32); }

inline void cp_async_16(void* shared, const void* global, int bytes) {
    if (uintptr_t(shared) % 16 || uintptr_t(global) % 16) emulation::fail("cp.async needs 16-byte alignment");
    if (bytes < 0 || bytes > 16) emulation::fail("cp.async copies 0 to 16 bytes");
    emulation::current->open.push_back({shared, global, bytes});
}
inline void cp_async_commit() {
    emulation::current->groups.push_back(std::move(emulation::current->open));
    emulation::current->open.clear();
}
template <int kPending>
void cp_async_wait() {
    auto& groups = emulation::current->groups;
    while (groups.size() > kPending) {
        for (const emulation::Copy& copy : groups.front()) {
            std::memset(copy.target, 0, 16);
            std::memcpy(copy.target, copy.source, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

// A[M x K] and B[K x N] of one step, gathered from the lanes; Fragment says where a lane's items stand.
template <int M, int N, int K, typename Item>
struct Operands {
    Item a[M][K];
    Item b[K][N];
};

template <int M, int N, int K, typename Item, typename Sum>
void contract(Sum* c, int items, const Operands<M, N, K, Item>& operands) {
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < items; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        Sum sum = c[i];
        for (int k = 0; k < K; ++k) sum = std::fma(Sum(operands.a[row][k]), Sum(operands.b[k][column]), sum);
        c[i] = sum;
    }
}

struct DoubleFragment {
    double a[4], b[2];
};

// kHalves row halves (g, g + 8) and kSteps groups of four k: a[2s + h] (h = 0 alone where M = 8), b[s].
template <int kHalves, int kSteps>
void mma_f64(double* c, const DoubleFragment& mine) {
    DoubleFragment all[32];
    exchange(mine, all);
    Operands<8 * kHalves, 8, 4 * kSteps, double> operands;
    for (int l = 0; l < 32; ++l)
        for (int s = 0; s < kSteps; ++s) {
            for (int h = 0; h < kHalves; ++h)
                operands.a[l / 4 + 8 * h][4 * s + l % 4] = all[l].a[kHalves * s + h];
            operands.b[4 * s + l % 4][l / 4] = all[l].b[s];
        }
    contract(c, 2 * kHalves, operands);
}
inline void mma_f64_m8n8k4(double& c0, double& c1, double a, double b) {
    double c[2] = {c0, c1};
    mma_f64<1, 1>(c, {{a}, {b}});
    c0 = c[0], c1 = c[1];
}
inline void mma_f64_m16n8k8(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
    mma_f64<2, 2>(c, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
}

struct WordFragment {
    uint32_t a[4], b[2];
};

// int8, four items a word: a[2j + h] is row g + 8h, k = 16j + 4t ...; b[j] is k = 16j + 4t ..., column g.
template <int kHalves, int kSteps>
void mma_s8(int* c, const WordFragment& mine) {
    WordFragment all[32];
    exchange(mine, all);
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 2 * kHalves; ++i) {
        const int h = i / 2, column = 2 * t + i % 2;
        int64_t sum = c[i];
        for (int j = 0; j < kSteps; ++j)
            for (int q = 0; q < 4; ++q)
                for (int byte = 0; byte < 4; ++byte)
                    sum += int64_t(int8_t(all[4 * g + q].a[kHalves * j + h] >> 8 * byte)) *
                           int8_t(all[4 * column + q].b[j] >> 8 * byte);
        if (sum != int32_t(sum)) emulation::fail("int32 accumulator overflow");
        c[i] = int(sum);
    }
}
inline void mma_s8_m16n8k32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_s8<2, 2>(c, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
}
inline void mma_s8_m8n8k16(int& c0, int& c1, uint32_t a, uint32_t b) {
    int c[2] = {c0, c1};
    mma_s8<1, 1>(c, {{a}, {b}});
    c0 = c[0], c1 = c[1];
}

// 16-bit items, two a word: a[2j + h] is row g + 8h, k = 8j + 2t, + 1; b[j] is k = 8j + 2t, + 1, column g.
template <int kSteps, float (*kConvert)(uint16_t)>
void mma_half(float* c, const WordFragment& mine) {
    WordFragment all[32];
    exchange(mine, all);
    Operands<16, 8, 8 * kSteps, float> operands;
    for (int l = 0; l < 32; ++l)
        for (int j = 0; j < kSteps; ++j)
            for (int q = 0; q < 2; ++q) {
                const int k = 8 * j + 2 * (l % 4) + q;
                for (int h = 0; h < 2; ++h)
                    operands.a[l / 4 + 8 * h][k] = kConvert(uint16_t(all[l].a[2 * j + h] >> 16 * q));
                operands.b[k][l / 4] = kConvert(uint16_t(all[l].b[j] >> 16 * q));
            }
    contract(c, 4, operands);
}
inline void mma_f16_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_half<2, half_to_float>(c, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
}
inline void mma_bf16_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_half<2, bfloat_to_float>(c, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
}
inline void mma_f16_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    mma_half<1, half_to_float>(c, {{a0, a1}, {b}});
}

// Lane l gives the address of row l % 8 of matrix l / 8 and receives items 2t, 2t + 1 of row g of each;
// transposed: items g of rows 2t and 2t + 1.
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    if (uintptr_t(row) % 16) emulation::fail("ldmatrix needs 16-byte alignment");
    const void* rows[32];
    exchange(row, rows);
    const int g = lane() / 4, t = lane() % 4;
    for (int m = 0; m < 4; ++m) {
        uint16_t items[2];
        for (int q = 0; q < 2; ++q)
            items[q] = transposed ? static_cast<const uint16_t*>(rows[8 * m + 2 * t + q])[g]
                                  : static_cast<const uint16_t*>(rows[8 * m + g])[2 * t + q];
        r[m] = uint32_t(items[1]) << 16 | items[0];
    }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { load_matrices(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { load_matrices(r, row, true); }

inline uint16_t float_to_half(float value) {
    const uint16_t sign = uint16_t(__float_as_uint(value) >> 16 & 0x8000u);
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00;
    if (magnitude >= 65520.f) return sign | 0x7c00;
    if (magnitude == 0) return sign;
    // In units of the last place: below 2^-14 they are all 2^-24. nearbyint rounds ties to even.
    int exponent;
    std::frexp(magnitude, &exponent);
    const int unit = max(exponent - 11, -24);
    const int count = int(std::nearbyint(std::ldexp(magnitude, -unit)));
    return sign | uint16_t(count + (unit + 24) * 1024);  // a carry into the exponent field is the right one
}

inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (std::isnan(value)) return 0x7fff;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint32_t floats_to_half2(float low, float high) {
    return float_to_half(low) | uint32_t(float_to_half(high)) << 16;
}
inline uint32_t floats_to_bfloat2(float low, float high) {
    return float_to_bfloat(low) | uint32_t(float_to_bfloat(high)) << 16;
}

inline uint4 load_once_16(const void* global) {
    if (uintptr_t(global) % 16) emulation::fail("a load of 16 bytes needs their alignment");
    uint4 v;
    std::memcpy(&v, global, 16);
    return v;
}
inline void prefetch_l2(const void*) {}
// Reads what it would fetch: memory that is not there is noticed.
inline void prefetch_bulk_l2(const void* global, uint32_t bytes) {
    if (uintptr_t(global) % 16 || bytes % 16 || !bytes) emulation::fail("cp.async.bulk needs multiples of 16 bytes");
    volatile unsigned char sum = 0;
    for (uint32_t i = 0; i < bytes; i += 16) sum = sum + static_cast<const unsigned char*>(global)[i];
    sum = sum + static_cast<const unsigned char*>(global)[bytes - 1];
}
inline void wait_for_previous_kernels() {}
inline void allow_next_kernel() {}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

inline float shuffle_xor(float value, int mask) {
    float all[32];
    return exchange(value, all)[lane() ^ mask];
}
inline uint32_t shuffle_xor(uint32_t value, int mask) {
    uint32_t all[32];
    return exchange(value, all)[lane() ^ mask];
}
inline double shuffle(double value, int source) {
    double all[32];
    return exchange(value, all)[source & 31];
}
inline int first_lane(int value) {
    int all[32];
    return exchange(value, all)[0];
}
inline unsigned ballot(bool value) {
    bool all[32];
    exchange(value, all);
    unsigned mask = 0;
    for (int l = 0; l < 32; ++l) mask |= unsigned(all[l]) << l;
    return mask;
}

template <typename... Parameters, typename... Arguments>
int launch_clusters(int size, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t,
                    Arguments... arguments) {
    ++emulation::launches[emulation::device];
    emulation::grid = grid;
    emulation::block = dim3(threads);
    emulation::cluster.resize(size);
    if (grid.x % unsigned(size)) emulation::fail("a grid of whole clusters");
    if (shared > emulation::kSharedLimit) emulation::fail("more shared memory than a block can have");
    for (emulation::Block& block : emulation::cluster) block.shared.resize(shared);
    emulation::body = [=] { kernel(arguments...); };
    // A GPU starts blocks, and the warps of a block, in any order, and no kernel may depend on it:
    // SLICEGPT_EMULATION_REVERSED=1 runs the last first.
    const char* const wish = std::getenv("SLICEGPT_EMULATION_REVERSED");
    emulation::reversed = wish && *wish == '1';
    const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / unsigned(size);
    for (uint64_t i = 0; i < clusters; ++i) {
        for (int rank = 0; rank < size; ++rank) {
            const uint64_t b = (emulation::reversed ? clusters - 1 - i : i) * unsigned(size) + unsigned(rank);
            emulation::cluster[rank].index =
                dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
        }
        emulation::run_cluster(threads);
    }
    return 0;
}
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
           Arguments... arguments) {
    return launch_clusters(1, kernel, grid, threads, shared, stream, arguments...);
}
template <typename... Parameters, typename... Arguments>
int launch_overlapped(bool, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                      cudaStream_t stream, Arguments... arguments) {
    return launch(kernel, grid, threads, shared, stream, arguments...);
}

}  // namespace slicegpt::ptx
