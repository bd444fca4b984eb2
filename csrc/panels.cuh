// Two column panels of X, stage by stage, from device to shared memory: what the float64 and the
// half-precision Gram kernels have in common.
#pragma once

#include "mma.cuh"
#include "triangle.cuh"

namespace slicegpt {

constexpr int kPanelColumns = 128;
constexpr int kPanelThreads = 256;

struct PanelSource {
    const void* X;
    int64_t stride;  // of a row, in items
    int64_t columns;
    bool vectors;  // 16-byte loads are aligned
};

inline PanelSource panel_source(const void* X, int64_t stride, int64_t columns, int item_bytes) {
    return {X, stride, columns, reinterpret_cast<uintptr_t>(X) % 16 == 0 && stride * item_bytes % 16 == 0};
}

// A thread's share of a stage: 16 bytes (one chunk of columns) of two tokens, in one or two panels (one for a
// tile on the diagonal). What does not change from stage to stage is computed once, for the instructions of a
// load are issued between those of the tensor cores.
template <typename T, int kPitch>
struct PanelLoader {
    static constexpr int kItems = 16 / int(sizeof(T));
    static constexpr int kChunks = kPanelColumns / kItems;
    static constexpr int kPassTokens = kPanelThreads / kChunks;
    static constexpr int kTokens = 2 * kPassTokens;  // a stage: 8 (float64), 16 (float32) or 32 tokens
    static constexpr int kPanelBytes = kTokens * kPitch;

    const PanelSource source;
    const int64_t end;
    const int panels;
    const int token = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    int64_t columns[2];
    int items[2];

    __device__ __forceinline__ PanelLoader(const PanelSource& source, int64_t end, TilePosition tile)
        : source(source), end(end), panels(tile.row == tile.column ? 1 : 2) {
        columns[0] = int64_t(tile.row) * kPanelColumns + chunk * kItems;
        columns[1] = int64_t(tile.column) * kPanelColumns + chunk * kItems;
#pragma unroll
        for (int i = 0; i < 2; ++i) items[i] = int(min(max(source.columns - columns[i], int64_t(0)), int64_t(kItems)));
    }

    // Copies tokens first ... into the stage. row_of gives the row of a token, or -1 for an absent one; what
    // is absent or outside of X becomes zeros.
    template <typename RowOf>
    __device__ __forceinline__ void load(unsigned char* stage, int64_t first, RowOf row_of) const {
        unsigned char* const target = stage + token * kPitch + chunk * 16;
#pragma unroll
        for (int pass = 0; pass < 2; ++pass) {
            const int64_t k = first + token + pass * kPassTokens;
            const int64_t row = k < end ? row_of(k) : -1;
            const T* const items_of_row = static_cast<const T*>(source.X) + (row >= 0 ? row * source.stride : 0);
            copy(target + pass * kPassTokens * kPitch, items_of_row, 0, row >= 0);
            if (panels == 2) copy(target + pass * kPassTokens * kPitch + kPanelBytes, items_of_row, 1, row >= 0);
        }
    }

  private:
    __device__ __forceinline__ void copy(unsigned char* target, const T* row, int panel, bool present) const {
        const int count = present ? items[panel] : 0;
        const T* const first = row + (count ? columns[panel] : 0);
        if (source.vectors) {
            copy_16(target, first, count * int(sizeof(T)));
        } else {
#pragma unroll
            for (int e = 0; e < kItems; ++e) reinterpret_cast<T*>(target)[e] = e < count ? first[e] : T{0};
        }
    }
};

// The share of the tokens that split `split` of `splits` sums, in whole stages.
struct TokenRange {
    int64_t begin, end;
    int stages;
    __device__ __forceinline__ TokenRange(int64_t tokens, int split, int splits, int stage_tokens) {
        const int64_t share = (tokens + splits - 1) / splits;
        const int64_t whole = (share + stage_tokens - 1) / stage_tokens * stage_tokens;
        begin = min(whole * split, tokens);
        end = min(begin + whole, tokens);
        stages = int((end - begin + stage_tokens - 1) / stage_tokens);
    }
};

}  // namespace slicegpt
