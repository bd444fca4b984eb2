// Packing and multiplying for `gram_` and `cross_gram_`, over a vector V of doubles or floats. Included into an unnamed
// namespace after a simd_*.h.
#pragma once

inline double to_float(double x) { return x; }

// Not defined: for `Item`.
inline double item_of(const Doubles&);
inline float item_of(const Vec&);
template <typename V>
using Item = decltype(item_of(V{}));

// What products of V are summed in, and how many tokens of a column one of its items holds: see avx512_bf16.cpp.
template <typename V>
struct SumsOf {
    using type = V;
};
template <typename V>
constexpr int kItemTokens = 1;

// A tile of C is kTileRows rows by the columns of a panel, kVectors vectors: its sums, a row of the right panel and one
// item of the left one fill the registers (24 + 3 + 1 of 32, 12 + 3 + 1 of 16). A step of a tile is then as many
// multiplications as loads or more, and takes all operands but one from the first-level cache or next to it.
constexpr int kVectors = 3;
constexpr int kTileRows = Vec::kRegisters == 32 ? 8 : 4;
template <typename V>
constexpr int kPanelColumns = kVectors * V::kLanes;

template <typename V, typename D>
inline void pack_columns(const Packing& of) {
    constexpr int kColumns = kPanelColumns<V>, kLanes = V::kLanes;
    const D* data = static_cast<const D*>(of.from.data);
    const int64_t row_stride = of.from.row_stride, column_stride = of.from.column_stride;
    const auto row = [&](int64_t t) { return of.rows ? of.rows[of.first + t] : of.first + t; };
    for (int64_t first = 0; first < of.from.count; first += kColumns) {
        const int64_t width = least(kColumns, of.from.count - first);
        const int64_t offset = first * of.run + of.at * kColumns;
        Item<V>* plain = of.plain ? static_cast<Item<V>*>(of.plain) + offset : nullptr;
        Item<V>* weighted = of.weighted ? static_cast<Item<V>*>(of.weighted) + offset : nullptr;
        // The edge, and columns that are apart: each column's tokens share a cache line where X is a transposed matrix.
        const bool apart = column_stride != 1 || width < kColumns;
        Item<V> room[kPackedTokens][kColumns];
        if (apart) {
            if (width < kColumns) std::memset(room, 0, sizeof room);
            for (int64_t i = 0; i < width; ++i)
                for (int64_t t = 0; t < of.count; ++t)
                    room[t][i] =
                        static_cast<Item<V>>(to_float(data[row(t) * row_stride + (first + i) * column_stride]));
        }
        for (int64_t t = 0; t < of.count; ++t) {
            V values[kVectors];
            if (apart) {
                for (int v = 0; v < kVectors; ++v) values[v] = V::load(room[t] + v * kLanes);
            } else {
                const D* source = data + row(t) * row_stride + first;
                for (int v = 0; v < kVectors; ++v) read(source + v * kLanes, values[v]);
            }
            if (plain)
                for (int v = 0; v < kVectors; ++v) values[v].store(plain + t * kColumns + v * kLanes);
            if (!weighted) continue;
            const V weight = V::all(of.weight ? static_cast<Item<V>>(of.weight[of.first + t]) : 1);
            for (int v = 0; v < kVectors; ++v)
                V::product(values[v], weight).store(weighted + t * kColumns + v * kLanes);
        }
    }
}

template <typename V>
void pack_of(const Packing& of) {
    switch (of.dtype) {
        case Dtype::kFloat16:
            return pack_columns<V, Float16>(of);
        case Dtype::kBfloat16:
            return pack_columns<V, BFloat16>(of);
        case Dtype::kFloat32:
            return pack_columns<V, float>(of);
        case Dtype::kFloat64:
            // Never multiplied in float32.
            if constexpr (sizeof(Item<V>) == sizeof(double)) pack_columns<V, double>(of);
    }
}

// C[:rows, :columns] += the product of `items` items of kTileRows columns at `left` and of the panel at `right`.
template <typename V, int VECTORS>
inline void multiply_tile(const Item<V>* left, const Item<V>* right, int64_t items, double* C, int64_t stride,
                          int64_t rows, int64_t columns) {
    constexpr int kColumns = kPanelColumns<V>, kLanes = V::kLanes, kDoublesPerLine = 8;
#ifdef SLICEGPT_PREFETCH
    // Between two runs C has left the caches near by; the product takes long enough to bring the tile back.
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < columns; i += kDoublesPerLine) __builtin_prefetch(C + r * stride + i, 1);
#endif
    using Sums = typename SumsOf<V>::type;
    Sums sums[kTileRows][VECTORS];
    for (auto& of_row : sums)
        for (Sums& sum : of_row) sum = Sums::zero();
    for (int64_t k = 0; k < items; ++k, left += kColumns, right += kColumns) {
        V values[VECTORS];
        for (int v = 0; v < VECTORS; ++v) values[v] = V::load(right + v * kLanes);
        for (int r = 0; r < kTileRows; ++r) {
            const V x = V::all(left[r]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = V::fma(x, values[v], sums[r][v]);
        }
    }
    if (rows == kTileRows && columns == VECTORS * kLanes) {
        for (int r = 0; r < kTileRows; ++r)
            for (int v = 0; v < VECTORS; ++v) add_to(C + r * stride + v * kLanes, sums[r][v]);
        return;
    }
    double room[kTileRows][VECTORS * kLanes] = {};
    for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < VECTORS; ++v) add_to(room[r] + v * kLanes, sums[r][v]);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < columns; ++i) C[r * stride + i] += room[r][i];
}

template <typename V>
void multiply_of(const Tiles& of) {
    constexpr int kColumns = kPanelColumns<V>, kLanes = V::kLanes;
    const int64_t items = (of.tokens + kItemTokens<V> - 1) / kItemTokens<V>;
    const int64_t size = of.run / kItemTokens<V> * kColumns, column = of.panel * kColumns;
    const int64_t width = least(kColumns, of.D - column);
    const auto* right = static_cast<const Item<V>*>(of.right) + of.panel * size;
    // Of a triangle the rows down to the panel's last diagonal element.
    const int64_t rows = of.triangle ? column + width : of.K;
    for (int64_t panel = of.first_left; panel < of.last_left; ++panel)
        for (int64_t at = 0; at < kColumns; at += kTileRows) {
            const int64_t row = panel * kColumns + at;
            if (row >= rows) return;
            const auto* left = static_cast<const Item<V>*>(of.left) + panel * size + at;
            double* C = of.C + row * of.D + column;
            const int64_t height = least(kTileRows, of.K - row);
            if (width > 2 * kLanes)
                multiply_tile<V, 3>(left, right, items, C, of.D, height, width);
            else if (width > kLanes)
                multiply_tile<V, 2>(left, right, items, C, of.D, height, width);
            else
                multiply_tile<V, 1>(left, right, items, C, of.D, height, width);
        }
}

template <typename V>
constexpr GramKernels gram_kernels() {
    return {kPanelColumns<V>, static_cast<int>(sizeof(Item<V>)), pack_of<V>, multiply_of<V>};
}
