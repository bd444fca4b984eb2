// norm_linear, rotate_add and attention over any instruction set's Vec and Values. Included into an unnamed namespace
// behind product.h and activation.h.
#pragma once

// Columns of an output that are finished together: their products stay in the first-level cache for the epilogue.
constexpr int kBlock = 64;

// values = values * scale + bias
template <typename D>
inline void scale_and_shift(float* values, int64_t count, float scale, const D* bias) {
    if (bias)
        for (int64_t i = 0; i < count; ++i) values[i] = values[i] * scale + to_float(bias[i]);
    else
        for (int64_t i = 0; i < count; ++i) values[i] *= scale;
}

template <typename D>
void norm_linear(const NormLinear& op, int thread, int threads) {
    const auto* h = static_cast<const D*>(op.h);
    const auto* weight = static_cast<const D*>(op.weight);
    const auto* bias = static_cast<const D*>(op.bias);
    auto* y = static_cast<D*>(op.y);
    const int64_t tokens = op.tokens, packed = packed_size<D>(op.d);
    float* x = scratch(tokens * (packed + 2 * kBlock + 1));
    float* first = x + tokens * packed;
    float* second = first + tokens * kBlock;
    float* scale = second + tokens * kBlock;
    for (int64_t t = 0; t < tokens; ++t) {
        pack(h + t * op.h_stride, op.d, x + t * packed);
        double total = 0;
        if (op.sumsq)
            for (int64_t p = 0; p < op.parts; ++p) total += op.sumsq[t * op.parts + p];
        else
            total = sum_of_squares(x + t * packed, packed);
        scale[t] = static_cast<float>(1 / ::sqrt(total / op.divisor + op.eps));
    }
    const int64_t up = op.n_scaled / 2, columns = op.gated ? up : op.n_scaled;
    const Range scaled = share(columns, kUnit, thread, threads);
    for (int64_t n = scaled.begin; n < scaled.end; n += kBlock) {
        const int64_t count = least(kBlock, scaled.end - n);
        product(weight + n * op.weight_stride, op.weight_stride, count, op.d, x, tokens, first, kBlock, false);
        if (op.gated)
            product(weight + (up + n) * op.weight_stride, op.weight_stride, count, op.d, x, tokens, second, kBlock,
                    false);
        for (int64_t t = 0; t < tokens; ++t) {
            float* values = first + t * kBlock;
            scale_and_shift(values, count, scale[t], bias ? bias + n : nullptr);
            activate(op.activation, values, count);
            if (op.gated) {
                const float* others = second + t * kBlock;
                scale_and_shift(second + t * kBlock, count, scale[t], bias ? bias + up + n : nullptr);
                for (int64_t i = 0; i < count; ++i) values[i] *= others[i];
            }
            store_row(y + t * op.y_stride + n, values, count);
        }
    }
    // The threads that got less above get more here.
    const Range plain = share(op.N - op.n_scaled, kUnit, threads - 1 - thread, threads);
    for (int64_t n = plain.begin; n < plain.end; n += kBlock) {
        const int64_t count = least(kBlock, plain.end - n);
        product(weight + (op.n_scaled + n) * op.weight_stride, op.weight_stride, count, op.d, x, tokens, first, kBlock,
                false);
        for (int64_t t = 0; t < tokens; ++t)
            store_row(y + t * op.y_stride + columns + n, first + t * kBlock, count);
    }
}

template <typename D>
void rotate_add(const RotateAdd& op, int thread, int threads) {
    const auto* a = static_cast<const D*>(op.a);
    const auto* h = static_cast<const D*>(op.h);
    const auto* weight = static_cast<const D*>(op.weight);
    const auto* shortcut = static_cast<const D*>(op.shortcut);
    const auto* bias = static_cast<const D*>(op.bias);
    auto* h_next = static_cast<D*>(op.h_next);
    const int64_t tokens = op.tokens, packed_a = packed_size<D>(op.K);
    const int64_t packed_h = shortcut ? packed_size<D>(op.d) : 0;
    float* x = scratch(tokens * (packed_a + packed_h + kBlock));
    float* x_h = x + tokens * packed_a;
    float* sums = x_h + tokens * packed_h;
    for (int64_t t = 0; t < tokens; ++t) {
        pack(a + t * op.a_stride, op.K, x + t * packed_a);
        if (shortcut) pack(h + t * op.h_stride, op.d, x_h + t * packed_h);
    }
    const Range columns = share(op.N, kUnit, thread, threads);
    for (int64_t n = columns.begin; n < columns.end; n += kBlock) {
        const int64_t count = least(kBlock, columns.end - n);
        product(weight + n * op.weight_stride, op.weight_stride, count, op.K, x, tokens, sums, kBlock, false);
        if (shortcut)
            product(shortcut + n * op.shortcut_stride, op.shortcut_stride, count, op.d, x_h, tokens, sums, kBlock,
                    true);
        for (int64_t t = 0; t < tokens; ++t) {
            float* values = sums + t * kBlock;
            if (!shortcut) {
                const D* kept = h + t * op.h_stride + n;
                const int64_t wide = least(count, op.d - n);  // zeros beyond h's columns
                for (int64_t i = 0; i < wide; ++i) values[i] += to_float(kept[i]);
            }
            if (bias)
                for (int64_t i = 0; i < count; ++i) values[i] += to_float(bias[n + i]);
            store_row(h_next + t * op.h_next_stride + n, values, count);
        }
    }
}

template <typename D>
void row_sums(const RotateAdd& op, int thread, int threads) {
    const auto* h_next = static_cast<const D*>(op.h_next);
    const int64_t parts = (op.N + kSumColumns - 1) / kSumColumns;
    // Whole cache lines of sums where there are several threads' worth.
    const Range range = share(parts, 16, thread, threads);
    for (int64_t t = 0; t < op.tokens; ++t)
        for (int64_t p = range.begin; p < range.end; ++p) {
            const D* values = h_next + t * op.h_next_stride + p * kSumColumns;
            const int64_t count = least(kSumColumns, op.N - p * kSumColumns);
            float lanes[8] = {};
            int64_t i = 0;
            for (; i + 8 <= count; i += 8)
                for (int l = 0; l < 8; ++l) lanes[l] += to_float(values[i + l]) * to_float(values[i + l]);
            for (; i < count; ++i) lanes[i % 8] += to_float(values[i]) * to_float(values[i]);
            op.sumsq[t * parts + p] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                                      ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
        }
}

// Calls body(fixed<T>) with T the type that a dtype stands for.
template <typename T>
struct Fixed {
    using type = T;
};
template <typename Body>
inline void with_type(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::kFloat16:
            return body(Fixed<Float16>{});
        case Dtype::kBFloat16:
            return body(Fixed<BFloat16>{});
        case Dtype::kFloat32:
            return body(Fixed<float>{});
    }
}

void norm_linear_of(Dtype dtype, const NormLinear& op, int thread, int threads) {
    with_type(dtype, [&](auto fixed) { norm_linear<typename decltype(fixed)::type>(op, thread, threads); });
}

void rotate_add_of(Dtype dtype, const RotateAdd& op, int thread, int threads) {
    with_type(dtype, [&](auto fixed) { rotate_add<typename decltype(fixed)::type>(op, thread, threads); });
}

void row_sums_of(Dtype dtype, const RotateAdd& op, int thread, int threads) {
    with_type(dtype, [&](auto fixed) { row_sums<typename decltype(fixed)::type>(op, thread, threads); });
}

void attend_of(Dtype dtype, const Attention& op, int thread, int threads) {
    with_type(dtype, [&](auto fixed) { attend<typename decltype(fixed)::type>(op, thread, threads); });
}
