// Every PTX instruction that the kernels use, one function each, and the few things of the CUDA language that
// plain C++ lacks (launches, dynamic shared memory). Kernels hold no inline assembly of their own, so the
// tests can compile the same kernels for the host: without nvcc, emulated_ptx.cuh supplies these functions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include <emulated_ptx.cuh>
#else

#include <cuda.h>

#include "device.h"

// The architecture of the pass at hand; 0 in nvcc's host pass, where kernel bodies are parsed but not used.
#if defined(__CUDA_ARCH__)
#define SLICEGPT_ARCH __CUDA_ARCH__
#else
#define SLICEGPT_ARCH 0
#endif

// wgmma exists in code for sm_90a alone, not in plain sm_90 or compute_90.
#if SLICEGPT_ARCH == 0 || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SLICEGPT_HAS_WGMMA 1
#else
#define SLICEGPT_HAS_WGMMA 0
#endif

namespace slicegpt::ptx {

// What the copy engine knows of a matrix of 16-bit items: the driver's CUtensorMap. A kernel's parameter, by value.
struct alignas(128) TensorMap {
    unsigned char bytes[128];
};
constexpr int kTileBoxRows = 128, kTileBoxColumns = 64;

// Rows of `columns` items, `stride` items apart; base and 2 * stride are multiples of 16. The answer is CUDA's code.
inline int make_tensor_map(TensorMap* map, const void* base, int64_t rows, int64_t columns, int64_t stride) {
#if CUDART_VERSION >= 12050
    // From the driver, found at run time: the module links to no libcuda, and loads where there is none.
    void* found = nullptr;
    cudaDriverEntryPointQueryResult answer;
    if (int error = report(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &answer)))
        return error;
    if (answer != cudaDriverEntryPointSuccess) return int(cudaErrorNotSupported);
    const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(2 * stride)};
    const cuuint32_t box[2] = {kTileBoxColumns, kTileBoxRows}, steps[2] = {1, 1};
    static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
    const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
        reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(base), sizes, strides,
        box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? 0 : int(cudaErrorInvalidValue);
#else
    return int(cudaErrorNotSupported);
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

#if SLICEGPT_ARCH == 0 || SLICEGPT_ARCH >= 800

// Copies `bytes` (0..16) of 16 and fills the rest with zeros; both addresses are 16-byte aligned.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// C[8x8] += A[8x4] B[4x8]
__device__ __forceinline__ void mma_f64_m8n8k4(double& c0, double& c1, double a, double b) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(c0), "+d"(c1)
        : "d"(a), "d"(b));
}

__device__ __forceinline__ void mma_s8_m16n8k32(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_bf16_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#if SLICEGPT_ARCH == 0 || SLICEGPT_ARCH >= 900
// C[16x8] += A[16x8] B[8x8]; Hopper's own shape, twice the rate of m8n8k4 there
__device__ __forceinline__ void mma_f64_m16n8k8(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
}
#endif

__device__ __forceinline__ void mma_s8_m8n8k16(int& c0, int& c1, uint32_t a, uint32_t b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c0), "+r"(c1)
        : "r"(a), "r"(b));
}

__device__ __forceinline__ void mma_f16_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

// Four 8x8 matrices of 16-bit items: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// To nearest, ties to even; beyond the largest finite number: infinity.
__device__ __forceinline__ uint16_t float_to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#if SLICEGPT_ARCH == 0 || SLICEGPT_ARCH >= 800
// The same of two numbers, `low` into the lower half of a word; a NaN becomes the one that the hardware writes.
__device__ __forceinline__ uint32_t floats_to_half2(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
__device__ __forceinline__ uint32_t floats_to_bfloat2(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
#endif

// 16 bytes that are read once: past L1, and the rest of their line into L2. Volatile, so that loads are issued where
// they are written, well before their first use.
__device__ __forceinline__ uint4 load_once_16(const void* global) {
    uint4 v;
#if SLICEGPT_ARCH >= 800
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
#else
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
#endif
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}
__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// `bytes` from `global` on into L2; both are multiples of 16. One instruction of one thread, where prefetch_l2 takes a
// sector. Nothing before Hopper.
__device__ __forceinline__ void prefetch_bulk_l2(const void* global, uint32_t bytes) {
#if SLICEGPT_ARCH >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes));
#endif
}

// Programmatic dependent launch: wait until the kernels before this one are done and their results visible; allow the
// next kernel to start. Nothing where the architecture has none, or the launch did not ask for it.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if SLICEGPT_ARCH >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void allow_next_kernel() {
#if SLICEGPT_ARCH >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if SLICEGPT_ARCH == 0 || SLICEGPT_ARCH >= 900
// A barrier in shared memory that `count` arrivals and the announced bytes complete, phase after phase.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces bytes that this phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Whether the phase of this parity is complete. Suspends the thread for a while where it is not.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, int parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Copies consecutive bytes, a multiple of 16, from addresses that are multiples of 16; the barrier counts them when
// they have arrived.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// The same to this place in every block of the cluster that the mask names; the barrier at this place there counts.
__device__ __forceinline__ void copy_bulk_multicast(void* shared, const void* global, int bytes, uint64_t* barrier,
                                                    unsigned mask) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(uint16_t(mask))
        : "memory");
}

// The same for a tile of kTileBoxRows rows of kTileBoxColumns items of a matrix, from (row, column) on; outside of the
// matrix there are zeros, which count as bytes too. A row takes 128 bytes with the 128-byte swizzle: the tile must
// start at a multiple of 1024.
__device__ __forceinline__ void copy_tile(void* shared, const TensorMap& map, int row, int column, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(shared)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}
__device__ __forceinline__ void copy_tile_multicast(void* shared, const TensorMap& map, int row, int column,
                                                    uint64_t* barrier, unsigned mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(uint16_t(mask))
        : "memory");
}

// Arrives at the barrier that stands at this place in another block of the cluster, or in the own one. For reads that
// are complete: it publishes no writes to the other block (that would take a fence of the whole GPU).
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}
__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}
// All threads of a cluster that have not ended meet here.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// What this thread initialised is an mbarrier for the other blocks of the cluster, and for copies that they send, once
// they have met it at a barrier of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's own accesses to shared memory before those of the asynchronous proxy (bulk copies, wgmma).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

#if SLICEGPT_HAS_WGMMA
// Asynchronous products of a warpgroup: fence, products, commit, wait. Every step names the accumulators, so that the
// compiler can neither read nor move them in between.
// kind: "+r" for integers, "+f" for floats.
#define SLICEGPT_REGISTERS_8(kind, d, i)                                                                        \
    kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3]), kind(d[i + 4]), kind(d[i + 5]), kind(d[i + 6]), \
        kind(d[i + 7])
#define SLICEGPT_REGISTERS_32(kind, d, i)                                                                          \
    SLICEGPT_REGISTERS_8(kind, d, i), SLICEGPT_REGISTERS_8(kind, d, i + 8), SLICEGPT_REGISTERS_8(kind, d, i + 16), \
        SLICEGPT_REGISTERS_8(kind, d, i + 24)
#define SLICEGPT_REGISTERS_128(kind, d)                                                                        \
    SLICEGPT_REGISTERS_32(kind, d, 0), SLICEGPT_REGISTERS_32(kind, d, 32), SLICEGPT_REGISTERS_32(kind, d, 64), \
        SLICEGPT_REGISTERS_32(kind, d, 96)
// The 128 accumulators as an instruction lists them.
#define SLICEGPT_LIST_128                                                                          \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

__device__ __forceinline__ void wgmma_fence(int (&d)[128]) {
    asm volatile("wgmma.fence.sync.aligned;" : SLICEGPT_REGISTERS_128("+r", d)::"memory");
}
__device__ __forceinline__ void wgmma_fence(float (&d)[128]) {
    asm volatile("wgmma.fence.sync.aligned;" : SLICEGPT_REGISTERS_128("+f", d)::"memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most kPending groups are still in flight; with 0 the accumulators hold the sums.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(int (&d)[128]) {
    asm volatile("wgmma.wait_group.sync.aligned %128;" : SLICEGPT_REGISTERS_128("+r", d) : "n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait(float (&d)[128]) {
    asm volatile("wgmma.wait_group.sync.aligned %128;" : SLICEGPT_REGISTERS_128("+f", d) : "n"(kPending) : "memory");
}
// D[64x256] += A[64x32] B[32x256], both K-major in shared memory, given by their matrix descriptors.
// d[4j + 2h + q] is row 16 (warp % 4) + lane / 4 + 8h, column 8j + 2 (lane % 4) + q.
__device__ __forceinline__ void wgmma_m64n256k32_s8(int (&d)[128], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 " SLICEGPT_LIST_128 ", %128, %129, 1;"
                 : SLICEGPT_REGISTERS_128("+r", d)
                 : "l"(a), "l"(b));
}
// D[64x256] += A[64x16] B[16x256] of 16-bit numbers, in float32; operands and d as above.
__device__ __forceinline__ void wgmma_m64n256k16_f16(float (&d)[128], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 " SLICEGPT_LIST_128 ", %128, %129, 1, 1, 1, 0, 0;"
                 : SLICEGPT_REGISTERS_128("+f", d)
                 : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma_m64n256k16_bf16(float (&d)[128], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " SLICEGPT_LIST_128
                 ", %128, %129, 1, 1, 1, 0, 0;"
                 : SLICEGPT_REGISTERS_128("+f", d)
                 : "l"(a), "l"(b));
}
#undef SLICEGPT_LIST_128
#undef SLICEGPT_REGISTERS_128
#undef SLICEGPT_REGISTERS_32
#undef SLICEGPT_REGISTERS_8
#endif

// The bytes of two registers, numbered 0 to 7 from a's lowest on, as the four digits of `selector` choose.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ double shuffle(double value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
// The value of lane 0 in all lanes; the compiler then knows that they agree.
__device__ __forceinline__ int first_lane(int value) { return __shfl_sync(0xffffffffu, value, 0); }
__device__ __forceinline__ unsigned ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

// Above 48 KB a kernel must ask for its shared memory; a cheap call that graph capture allows.
template <typename Kernel>
int ask_for_shared(Kernel* kernel, size_t shared) {
    if (shared <= 48 * 1024) return 0;
    return report(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
}

// Launches a kernel; the error, if any, is CUDA's code.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
           Arguments... arguments) {
    if (int error = ask_for_shared(kernel, shared)) return error;
    // clang-format off
    kernel<<<grid, threads, shared, stream>>>(arguments...);
    // clang-format on
    return int(cudaGetLastError());
}

// The same through the extensible launch, with one attribute.
template <typename... Parameters, typename... Arguments>
int launch_with(cudaLaunchAttribute attribute, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                cudaStream_t stream, Arguments... arguments) {
    if (int error = ask_for_shared(kernel, shared)) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return report(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// The same as launch with clusters of `size` blocks (compute capability 9.0 on), neighbours in x.
template <typename... Parameters, typename... Arguments>
int launch_clusters(int size, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                    Arguments... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    return launch_with(attribute, kernel, grid, threads, shared, stream, arguments...);
}

// The same as launch, and where `overlap` is set (compute capability 9.0 on) the kernel may start before the one
// ahead of it in the stream has ended; it must call wait_for_previous_kernels() before it touches what others
// write.
template <typename... Parameters, typename... Arguments>
int launch_overlapped(bool overlap, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                      cudaStream_t stream, Arguments... arguments) {
    if (!overlap) return launch(kernel, grid, threads, shared, stream, arguments...);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return launch_with(attribute, kernel, grid, threads, shared, stream, arguments...);
}

}  // namespace slicegpt::ptx
#endif
