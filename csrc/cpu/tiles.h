// Products of bfloat16 in AMX's matrix tiles, summed in float32. Included into an unnamed namespace after
// simd_avx512.h and kernels.h.
//
// A tile is 16 rows of 64 bytes. Weights are the left operand, which is read as it is stored: 16 rows of 32 items. The
// tokens are the right one, whose rows are pairs of items, 16 tokens side by side, so they are transposed once, while
// they are packed. Sums come out as 16 rows of weights by 16 tokens, and are transposed back for the epilogue.
#pragma once

constexpr int kTile = 16;         // rows of a tile; its 16 sums a row, or pairs of a right operand's row
constexpr int kTileItems = 32;    // bfloat16 a row
constexpr int kTileFloats = 256;  // 1024 bytes
// Chunks of 32 items that are multiplied before sums are put aside: 2048 items of 256 tokens are half of the
// second-level cache of a Sapphire Rapids core (2 MiB), where they wait for the next rows of weights.
constexpr int64_t kChunksAtOnce = 64;
constexpr int64_t kTokensAtOnce = 256;

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void transpose(__m512i (&rows)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    // Now row 4 i + j holds, in each quarter q, column 4 q + j of rows 4 i to 4 i + 3.
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0xdd);
        t[j] = _mm512_shuffle_i32x4(low, high, 0x88);
        t[j + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
        t[j + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        t[j + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
    for (int i = 0; i < 16; ++i) rows[i] = t[i];
}

// All eight tiles are whole ones while it lives. The shapes are in static memory since compilers take LDTILECFG to read
// the first eight bytes only, and leave out what is stored to the others.
struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
static_assert(sizeof(TileShapes) == 64, "as LDTILECFG reads it");
alignas(64) const TileShapes kTileShapes;

struct TileSession {
    TileSession() { _tile_loadconfig(&kTileShapes); }
    ~TileSession() { _tile_release(); }
};

// Sixteen rows of weights, or what there is of them.
struct Strip {
    const char* data;
    int64_t row_bytes, chunk_bytes;
    const char* last;  // the last chunk, padded with zeros, where it is not a whole one
};

// `rows` x `items` bfloat16 to a tile, padded with zeros.
inline void copy_tile(const BFloat16* w, int64_t w_stride, int64_t rows, int64_t items, char* out) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << items) - 1);
    for (int64_t r = 0; r < kTile; ++r)
        _mm512_store_si512(out + r * 64,
                           r < rows ? _mm512_maskz_loadu_epi16(mask, w + r * w_stride) : _mm512_setzero_si512());
}

// The sums of STRIPS strips by GROUPS groups of tokens, each a tile of `sums`: zero at first, or what is there. From
// chunk to chunk x goes on by `chunk_bytes`, from group to group by `group_bytes`.
template <int STRIPS, int GROUPS>
inline void multiply_tiles(const Strip* strips, int64_t chunks, const char* x, int64_t chunk_bytes, int64_t group_bytes,
                           float* sums, int64_t strip_floats, bool first) {
    constexpr bool kTwoStrips = STRIPS == 2, kTwoGroups = GROUPS == 2;
    float* other = sums + strip_floats;
    if (first) {
        _tile_zero(0);
        if (kTwoGroups) _tile_zero(1);
        if (kTwoStrips) _tile_zero(2);
        if (kTwoStrips && kTwoGroups) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        if (kTwoGroups) _tile_loadd(1, sums + kTileFloats, 64);
        if (kTwoStrips) _tile_loadd(2, other, 64);
        if (kTwoStrips && kTwoGroups) _tile_loadd(3, other + kTileFloats, 64);
    }
    const auto step = [&](const char* w0, int64_t bytes0, const char* w1, int64_t bytes1) {
        _tile_loadd(4, w0, bytes0);
        _tile_loadd(6, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (kTwoGroups) {
            _tile_loadd(7, x + group_bytes, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (kTwoStrips) {
            _tile_loadd(5, w1, bytes1);
            _tile_dpbf16ps(2, 5, 6);
            if (kTwoGroups) _tile_dpbf16ps(3, 5, 7);
        }
        x += chunk_bytes;
    };
    const Strip &one = strips[0], &two = strips[STRIPS - 1];
    const int64_t whole = chunks - (one.last != nullptr);
    for (int64_t k = 0; k < whole; ++k)
        step(one.data + k * one.chunk_bytes, one.row_bytes, two.data + k * two.chunk_bytes, two.row_bytes);
    if (one.last) step(one.last, 64, two.last, 64);
    _tile_stored(0, sums, 64);
    if (kTwoGroups) _tile_stored(1, sums + kTileFloats, 64);
    if (kTwoStrips) _tile_stored(2, other, 64);
    if (kTwoStrips && kTwoGroups) _tile_stored(3, other + kTileFloats, 64);
}

// See RowProduct.
struct TileProduct {
    using Stored = BFloat16;
    using Session = TileSession;
    static constexpr bool kQuantized = false;
    static constexpr int64_t kColumns = 256;

    // Threads share out tokens as well, where each gets a hundred: packing them costs as much as a few rows of weights.
    static Part part(int64_t tokens, int thread, int threads) {
        int parts = 1;
        for (int p = 2; p <= threads; ++p)
            if (threads % p == 0 && tokens / p >= 96) parts = p;
        return {share(tokens, 2 * kTile, thread % parts, parts), thread / parts, threads / parts};
    }
    static int64_t tokens_at_once(int64_t tokens, int64_t) { return least(tokens, kTokensAtOnce); }
    // Where sums are put aside there are to be many of them, since each time all tokens come in again.
    static int64_t columns_at_once(int64_t K) { return K > kChunksAtOnce * kTileItems ? kColumns : kBlock; }
    static int64_t packed_floats(int64_t tokens, int64_t K) {
        return divided_up(tokens, kTile) * divided_up(K, kTileItems) * kTileFloats;
    }
    static int64_t sums_floats(int64_t tokens, int64_t block) {
        return divided_up(tokens, kTile) * (block / kTile) * kTileFloats;
    }
    static int64_t rows_floats(int64_t block) { return kTile * block; }
    // One copied strip; two padded chunks.
    static int64_t room_floats() { return (kChunksAtOnce + 2) * kTileFloats; }

    // [group of tokens][chunk][pair of items][token]
    static void pack_tokens(const BFloat16* x, int64_t stride, int64_t tokens, int64_t K, float* out) {
        for (int64_t t = 0; t < tokens; t += kTile)
            for (int64_t k = 0; k < K; k += kTileItems, out += kTileFloats) {
                const auto mask = static_cast<__mmask32>((uint64_t{1} << least(kTileItems, K - k)) - 1);
                __m512i rows[kTile];
                for (int64_t i = 0; i < kTile; ++i)
                    rows[i] = t + i < tokens ? _mm512_maskz_loadu_epi16(mask, x + (t + i) * stride + k)
                                             : _mm512_setzero_si512();
                transpose(rows);
                for (int i = 0; i < kTile; ++i) _mm512_store_si512(out + i * kTile, rows[i]);
            }
    }

    static void multiply(const BFloat16* w, int64_t w_stride, int64_t rows, int64_t K, const float* x, int64_t tokens,
                         float* sums, int64_t, bool add, float* room) {
        const int64_t chunks = divided_up(K, kTileItems), groups = divided_up(tokens, kTile);
        const int64_t strip_floats = groups * kTileFloats, group_bytes = chunks * 1024;
        char* copied = reinterpret_cast<char*>(room);
        char* padded = copied + kChunksAtOnce * 1024;
        for (int64_t begin = 0; begin < chunks; begin += kChunksAtOnce) {
            const int64_t count = least(kChunksAtOnce, chunks - begin);
            for (int64_t r = 0; r < rows; r += 2 * kTile) {
                Strip strips[2];
                const int here = rows - r > kTile ? 2 : 1;
                for (int s = 0; s < here; ++s)
                    strips[s] = strip(w + (r + s * kTile) * w_stride + begin * kTileItems, w_stride,
                                      rows - r - s * kTile, K - begin * kTileItems, count, copied, padded + s * 1024);
                float* target = sums + r / kTile * strip_floats;
                for (int64_t g = 0; g < groups; g += 2) {
                    const char* tile = reinterpret_cast<const char*>(x) + g * group_bytes + begin * 1024;
                    float* to = target + g * kTileFloats;
                    const auto run = here == 2 ? (g + 1 < groups ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                               : (g + 1 < groups ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
                    run(strips, count, tile, 1024, group_bytes, to, strip_floats, !add && begin == 0);
                }
            }
        }
    }

    static int64_t group(int64_t) { return kTile; }
    static const float* rows(const float* sums, int64_t columns, int64_t tokens, int64_t t, int64_t block, float* out) {
        const float* tile = sums + t / kTile * kTileFloats;
        for (int64_t c = 0; c < columns; c += kTile, tile += divided_up(tokens, kTile) * kTileFloats) {
            __m512i rows[kTile];
            for (int i = 0; i < kTile; ++i) rows[i] = _mm512_load_si512(tile + i * kTile);
            transpose(rows);
            for (int i = 0; i < kTile; ++i) _mm512_store_si512(out + i * block + c, rows[i]);
        }
        return out;
    }

  private:
    // `rows` and `items`: how many there are from here on. Rows that are missing are zeros in a copy.
    static Strip strip(const BFloat16* w, int64_t w_stride, int64_t rows, int64_t items, int64_t chunks, char* copied,
                       char* padded) {
        if (rows < kTile) {
            for (int64_t k = 0; k < chunks; ++k)
                copy_tile(w + k * kTileItems, w_stride, rows, least(kTileItems, items - k * kTileItems),
                          copied + k * 1024);
            return {copied, 64, 1024, items < chunks * kTileItems ? copied + (chunks - 1) * 1024 : nullptr};
        }
        const bool whole = items >= chunks * kTileItems;
        if (!whole)
            copy_tile(w + (chunks - 1) * kTileItems, w_stride, kTile, items - (chunks - 1) * kTileItems, padded);
        return {reinterpret_cast<const char*>(w), w_stride * 2, 64, whole ? nullptr : padded};
    }
};
