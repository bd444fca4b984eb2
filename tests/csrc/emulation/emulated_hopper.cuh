// csrc/ptx.cuh's Hopper instructions for the host: barriers in shared memory, bulk copies, and wgmma, as the PTX manual
// describes them. Shared memory has addresses of its own here, as on a GPU: swizzles act on them.
//
// What is asynchronous is done at an unkind time. Every second bulk copy arrives at once, the others only when
// somebody waits for them; wgmma's operands are read when it is issued and must still be there when it is waited for,
// and in between the accumulators hold rubbish.
#pragma once

#include <cuda_runtime.h>

#include <map>

namespace slicegpt::ptx {

inline float half_to_float(uint16_t bits) {
    const int field = bits >> 10 & 31, fraction = bits & 1023;
    float value = field ? std::ldexp(float(fraction | 1024), field - 25) : std::ldexp(float(fraction), -24);
    if (field == 31) value = fraction ? NAN : INFINITY;
    return bits >> 15 ? -value : value;
}
inline float bfloat_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

// The facts that the driver packs into 128 bytes.
struct TensorMap {
    const unsigned char* base;
    int64_t rows, columns, stride;
};
constexpr int kTileBoxRows = 128, kTileBoxColumns = 64;

}  // namespace slicegpt::ptx

namespace emulation {

constexpr size_t kSharedLimit = 227 * 1024;
// Neither 0 nor a multiple of more than the 128 bytes that dynamic shared memory is declared with.
constexpr uint32_t kSharedStart = 1024 + 128;

inline uint32_t shared_address(const void* pointer) {
    const auto offset = static_cast<const unsigned char*>(pointer) - own_block().shared.data();
    if (offset < 0 || size_t(offset) >= own_block().shared.size()) fail("not an address in dynamic shared memory");
    return kSharedStart + uint32_t(offset);
}
inline unsigned char* shared_pointer(uint32_t address, int bytes) {
    const int64_t offset = int64_t(address) - kSharedStart;
    if (offset < 0 || size_t(offset) + bytes > own_block().shared.size())
        fail("an access outside of dynamic shared memory");
    return own_block().shared.data() + offset;
}
// Where another block of the cluster has what stands at this address in the own one.
inline unsigned char* shared_of(int rank, const void* pointer) {
    if (rank < 0 || rank >= int(cluster.size())) fail("no such block in the cluster");
    if (!cluster[rank].running) fail("a block was used that had ended");
    return cluster[rank].shared.data() + (shared_address(pointer) - kSharedStart);
}

struct Mbarrier {
    int count = 0, pending = 0;
    int64_t bytes = 0;  // announced and not arrived; negative where they arrived first
    unsigned phase = 0;
    const Thread* creator = nullptr;
    bool fenced = false;     // for the asynchronous proxy
    bool published = false;  // for the other blocks of the cluster
    std::vector<Copy> late;
};

// The operands of one wgmma, as they were when it was issued.
struct Operands {
    uint64_t a_descriptor, b_descriptor;
    int8_t a[64][32], b[256][32];
    float half_a[64][16], half_b[256][16];  // the same as 16-bit numbers
};
using Product = std::shared_ptr<Operands>;

struct Warpgroup {
    Barrier barrier{0, 0, 128};
    // In turn: a thread can be at most one instruction ahead.
    Product products[2];
    int readers[2] = {0, 0};
};

struct Accumulators {
    bool fenced = false;
    int issued = 0;
    void* registers = nullptr;  // of the instructions in flight
    uint32_t sums[128];         // the bits of integers or floats
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
};

// Of the cluster that is running.
struct Hopper {
    int copies = 0;
    std::map<const void*, Mbarrier> barriers;
    std::map<unsigned, Warpgroup> warpgroups;  // by the first warp
    std::map<const Thread*, Accumulators> accumulators;
};
inline Hopper hopper_state;

inline void check_nothing_under_way() {
    for (const auto& [address, barrier] : hopper_state.barriers)
        if (!barrier.late.empty() || barrier.bytes) fail("the block ended before its bulk copies");
    for (const auto& [thread, accumulators] : hopper_state.accumulators)
        if (accumulators.registers) fail("the block ended before its wgmma");
    hopper_state = Hopper{};
}

inline Hopper& hopper() {
    cluster_ended = check_nothing_under_way;
    return hopper_state;
}

inline Mbarrier& mbarrier(const void* address) {
    const auto found = hopper().barriers.find(address);
    if (found == hopper().barriers.end()) fail("this mbarrier was not initialised");
    return found->second;
}

// In the block of this rank, at the same place.
inline Mbarrier& mbarrier_at(const void* pointer, int rank) {
    Mbarrier& state = mbarrier(shared_of(rank, pointer));
    if (rank != int(current->rank) && !state.published)
        fail("another block does not see that this mbarrier was initialised: fence.mbarrier_init");
    return state;
}

inline void complete(Mbarrier& barrier) {
    if (barrier.pending < 0) fail("more arrivals at an mbarrier than its count");
    if (barrier.pending || barrier.bytes) return;
    ++barrier.phase;
    barrier.pending = barrier.count;
    progressed = true;
}

inline void arrive(Mbarrier& barrier) {
    --barrier.pending;
    complete(barrier);
}

inline void land(Mbarrier& barrier, const Copy& copy) {
    std::memcpy(copy.target, copy.source, copy.bytes);
    barrier.bytes -= copy.bytes;
    progressed = true;
    complete(barrier);
}

// The `count` rows of 32 bytes that a matrix descriptor describes (K-major), byte by byte.
template <int kCount>
void read_matrix(uint64_t descriptor, int8_t (&rows)[kCount][32]) {
    constexpr int kWidths[4] = {16, 128, 64, 32};
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
    const uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
    const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    const int mode = int(descriptor >> 62), width = kWidths[mode];
    constexpr uint64_t kReserved = ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62);
    if (descriptor & kReserved) fail("matrix descriptor: unused bits, or a base offset");
    if (mode) {
        const uint32_t inside = start % width;
        if ((start - inside) % (8 * width)) fail("matrix descriptor: the swizzle pattern is not aligned");
        if (inside + 32 > uint32_t(width)) fail("matrix descriptor: K reaches beyond the swizzled row");
    }
    for (int r = 0; r < kCount; ++r)
        for (int k = 0; k < 32; k += 16) {  // swizzles move chunks of 16 bytes
            uint32_t address = start + r / 8 * stride + r % 8 * width;
            if (mode) {
                address += k;
                address ^= (address >> 7 & uint32_t(width / 16 - 1)) << 4;
            } else {
                address += k / 16 * leading;
            }
            std::memcpy(&rows[r][k], shared_pointer(address, 16), 16);
        }
}

inline void read_operands(Operands& operands) {
    read_matrix(operands.a_descriptor, operands.a);
    read_matrix(operands.b_descriptor, operands.b);
}

// A warp that waited may let others overwrite the operands, but only its own wait says that they may.
inline void check_unchanged(const Operands& operands) {
    const auto now = std::make_shared<Operands>(operands);
    read_operands(*now);
    if (std::memcmp(now->a, operands.a, sizeof(now->a)) || std::memcmp(now->b, operands.b, sizeof(now->b)))
        fail("shared memory changed under a wgmma");
}

// While instructions are in flight a register holds its own number, negative (as a float: a NaN): a kernel that reads
// one gets a wrong result, and one that writes is found out.
inline uint32_t rubbish(int register_) { return uint32_t(-1 - register_); }

template <typename T>
void hide(Accumulators& state, T (&d)[128]) {
    if (state.registers && state.registers != d) fail("wgmma: emulated for one set of accumulators at a time");
    uint32_t bits[128];
    std::memcpy(bits, d, sizeof(bits));
    for (int i = 0; i < 128; ++i) {
        if (state.registers && bits[i] != rubbish(i)) fail("wgmma: accumulators were written while it was in flight");
        if (!state.registers) state.sums[i] = bits[i];
        bits[i] = rubbish(i);
    }
    std::memcpy(d, bits, sizeof(bits));
    state.registers = d;
}

template <typename T>
void give_back(Accumulators& state, T (&d)[128]) {
    hide(state, d);
    std::memcpy(d, state.sums, sizeof(d));
    state.registers = nullptr;
    state.fenced = false;
}

// Register i of the current thread is this row and column of the product.
inline int row_of(int i) { return int(16 * (current->index / 32 % 4) + current->index % 32 / 4 + i / 2 % 2 * 8); }
inline int column_of(int i) { return int(i / 4 * 8 + current->index % 4 * 2 + i % 2); }

inline void multiply(Accumulators& state, const Operands& operands, int) {
    for (int i = 0; i < 128; ++i) {
        const int8_t *const a = operands.a[row_of(i)], *const b = operands.b[column_of(i)];
        int sum = 0;
        for (int k = 0; k < 32; ++k) sum += int(a[k]) * b[k];
        const int64_t total = int64_t(int32_t(state.sums[i])) + sum;
        if (total != int32_t(total)) fail("int32 accumulator overflow");
        state.sums[i] = uint32_t(total);
    }
}
inline void multiply(Accumulators& state, const Operands& operands, float) {
    for (int i = 0; i < 128; ++i) {
        const float *const a = operands.half_a[row_of(i)], *const b = operands.half_b[column_of(i)];
        float sum = __uint_as_float(state.sums[i]);
        for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
        state.sums[i] = __float_as_uint(sum);
    }
}

template <int kCount>
void convert(const int8_t (&bytes)[kCount][32], float (&rows)[kCount][16], float (*to_float)(uint16_t)) {
    for (int r = 0; r < kCount; ++r)
        for (int k = 0; k < 16; ++k) {
            uint16_t bits;
            std::memcpy(&bits, &bytes[r][2 * k], 2);
            rows[r][k] = to_float(bits);
        }
}

}  // namespace emulation

namespace slicegpt::ptx {

using emulation::shared_address;

inline void mbarrier_init(uint64_t* barrier, int count) {
    if (shared_address(barrier) % 8) emulation::fail("an mbarrier needs 8-byte alignment");
    if (count < 1) emulation::fail("an mbarrier needs a count");
    emulation::Mbarrier fresh;
    fresh.count = fresh.pending = count;
    fresh.creator = emulation::current;
    if (!emulation::hopper().barriers.emplace(barrier, fresh).second) emulation::fail("an mbarrier initialised twice");
}
inline void mbarrier_arrive(uint64_t* barrier) { emulation::arrive(emulation::mbarrier(barrier)); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    emulation::Mbarrier& state = emulation::mbarrier(barrier);
    state.bytes += bytes;
    emulation::arrive(state);
}
inline bool mbarrier_try_wait(uint64_t* barrier, int parity) {
    emulation::Mbarrier& state = emulation::mbarrier(barrier);
    if (parity != 0 && parity != 1) emulation::fail("a phase's parity is 0 or 1");
    if (int(state.phase % 2) != parity) {
        emulation::progressed = true;
        return true;
    }
    if (!state.late.empty()) {
        const emulation::Copy copy = state.late.front();
        state.late.erase(state.late.begin());
        emulation::land(state, copy);
    }
    emulation::yield();
    return false;
}

// To the same place in every block of the mask; the barrier at the same place there counts the bytes.
inline void start_copies(void* shared, emulation::Copy copy, uint64_t* barrier, unsigned mask) {
    emulation::shared_pointer(shared_address(shared), copy.bytes);
    for (int rank = 0; rank < 32; ++rank) {
        if (!(mask >> rank & 1)) continue;
        emulation::Mbarrier& state = emulation::mbarrier_at(barrier, rank);
        if (!state.fenced) emulation::fail("the asynchronous proxy does not see this mbarrier: fence.proxy.async");
        copy.target = emulation::shared_of(rank, shared);
        if (emulation::hopper().copies++ % 2)
            state.late.push_back(copy);
        else
            emulation::land(state, copy);
    }
}
inline void copy_bulk_multicast(void* shared, const void* global, int bytes, uint64_t* barrier, unsigned mask) {
    if (shared_address(shared) % 16 || uintptr_t(global) % 16 || bytes % 16 || bytes <= 0)
        emulation::fail("cp.async.bulk needs multiples of 16 bytes");
    start_copies(shared, {nullptr, global, bytes}, barrier, mask);
}
inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
    copy_bulk_multicast(shared, global, bytes, barrier, 1u << emulation::current->rank);
}

inline int make_tensor_map(TensorMap* map, const void* base, int64_t rows, int64_t columns, int64_t stride) {
    // What the driver refuses.
    if (uintptr_t(base) % 16 || stride % 8 || rows < 1 || columns < 1 || stride < columns) return 1;
    *map = {static_cast<const unsigned char*>(base), rows, columns, stride};
    return 0;
}
// The box as it will lie in shared memory: rows of 128 bytes, their 16-byte chunks turned by the row within 8.
inline void copy_tile_multicast(void* shared, const TensorMap& map, int row, int column, uint64_t* barrier,
                                unsigned mask) {
    if (shared_address(shared) % 1024) emulation::fail("a tile with the 128-byte swizzle starts at multiples of 1024");
    if (row < 0 || column < 0) emulation::fail("a tile before the matrix");
    const auto image = std::make_shared<std::vector<unsigned char>>(kTileBoxRows * kTileBoxColumns * 2);
    for (int r = 0; r < kTileBoxRows; ++r)
        for (int k = 0; k < kTileBoxColumns; ++k)
            if (row + r < map.rows && column + k < map.columns)
                std::memcpy(&(*image)[r * 128 + (2 * k ^ r % 8 * 16)],
                            map.base + 2 * ((row + r) * map.stride + column + k), 2);
    start_copies(shared, {nullptr, image->data(), int(image->size()), image}, barrier, mask);
}
inline void copy_tile(void* shared, const TensorMap& map, int row, int column, uint64_t* barrier) {
    copy_tile_multicast(shared, map, row, column, barrier, 1u << emulation::current->rank);
}

inline void mbarrier_arrive_at(uint64_t* barrier, int rank) {
    emulation::arrive(emulation::mbarrier_at(barrier, rank));
}
inline int cluster_rank() { return int(emulation::current->rank); }
inline void cluster_sync() { emulation::wait(emulation::cluster_barrier); }

inline void fence_proxy_async() {
    for (auto& [address, barrier] : emulation::hopper().barriers)
        if (barrier.creator == emulation::current) barrier.fenced = true;
}

inline void fence_mbarrier_init() {
    for (auto& [address, barrier] : emulation::hopper().barriers)
        if (barrier.creator == emulation::current) barrier.published = true;
}

inline emulation::Accumulators& accumulators() {
    return emulation::hopper().accumulators[emulation::current];
}

template <typename T>
void wgmma_fence(T (&)[128]) {
    accumulators().fenced = true;
}

// to_float: of 16-bit operands, or null.
template <typename T>
void wgmma(T (&d)[128], uint64_t a, uint64_t b, float (*to_float)(uint16_t)) {
    using namespace emulation;
    Accumulators& state = accumulators();
    if (!state.fenced) fail("wgmma without wgmma.fence after its accumulators were used");
    const unsigned group = current->index / 128;
    if (block.x < 128 * (group + 1)) fail("wgmma needs a warpgroup of 128 threads");
    Warpgroup& warpgroup = hopper().warpgroups[current->warp - current->index / 32 % 4];
    wait(warpgroup.barrier);
    // The first thread to come through reads for all.
    Product& product = warpgroup.products[state.issued % 2];
    if (warpgroup.readers[state.issued % 2]++ % 128 == 0) {
        product = std::make_shared<Operands>();
        product->a_descriptor = a, product->b_descriptor = b;
        read_operands(*product);
        if (to_float) convert(product->a, product->half_a, to_float), convert(product->b, product->half_b, to_float);
    }
    ++state.issued;
    if (product->a_descriptor != a || product->b_descriptor != b) fail("wgmma: descriptors differ in a warpgroup");
    hide(state, d);
    state.open.push_back(product);
}
inline void wgmma_m64n256k32_s8(int (&d)[128], uint64_t a, uint64_t b) { wgmma(d, a, b, nullptr); }
inline void wgmma_m64n256k16_f16(float (&d)[128], uint64_t a, uint64_t b) { wgmma(d, a, b, half_to_float); }
inline void wgmma_m64n256k16_bf16(float (&d)[128], uint64_t a, uint64_t b) { wgmma(d, a, b, bfloat_to_float); }

inline void wgmma_commit() {
    accumulators().groups.push_back(std::move(accumulators().open));
    accumulators().open.clear();
}

template <int kPending, typename T>
void wgmma_wait(T (&d)[128]) {
    using namespace emulation;
    Accumulators& state = accumulators();
    while (state.groups.size() > kPending) {
        for (const Product& product : state.groups.front()) {
            if (current->index % 32 == 0) check_unchanged(*product);
            multiply(state, *product, T{});
        }
        state.groups.erase(state.groups.begin());
    }
    if (state.registers && state.groups.empty() && state.open.empty()) give_back(state, d);
}

}  // namespace slicegpt::ptx
