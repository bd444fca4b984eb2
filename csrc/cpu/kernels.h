// norm_linear and rotate_add over a way P of multiplying rows (`RowProduct`; tiles.h has another), and the sums of
// squares. Included into an unnamed namespace after product.h and activation.h.
#pragma once

// Columns of an output that are finished together: their products stay in the first-level cache for the epilogue.
constexpr int kBlock = 64;
// Rows that are packed at a time where there are many: their memory is then bounded.
constexpr int64_t kRowsAtOnce = 256;

// The tokens that a thread works on, and its number among those that share them.
struct Part {
    Range tokens;
    int thread, threads;
};

#include "quantized.h"

// Few tokens, every one packed on its own: the weights are what takes the time, so threads share nothing but columns.
template <typename V>
struct RowProduct {
    using Stored = typename V::Stored;
    using Item = typename V::Item;
    static_assert(sizeof(Item) == sizeof(float), "packed rows lie in scratch memory, which is counted in floats");
    struct Session {};  // what the processor is set to meanwhile
    static constexpr bool kQuantized = false;

    static Part part(int64_t tokens, int thread, int threads) { return {{0, tokens}, thread, threads}; }
    static int64_t tokens_at_once(int64_t tokens, int64_t) { return least(tokens, kRowsAtOnce); }
    static int64_t columns_at_once(int64_t) { return kBlock; }
    static int64_t packed_floats(int64_t tokens, int64_t K) { return tokens * packed_size<V>(K); }
    static int64_t sums_floats(int64_t tokens, int64_t block) { return tokens * block; }
    static int64_t rows_floats(int64_t) { return 0; }
    static int64_t room_floats() { return 0; }

    static void pack_tokens(const Stored* x, int64_t stride, int64_t tokens, int64_t K, float* out) {
        const int64_t packed = packed_size<V>(K);
        for (int64_t t = 0; t < tokens; ++t) pack<V>(x + t * stride, K, reinterpret_cast<Item*>(out + t * packed));
    }
    // sums = x Wᵀ, or added to what is there.
    static void multiply(const Stored* w, int64_t w_stride, int64_t rows, int64_t K, const float* x, int64_t tokens,
                         float* sums, int64_t block, bool add, float*) {
        product<V>(w, w_stride, rows, K, reinterpret_cast<const Item*>(x), tokens, sums, block, add);
    }
    // The sums of tokens from t on, `group` of them, [token][block].
    static int64_t group(int64_t tokens) { return tokens; }
    static const float* rows(const float* sums, int64_t, int64_t, int64_t t, int64_t block, float*) {
        return sums + t * block;
    }
};

inline int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

template <typename D>
inline float norm_scale(const NormLinear& op, int64_t token) {
    double total = 0;
    if (op.sumsq)
        for (int64_t p = 0; p < op.parts; ++p) total += op.sumsq[token * op.parts + p];
    else
        total = sum_of_squares(static_cast<const D*>(op.h) + token * op.h_stride, op.d);
    return static_cast<float>(1 / ::sqrt(total / op.divisor + op.eps));
}

// out = the activation of products * scale + bias, for `count` columns from the n-th on, times the others where they
// are gated. `products` and `others` give up to kLanes of them: (how many columns further on, how many remain).
template <typename D, typename Activate, typename Products, typename Others>
inline void finish_row(const NormLinear& op, Activate activate, D* out, int64_t n, int64_t count, float scale,
                       Products products, Others others) {
    const auto* bias = static_cast<const D*>(op.bias);
    const Vec by = Vec::all(scale);
    const auto shifted = [&](Vec product, int64_t column, int64_t remaining) {
        return Vec::fma(product, by, bias ? read_some(bias + column, remaining) : Vec::zero());
    };
    write_row(out, count, [&](int64_t i, int64_t remaining) {
        const Vec value = activate(shifted(products(i, remaining), n + i, remaining));
        if (!op.gated) return value;
        return Vec::product(value, shifted(others(i, remaining), op.n_scaled / 2 + n + i, remaining));
    });
}

// P multiplies the scaled rows of weights, R the others: the same, but where P's are quantized.
template <typename P, typename R>
void norm_linear_rows(const NormLinear& op, int thread, int threads) {
    using D = typename P::Stored;
    const auto* h = static_cast<const D*>(op.h);
    const auto* weight = static_cast<const D*>(op.weight);
    auto* y = static_cast<D*>(op.y);
    const int64_t tokens = op.tokens, group = P::group(tokens), block = P::columns_at_once(op.d);
    const bool packed_twice = P::kQuantized && op.N > op.n_scaled;
    const int64_t packed = whole_lines(P::packed_floats(tokens, op.d)), sums = P::sums_floats(tokens, block);
    const int64_t packed_again = packed_twice ? whole_lines(R::packed_floats(tokens, op.d)) : 0;
    const int64_t rows = P::rows_floats(block);
    float* x = scratch(packed + packed_again + 2 * (sums + rows) + P::room_floats() + tokens);
    float* x_plain = packed_twice ? x + packed : x;
    float* first = x + packed + packed_again;
    float* second = first + sums;
    float* first_rows = second + sums;
    float* second_rows = first_rows + rows;
    float* room = second_rows + rows;
    float* scales = room + P::room_floats();
    P::pack_tokens(h, op.h_stride, tokens, op.d, x);
    if (packed_twice) R::pack_tokens(h, op.h_stride, tokens, op.d, x_plain);
    for (int64_t t = 0; t < tokens; ++t) scales[t] = norm_scale<D>(op, t);
    const auto multiply_plain = [&](int64_t row, int64_t count, float* out) {
        R::multiply(weight + row * op.weight_stride, op.weight_stride, count, op.d, x_plain, tokens, out, block, false,
                    room);
    };
    const auto multiply = [&](int64_t row, int64_t count, float* out) {
        if constexpr (P::kQuantized)
            P::multiply(op.quantized, row, count, x, tokens, out, block, false);
        else
            multiply_plain(row, count, out);
    };
    const int64_t up = op.n_scaled / 2, columns = op.gated ? up : op.n_scaled;
    const int64_t unit = P::kQuantized ? kPanelRows : kUnit, first_up = P::kQuantized ? whole_panels(up) : up;
    const Range scaled = share(columns, unit, thread, threads);
    for (int64_t n = scaled.begin; n < scaled.end; n += block) {
        const int64_t count = least(block, scaled.end - n);
        multiply(n, count, first);
        if (op.gated) multiply(first_up + n, count, second);
        for (int64_t begin = 0; begin < tokens; begin += group) {
            const float* values = P::rows(first, count, tokens, begin, block, first_rows);
            const float* others = op.gated ? P::rows(second, count, tokens, begin, block, second_rows) : nullptr;
            with_activation(op.activation, [&](auto activate) {
                for (int64_t t = begin; t < least(begin + group, tokens); ++t) {
                    const int64_t row = (t - begin) * block;
                    finish_row(
                        op, activate, y + t * op.y_stride + n, n, count, scales[t],
                        [&](int64_t i, int64_t) { return Vec::load(values + row + i); },
                        [&](int64_t i, int64_t) { return Vec::load(others + row + i); });
                }
            });
        }
    }
    // The threads that got less above get more here.
    const Range plain = share(op.N - op.n_scaled, kUnit, threads - 1 - thread, threads);
    const int64_t first_plain = P::kQuantized ? 0 : op.n_scaled;
    for (int64_t n = plain.begin; n < plain.end; n += block) {
        const int64_t count = least(block, plain.end - n);
        multiply_plain(first_plain + n, count, first);
        for (int64_t begin = 0; begin < tokens; begin += group) {
            const float* values = R::rows(first, count, tokens, begin, block, first_rows);
            for (int64_t t = begin; t < least(begin + group, tokens); ++t, values += block)
                store_row(y + t * op.y_stride + columns + n, values, count);
        }
    }
}

template <typename P, typename R = P>
void norm_linear(const NormLinear& op, int thread, int threads) {
    using D = typename P::Stored;
    const typename P::Session session;
    const Part part = P::part(op.tokens, thread, threads);
    const int64_t step = P::tokens_at_once(op.tokens, op.d);
    for (int64_t t = part.tokens.begin; t < part.tokens.end; t += step) {
        NormLinear rows = op;
        rows.tokens = least(step, part.tokens.end - t);
        rows.h = static_cast<const D*>(op.h) + t * op.h_stride;
        rows.y = static_cast<D*>(op.y) + t * op.y_stride;
        rows.sumsq = op.sumsq ? op.sumsq + t * op.parts : nullptr;
        norm_linear_rows<P, R>(rows, part.thread, part.threads);
    }
}

// P multiplies the weight, where it is quantized its first columns; R the rest and the shortcut.
template <typename P, typename R>
void rotate_add_rows(const RotateAdd& op, int thread, int threads) {
    using D = typename P::Stored;
    const auto* a = static_cast<const D*>(op.a);
    const auto* h = static_cast<const D*>(op.h);
    const auto* weight = static_cast<const D*>(op.weight);
    const auto* shortcut = static_cast<const D*>(op.shortcut);
    const auto* bias = static_cast<const D*>(op.bias);
    auto* h_next = static_cast<D*>(op.h_next);
    const int64_t tokens = op.tokens, group = P::group(tokens), block = P::columns_at_once(op.K);
    const int64_t own = P::kQuantized ? op.quantized_columns : op.K, rest = op.K - own;
    const int64_t packed_a = whole_lines(P::packed_floats(tokens, own));
    const int64_t packed_rest = rest ? whole_lines(R::packed_floats(tokens, rest)) : 0;
    const int64_t packed_h = shortcut ? whole_lines(R::packed_floats(tokens, op.d)) : 0;
    const int64_t size = P::sums_floats(tokens, block);
    float* x = scratch(packed_a + packed_rest + packed_h + size + P::rows_floats(block) + P::room_floats());
    float* x_rest = x + packed_a;
    float* x_h = x_rest + packed_rest;
    float* sums = x_h + packed_h;
    float* rows = sums + size;
    float* room = rows + P::rows_floats(block);
    P::pack_tokens(a, op.a_stride, tokens, own, x);
    if (rest) R::pack_tokens(a + own, op.a_stride, tokens, rest, x_rest);
    if (shortcut) R::pack_tokens(h, op.h_stride, tokens, op.d, x_h);
    const auto multiply = [&](const D* w, int64_t stride, int64_t n, int64_t count, int64_t K, const float* packed,
                              bool add) {
        R::multiply(w + n * stride, stride, count, K, packed, tokens, sums, block, add, room);
    };
    const Range columns = share(op.N, P::kQuantized ? kPanelRows : kUnit, thread, threads);
    for (int64_t n = columns.begin; n < columns.end; n += block) {
        const int64_t count = least(block, columns.end - n);
        if constexpr (P::kQuantized) {
            P::multiply(op.quantized, n, count, x, tokens, sums, block, false);
            if (rest) multiply(weight, op.weight_stride, n, count, rest, x_rest, true);
        } else {
            multiply(weight, op.weight_stride, n, count, op.K, x, false);
        }
        if (shortcut) multiply(shortcut, op.shortcut_stride, n, count, op.d, x_h, true);
        // The stream passes as it is, with zeros beyond its columns.
        const int64_t kept = shortcut ? 0 : most(0, least(count, op.d - n));
        for (int64_t begin = 0; begin < tokens; begin += group) {
            const float* values = P::rows(sums, count, tokens, begin, block, rows);
            for (int64_t t = begin; t < least(begin + group, tokens); ++t, values += block) {
                const D* stream = h + t * op.h_stride + n;
                write_row(h_next + t * op.h_next_stride + n, count, [&](int64_t i, int64_t remaining) {
                    Vec value = Vec::load(values + i);
                    if (i < kept) value = Vec::plus(value, read_some(stream + i, kept - i));
                    return bias ? Vec::plus(value, read_some(bias + n + i, remaining)) : value;
                });
            }
        }
    }
}

template <typename P, typename R = P>
void rotate_add(const RotateAdd& op, int thread, int threads) {
    using D = typename P::Stored;
    const typename P::Session session;
    const Part part = P::part(op.tokens, thread, threads);
    const int64_t step = P::tokens_at_once(op.tokens, op.K);
    for (int64_t t = part.tokens.begin; t < part.tokens.end; t += step) {
        RotateAdd rows = op;  // but for `sumsq`, which is not written here
        rows.tokens = least(step, part.tokens.end - t);
        rows.a = static_cast<const D*>(op.a) + t * op.a_stride;
        rows.h = static_cast<const D*>(op.h) + t * op.h_stride;
        rows.h_next = static_cast<D*>(op.h_next) + t * op.h_next_stride;
        rotate_add_rows<P, R>(rows, part.thread, part.threads);
    }
}

// Few rows, of weights as R multiplies them or quantized.
template <typename R>
void norm_linear_any(const NormLinear& op, int thread, int threads) {
    const auto run = op.quantized.data ? norm_linear<QuantizedProduct<typename R::Stored>, R> : norm_linear<R>;
    run(op, thread, threads);
}

template <typename R>
void rotate_add_any(const RotateAdd& op, int thread, int threads) {
    const auto run = op.quantized.data ? rotate_add<QuantizedProduct<typename R::Stored>, R> : rotate_add<R>;
    run(op, thread, threads);
}

// `norm_linear` after a library's product h Wᵀ, [tokens, N]; without gates y may be the same memory.
template <typename D>
void finish_norm_linear(const NormLinear& op, const void* product, int64_t stride, int thread, int threads) {
    const int64_t up = op.n_scaled / 2, columns = op.gated ? up : op.n_scaled;
    const Range tokens = share(op.tokens, 1, thread, threads);
    with_activation(op.activation, [&](auto activate) {
        for (int64_t t = tokens.begin; t < tokens.end; ++t) {
            const D* row = static_cast<const D*>(product) + t * stride;
            D* y = static_cast<D*>(op.y) + t * op.y_stride;
            finish_row(
                op, activate, y, 0, columns, norm_scale<D>(op, t),
                [&](int64_t i, int64_t remaining) { return read_some(row + i, remaining); },
                [&](int64_t i, int64_t remaining) { return read_some(row + up + i, remaining); });
            if (y != row) std::memcpy(y + columns, row + op.n_scaled, (op.N - op.n_scaled) * sizeof(D));
        }
    });
}

template <typename D>
void row_sums(const RotateAdd& op, int thread, int threads) {
    const auto* h_next = static_cast<const D*>(op.h_next);
    const int64_t parts = (op.N + kSumColumns - 1) / kSumColumns;
    // Rows; where there are fewer than threads, whole cache lines of sums.
    const bool by_row = op.tokens >= threads;
    const Range rows = by_row ? share(op.tokens, 1, thread, threads) : Range{0, op.tokens};
    const Range range = by_row ? Range{0, parts} : share(parts, 16, thread, threads);
    for (int64_t t = rows.begin; t < rows.end; ++t)
        for (int64_t p = range.begin; p < range.end; ++p) {
            const D* values = h_next + t * op.h_next_stride + p * kSumColumns;
            op.sumsq[t * parts + p] = sum_of_squares(values, least(kSumColumns, op.N - p * kSumColumns));
        }
}
