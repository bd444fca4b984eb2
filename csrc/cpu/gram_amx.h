// "fast" products of bfloat16 without weights in matrix tiles, for `gram_` and `cross_gram_`. Included into an unnamed
// namespace after tiles.h.
//
// A pair of neighbouring tokens is a 32-bit item. The right operand of a tile's product has 16 pairs of tokens by 16
// columns, the left one 16 columns by 16 pairs, its transpose; a panel holds both, since it is the left one of some
// products and the right one of others. [panel of 32 columns][chunk of 32 tokens][right, right, left, left].
#pragma once

constexpr int kPanel = 2 * kTile;
constexpr int kChunkFloats = 4 * kTileFloats;
static_assert(kPackedTokens == kTileItems, "a chunk is packed as a whole");

void pack_chunk(const Packing& of) {
    const auto* data = static_cast<const BFloat16*>(of.from.data);
    for (int64_t first = 0; first < of.from.count; first += kPanel) {
        const int64_t width = least(kPanel, of.from.count - first);
        const auto mask = static_cast<__mmask32>((uint64_t{1} << width) - 1);
        const auto row = [&](int64_t t) {
            if (t >= of.count) return _mm512_setzero_si512();
            const BFloat16* p = data + (of.rows ? of.rows[of.first + t] : of.first + t) * of.from.row_stride +
                                first * of.from.column_stride;
            if (of.from.column_stride == 1) return _mm512_maskz_loadu_epi16(mask, p);
            alignas(64) BFloat16 room[kPanel] = {};
            for (int64_t c = 0; c < width; ++c) room[c] = p[c * of.from.column_stride];
            return _mm512_load_si512(room);
        };
        __m512i pairs[2][kTile];
        for (int64_t t = 0; t < kTileItems; t += 2) {
            const __m512i rows[2] = {row(t), row(t + 1)};
            for (int half = 0; half < 2; ++half) {
                const auto wide = [&](__m512i x) {
                    return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x));
                };
                pairs[half][t / 2] = _mm512_or_si512(wide(rows[0]), _mm512_slli_epi32(wide(rows[1]), 16));
            }
        }
        const int64_t at = first / kPanel * (of.run / kTileItems) + of.at / kTileItems;
        float* out = static_cast<float*>(of.plain ? of.plain : of.weighted) + at * kChunkFloats;
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < kTile; ++i) _mm512_store_si512(out + half * kTileFloats + i * kTile, pairs[half][i]);
        for (int half = 0; half < 2; ++half) {
            transpose(pairs[half]);
            for (int i = 0; i < kTile; ++i)
                _mm512_store_si512(out + (2 + half) * kTileFloats + i * kTile, pairs[half][i]);
        }
    }
}

void multiply_panels(const Tiles& of) {
    const TileSession session;
    const auto strip = [](const float* tile) {
        return Strip{reinterpret_cast<const char*>(tile), 64, kChunkFloats * sizeof(float), nullptr};
    };
    const int64_t chunks = divided_up(of.tokens, kTileItems), panel_floats = of.run / kTileItems * kChunkFloats;
    const int64_t column = of.panel * kPanel, width = least(kPanel, of.D - column);
    const float* right = static_cast<const float*>(of.right) + of.panel * panel_floats;
    alignas(64) float sums[4][kTileFloats];
    for (int64_t panel = of.first_left; panel < of.last_left; ++panel) {
        const int64_t first = panel * kPanel, height = least(kPanel, of.K - first);
        if (of.triangle && panel > of.panel) return;
        const float* left = static_cast<const float*>(of.left) + panel * panel_floats + 2 * kTileFloats;
        const Strip strips[2] = {strip(left), strip(left + kTileFloats)};
        multiply_tiles<2, 2>(strips, chunks, reinterpret_cast<const char*>(right), kChunkFloats * sizeof(float),
                             kTileFloats * sizeof(float), sums[0], 2 * kTileFloats, true);
        for (int64_t r = 0; r < height; ++r)
            for (int64_t half = 0; half < 2; ++half) {
                const float* row = sums[r / kTile * 2 + half] + r % kTile * kTile;
                double* target = of.C + (first + r) * of.D + column + half * kTile;
                if (width >= (half + 1) * kTile)
                    add_to(target, Vec::load(row));
                else
                    for (int64_t i = 0; i < width - half * kTile; ++i) target[i] += row[i];
            }
    }
}

constexpr GramKernels kTileGram{kPanel, sizeof(float), pack_chunk, multiply_panels};
