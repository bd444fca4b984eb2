// The operations of an instruction set for every stored dtype, all multiplied as floats. Included into an unnamed
// namespace after kernels.h and attention.h.
#pragma once

// Calls body(Fixed<T>) with T the type that a dtype stands for.
template <typename T>
struct Fixed {
    using type = T;
};
template <typename Body>
inline void with_type(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::kFloat16:
            return body(Fixed<Float16>{});
        case Dtype::kBfloat16:
            return body(Fixed<BFloat16>{});
        case Dtype::kFloat32:
            return body(Fixed<float>{});
        case Dtype::kFloat64:
            return;  // Python passes none: slicegpt/ops/cpu/gemm.py's DTYPES
    }
}

template <typename Body>
inline void with_rows(Dtype dtype, Body body) {
    with_type(dtype, [&](auto fixed) { body(Fixed<RowProduct<Floats<typename decltype(fixed)::type>>>{}); });
}

void norm_linear_of(Dtype dtype, const NormLinear& op, int thread, int threads) {
    with_rows(dtype, [&](auto fixed) { norm_linear_any<typename decltype(fixed)::type>(op, thread, threads); });
}

void rotate_add_of(Dtype dtype, const RotateAdd& op, int thread, int threads) {
    with_rows(dtype, [&](auto fixed) { rotate_add_any<typename decltype(fixed)::type>(op, thread, threads); });
}

void finish_of(Dtype dtype, const NormLinear& op, const void* product, int64_t stride, int thread, int threads) {
    with_type(dtype, [&](auto fixed) {
        finish_norm_linear<typename decltype(fixed)::type>(op, product, stride, thread, threads);
    });
}

void row_sums_of(Dtype dtype, const RotateAdd& op, int thread, int threads) {
    with_type(dtype, [&](auto fixed) { row_sums<typename decltype(fixed)::type>(op, thread, threads); });
}

void attend_of(Dtype dtype, const Attention& op, int thread, int threads) {
    with_type(dtype, [&](auto fixed) { attend<typename decltype(fixed)::type>(op, thread, threads); });
}
