// One emulated wgmma on operands and descriptors from outside, so that a test can give it right and wrong ones; and a
// pair of blocks that use each other's barriers.
#include "../../csrc/ptx.cuh"

namespace {

enum Mistake { kNone, kNoFence, kTouchedAccumulators, kReadTooEarly, kOverwrittenOperand, kFewThreads };

struct Probe {
    const unsigned char* shared;
    int shared_bytes;
    uint64_t a, b;  // descriptors whose start addresses count from an address that is a multiple of 1024
    int mistake;
    int* result;  // [64][256]
};

void multiply_once(Probe p) {
    namespace ptx = slicegpt::ptx;
    unsigned char* const memory = ptx::dynamic_shared();
    const uint32_t skip = 1024 - ptx::shared_address(memory) % 1024;
    if (threadIdx.x == 0) std::memcpy(memory + skip, p.shared, p.shared_bytes);
    __syncthreads();
    const uint64_t start = ptx::shared_address(memory + skip) >> 4;
    int sums[128] = {};
    if (p.mistake != kNoFence) ptx::wgmma_fence(sums);
    ptx::wgmma_m64n256k32_s8(sums, p.a + start, p.b + start);
    ptx::wgmma_commit();
    if (p.mistake == kTouchedAccumulators) sums[5] += 1;
    if (p.mistake == kOverwrittenOperand && threadIdx.x == 0) memory[skip] ^= 1;
    if (p.mistake != kReadTooEarly) ptx::wgmma_wait<0>(sums);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 128; ++i)
        p.result[(16 * warp + lane / 4 + i / 2 % 2 * 8) * 256 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
    if (p.mistake == kReadTooEarly) ptx::wgmma_wait<0>(sums);
}

// Each block sends half of what both need, and tells the other when it has read.
void copy_for_each_other(const unsigned char* source, bool fence) {
    namespace ptx = slicegpt::ptx;
    auto* const barriers = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
    const int rank = ptx::cluster_rank();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&barriers[0], 1);
        ptx::mbarrier_init(&barriers[1], 2);
        ptx::fence_proxy_async();
        if (fence) ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&barriers[0], 32);
        ptx::copy_bulk_multicast(&barriers[2 + 2 * rank], source + 16 * rank, 16, &barriers[0], 3);
        while (!ptx::mbarrier_try_wait(&barriers[0], 0)) {
        }
        for (int other = 0; other < 2; ++other) ptx::mbarrier_arrive_at(&barriers[1], other);
        while (!ptx::mbarrier_try_wait(&barriers[1], 0)) {
        }
        if (std::memcmp(&barriers[2], source, 32)) emulation::fail("other bytes");
    }
    ptx::cluster_sync();
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void pair(const unsigned char* source, int fence) {
    slicegpt::ptx::launch_clusters(2, copy_for_each_other, dim3{2}, 32, 128, nullptr, source, fence != 0);
}

extern "C" __attribute__((visibility("default"))) void probe(const unsigned char* shared, int shared_bytes, uint64_t a,
                                                             uint64_t b, int mistake, int* result) {
    slicegpt::ptx::launch(multiply_once, dim3{1}, mistake == kFewThreads ? 96 : 128, size_t(shared_bytes) + 1024,
                          nullptr, Probe{shared, shared_bytes, a, b, mistake, result});
}
