// Runs CUDA kernels on the host, one fibre a thread, so that the sources in csrc/ can be tested without a
// GPU.
//
// A stand-in for the toolkit's header of the same name: the tests put this folder first on the include path
// and compile csrc/*.cu as plain C++. Blocks run one after another, or the blocks of a cluster together; the threads of a block are fibres that
// switch only at barriers and warp collectives, so a missing barrier shows as a wrong result or as a
// deadlock, which aborts with a message. Shared memory starts filled with NaN bytes, and asynchronous copies
// land only when they are waited for.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "guarded_shared.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

using std::fma;
using std::isfinite;
using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) double2 {
    double x, y;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };

namespace emulation {
// Two devices, of three multiprocessors and of two: few enough that small tests need several splits of the tokens.
constexpr int kDevices = 2, kProcessors[kDevices] = {3, 2};
inline int device = 0;
inline int launches[kDevices] = {};  // and memsets
}  // namespace emulation

// For tests, which call them in the compiled module.
extern "C" {
__attribute__((visibility("default"), used)) inline int emulated_device() { return emulation::device; }
__attribute__((visibility("default"), used)) inline int emulated_launches(int device) {
    return emulation::launches[device];
}
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = emulation::device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= emulation::kDevices) return cudaErrorInvalidDevice;
    emulation::device = device;
    return cudaSuccess;
}
// Internal linkage: objects compiled for different SLICEGPT_ARCH meet in one module.
static inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::kProcessors[device] : SLICEGPT_ARCH / 100;
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
    ++emulation::launches[emulation::device];
    std::memset(target, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {
    int numRegs;
};
// Compiled as for sm_90a, or as for an architecture without wgmma: an empty kernel.
template <typename Kernel>
static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
    attributes->numRegs = SLICEGPT_ARCH >= 900 ? 255 : 16;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid device ordinal" : "no error"; }
inline const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorInvalidDevice" : "cudaSuccess"; }

namespace emulation {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSlotBytes = 128;

struct Copy {
    void* target;
    const void* source;
    int bytes;
    std::shared_ptr<std::vector<unsigned char>> owned = nullptr;  // what `source` points to, if it is a copy itself
};

struct Barrier {
    int arrived = 0, generation = 0, members = 0;
};

struct Thread {
    unsigned index = 0;  // in its block
    unsigned rank = 0;   // of its block in the cluster
    unsigned warp = 0;   // in the cluster
    bool started = false, finished = false;
    jmp_buf state;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    std::vector<std::vector<Copy>> groups;  // committed asynchronous copies, oldest first
    std::vector<Copy> open;
    int collectives = 0;
};

// What the lanes of a warp show each other, in two buffers used in turn: a lane can be at most one collective
// ahead.
struct Warp {
    Barrier barrier;
    alignas(16) unsigned char slots[2][32][kSlotBytes];
};

struct Block {
    dim3 index;
    Barrier barrier;
    int running = 0;  // threads that have not ended
    GuardedBytes shared;
};

inline dim3 grid, block;
inline std::vector<Block> cluster;  // the blocks that run together: one, or a cluster
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier cluster_barrier;
inline Thread* current;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline bool progressed;
inline bool reversed = false;  // the last block and the last thread start first
inline void (*cluster_ended)() = nullptr;  // what more there is to check (emulated_hopper.cuh)

[[noreturn]] inline void fail(const char* message) {
    const Block& where = cluster[current ? current->rank : 0];
    std::fprintf(stderr, "emulation: %s (block %u, %u, thread %u)\n", message, where.index.x, where.index.y,
                 current ? current->index : 0);
    std::abort();
}

inline Block& own_block() { return cluster[current->rank]; }

inline void yield() {
    if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

inline void leave(Barrier& barrier) {
    --barrier.members;
    if (barrier.members && barrier.arrived == barrier.members) barrier.arrived = 0, ++barrier.generation;
}

inline void wait(Barrier& barrier) {
    const int generation = barrier.generation;
    progressed = true;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
    progressed = true;
}

inline void enter() {
    body();
    current->finished = true;
    --own_block().running;
    leave(own_block().barrier);
    leave(cluster_barrier);
    leave(warps[current->warp].barrier);
    progressed = true;
    _longjmp(scheduler, 1);
}

// Runs the blocks of `cluster`, of `size` threads each.
inline void run_cluster(int size) {
    const int block_warps = (size + 31) / 32, blocks = int(cluster.size()), count = size * blocks;
    if (int(threads.size()) < count) threads = std::vector<Thread>(count);
    if (int(warps.size()) < block_warps * blocks) warps = std::vector<Warp>(block_warps * blocks);
    for (Block& one : cluster) {
        std::fill(one.shared.begin(), one.shared.end(), 0xff);
        one.barrier = {0, 0, size};
        one.running = size;
    }
    cluster_barrier = {0, 0, count};
    for (int w = 0; w < block_warps * blocks; ++w)
        warps[w].barrier = {0, 0, std::min(32, size - 32 * (w % block_warps))};
    for (int i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        thread.index = i % size, thread.rank = i / size;
        thread.warp = thread.rank * block_warps + thread.index / 32;
        thread.started = thread.finished = false, thread.collectives = 0;
        thread.groups.clear(), thread.open.clear();
    }
    int sweep = 0;
    for (int left = count; left; ++sweep) {
        progressed = false;
        left = 0;
        for (int turn = 0; turn < count; ++turn) {
            Thread& thread = threads[reversed ? count - 1 - turn : turn];
            if (thread.finished) continue;
            ++left;
            // The first block of a cluster may start when the others are long under way.
            if (reversed && thread.rank + 1 < cluster.size() && sweep < 8) {
                progressed = true;
                continue;
            }
            current = &thread;
            if (_setjmp(scheduler)) continue;
            if (thread.started) _longjmp(thread.state, 1);
            thread.started = true;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.get();
            thread.context.uc_stack.ss_size = kStackBytes;
            makecontext(&thread.context, enter, 0);
            setcontext(&thread.context);
        }
        if (left && !progressed) fail("deadlock: threads wait at different barriers");
    }
    current = nullptr;
    for (const Block& one : cluster)
        if (!one.shared.intact()) fail("a write beyond the end of shared memory");
    if (cluster_ended) cluster_ended();
}

// Shows `value` to the other lanes and returns the warp's 32 values.
template <typename T>
const T* exchange(const T& value, T (&all)[32]) {
    static_assert(sizeof(T) <= kSlotBytes);
    Warp& warp = warps[current->warp];
    if (warp.barrier.members != 32) fail("a warp collective needs all 32 lanes");
    auto& slots = warp.slots[current->collectives++ % 2];
    std::memcpy(slots[current->index % 32], &value, sizeof(T));
    wait(warp.barrier);
    for (int lane = 0; lane < 32; ++lane) std::memcpy(&all[lane], slots[lane], sizeof(T));
    return all;
}

struct Index {
    struct X {
        operator unsigned() const { return current->index; }
    } x;
};

}  // namespace emulation

#define threadIdx (emulation::Index{})
#define blockIdx (emulation::own_block().index)
#define gridDim (emulation::grid)
#define blockDim (emulation::block)

inline void __syncthreads() { emulation::wait(emulation::own_block().barrier); }
inline void __syncwarp() { emulation::wait(emulation::warps[emulation::current->warp].barrier); }

template <typename To, typename From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
inline double __longlong_as_double(long long x) { return bits_as<double>(x); }
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
// Blocks run one after another, so an atomic is an ordinary access and a fence nothing.
inline unsigned atomicAdd(unsigned* target, unsigned value) {
    const unsigned before = *target;
    *target += value;
    return before;
}
inline void __threadfence() {}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
