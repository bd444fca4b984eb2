// The Python module slicegpt._cpu: the CPU's kernels with addresses and sizes as integers. Checks and allocation are
// Python's (slicegpt/ops/cpu/). torch must have been imported before: see threads.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "decode.h"
#include "gram.h"
#include "step.h"
#include "threads.h"

namespace py = pybind11;

namespace slicegpt {
namespace cpu {
namespace {

// An address as Python gives it; 0 is null.
struct Address {
    uintptr_t value;
    template <typename T>
    operator T*() const {
        return reinterpret_cast<T*>(value);
    }
};

bool is_intel() {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

// Those that run on this processor, the fastest first.
std::vector<const Kernels*> present() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma")) {
        // An Intel core does 1.3 vectors of float products a nanosecond and 0.8 of pairs, and converting is cheap:
        // pairs lose. On an AMD EPYC covariances reach 0.71 TFLOP/s with pairs and 0.29 without.
        const bool pairs_last = is_intel();
        for (const Kernels* kernels :
             {amx(), pairs_last ? &kAvx512 : avx512_bf16(), pairs_last ? avx512_bf16() : &kAvx512})
            if (kernels) found.push_back(kernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
}

const Kernels* chosen = present().front();

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : present()) names.push_back(kernels->name);
    return names;
}

bool use(const std::string& name) {
    for (const Kernels* kernels : present())
        if (name == kernels->name) {
            chosen = kernels;
            return true;
        }
    return false;
}

using A = uintptr_t;

NormLinear norm_linear_arguments(A h, int64_t h_stride, A weight, int64_t weight_stride, A bias, A sumsq, int64_t parts,
                                 A y, int64_t y_stride, int64_t tokens, int64_t d, int64_t N, int64_t n_scaled,
                                 int activation, bool gated, double divisor, double eps, const Quantized* quantized) {
    return {Address{h},
            h_stride,
            Address{weight},
            weight_stride,
            Address{bias},
            Address{sumsq},
            parts,
            Address{y},
            y_stride,
            tokens,
            d,
            N,
            n_scaled,
            static_cast<Activation>(activation),
            gated,
            divisor,
            eps,
            quantized ? *quantized : Quantized{}};
}

RotateAdd rotate_add_arguments(A a, int64_t a_stride, A weight, int64_t weight_stride, A h, int64_t h_stride,
                               A shortcut, int64_t shortcut_stride, A bias, A h_next, int64_t h_next_stride, A sumsq,
                               int64_t tokens, int64_t K, int64_t d, int64_t N, const Quantized* quantized,
                               int64_t quantized_columns) {
    return {Address{a},
            a_stride,
            Address{weight},
            weight_stride,
            Address{h},
            h_stride,
            Address{shortcut},
            shortcut_stride,
            Address{bias},
            Address{h_next},
            h_next_stride,
            Address{sumsq},
            tokens,
            K,
            d,
            N,
            quantized ? *quantized : Quantized{},
            quantized_columns};
}

void norm_linear(int dtype, const NormLinear& op, int threads) {
    py::gil_scoped_release release;
    parallel(threads,
             [&](int thread, int count) { chosen->norm_linear(static_cast<Dtype>(dtype), op, thread, count); });
}

void finish(int dtype, const NormLinear& op, A product, int64_t stride, int threads) {
    py::gil_scoped_release release;
    parallel(threads, [&](int thread, int count) {
        chosen->finish(static_cast<Dtype>(dtype), op, Address{product}, stride, thread, count);
    });
}

void row_sums(int dtype, const RotateAdd& op, int threads) {
    py::gil_scoped_release release;
    parallel(threads, [&](int thread, int count) { chosen->row_sums(static_cast<Dtype>(dtype), op, thread, count); });
}

void rotate_add(int dtype, const RotateAdd& op, int threads) {
    py::gil_scoped_release release;
    parallel(threads, [&](int thread, int count) {
        chosen->rotate_add(static_cast<Dtype>(dtype), op, thread, count);
        if (count > 1) barrier();
        chosen->row_sums(static_cast<Dtype>(dtype), op, thread, count);
    });
}

void bind_operations(py::module_& m) {
    py::class_<Quantized>(m, "Quantized", py::module_local())
        .def(py::init([](A data, A scales, A zeros, int scale_dtype, int bits, int64_t blocks, int64_t groups,
                         int64_t group_blocks) {
                 return Quantized{Address{data}, Address{scales}, Address{zeros}, static_cast<Dtype>(scale_dtype),
                                  bits,          blocks,          groups,         group_blocks};
             }),
             py::arg("data"), py::arg("scales"), py::arg("zeros"), py::arg("scale_dtype"), py::arg("bits"),
             py::arg("blocks"), py::arg("groups"), py::arg("group_blocks"));
    py::class_<NormLinear>(m, "NormLinear", py::module_local())
        .def(py::init(&norm_linear_arguments), py::arg("h"), py::arg("h_stride"), py::arg("weight"),
             py::arg("weight_stride"), py::arg("bias"), py::arg("sumsq"), py::arg("parts"), py::arg("y"),
             py::arg("y_stride"), py::arg("tokens"), py::arg("d"), py::arg("N"), py::arg("n_scaled"),
             py::arg("activation"), py::arg("gated"), py::arg("divisor"), py::arg("eps"),
             py::arg("quantized") = nullptr);
    py::class_<RotateAdd>(m, "RotateAdd", py::module_local())
        .def(py::init(&rotate_add_arguments), py::arg("a"), py::arg("a_stride"), py::arg("weight"),
             py::arg("weight_stride"), py::arg("h"), py::arg("h_stride"), py::arg("shortcut"),
             py::arg("shortcut_stride"), py::arg("bias"), py::arg("h_next"), py::arg("h_next_stride"), py::arg("sumsq"),
             py::arg("tokens"), py::arg("K"), py::arg("d"), py::arg("N"), py::arg("quantized") = nullptr,
             py::arg("quantized_columns") = 0);
    py::class_<Attention>(m, "Attention", py::module_local())
        .def(py::init([](A rows, int64_t rows_stride, A keys, A values, int64_t batch_stride, int64_t head_stride,
                         A valid, int64_t valid_stride, A rotary, A positions, A norm, double norm_eps,
                         bool rotate_first, int64_t batch, int64_t heads, int64_t key_heads, int64_t head_dim,
                         int64_t rotary_dim, int64_t first, int64_t slot) {
                 return Attention{Address{rows}, rows_stride,    Address{keys}, Address{values}, batch_stride,
                                  head_stride,   Address{valid}, valid_stride,  Address{rotary}, Address{positions},
                                  Address{norm}, norm_eps,       rotate_first,  batch,           heads,
                                  key_heads,     head_dim,       rotary_dim,    first,           slot};
             }),
             py::arg("rows"), py::arg("rows_stride"), py::arg("keys"), py::arg("values"), py::arg("batch_stride"),
             py::arg("head_stride"), py::arg("valid"), py::arg("valid_stride"), py::arg("rotary"), py::arg("positions"),
             py::arg("norm"), py::arg("norm_eps"), py::arg("rotate_first"), py::arg("batch"), py::arg("heads"),
             py::arg("key_heads"), py::arg("head_dim"), py::arg("rotary_dim"), py::arg("first"), py::arg("slot"));
    m.def("norm_linear", &norm_linear);
    m.def("rotate_add", &rotate_add);
    m.def("finish", &finish);
    m.def("row_sums", &row_sums);
}

void bind_step(py::module_& m) {
    py::class_<Step>(m, "Step", py::module_local())
        .def(py::init([](int dtype) { return Step{static_cast<Dtype>(dtype), {}}; }), py::arg("dtype"))
        .def(
            "add",
            [](Step& step, std::vector<NormLinear> inputs, const Attention* attention, int64_t window,
               const RotateAdd& output) {
                step.blocks.push_back(
                    {std::move(inputs), attention != nullptr, attention ? *attention : Attention{}, window, output});
            },
            py::arg("inputs"), py::arg("attention").none(true), py::arg("window"), py::arg("output"))
        .def(
            "run",
            [](const Step& step, A h, int64_t h_stride, A positions, A valid, int64_t slot, int threads) {
                py::gil_scoped_release release;
                run_step(*chosen, step, {Address{h}, h_stride, Address{positions}, Address{valid}, slot}, threads);
            },
            py::arg("h"), py::arg("h_stride"), py::arg("positions"), py::arg("valid"), py::arg("slot"),
            py::arg("threads"));
}

void bind_gram(py::module_& m) {
    py::class_<Columns>(m, "Columns", py::module_local())
        .def(py::init([](A data, int64_t row_stride, int64_t column_stride, int64_t count) {
                 return Columns{Address{data}, row_stride, column_stride, count};
             }),
             py::arg("data"), py::arg("row_stride"), py::arg("column_stride"), py::arg("count"));
    m.def(
        "gram",
        [](const Columns& left, const Columns& right, int dtype, A rows, A weight, int64_t tokens, A C, bool triangle,
           bool fast, int threads) {
            const Gram op{left,          right,           static_cast<Dtype>(dtype),
                          Address{rows}, Address{weight}, tokens,
                          Address{C},    triangle,        fast};
            py::gil_scoped_release release;
            run_gram(*chosen, op, threads);
        },
        py::arg("left"), py::arg("right"), py::arg("dtype"), py::arg("rows"), py::arg("weight"), py::arg("tokens"),
        py::arg("C"), py::arg("triangle"), py::arg("fast"), py::arg("threads"));
}

}  // namespace
}  // namespace cpu
}  // namespace slicegpt

PYBIND11_MODULE(_cpu, m) {
    m.def("version", [] { return std::string(SLICEGPT_VERSION); });
    m.def("compiler", [] { return std::string(__VERSION__); });
    m.def("openmp_library", [] { return std::string(slicegpt::cpu::openmp_library()); });
    m.def("is_intel", &slicegpt::cpu::is_intel);
    m.def("instruction_sets", &slicegpt::cpu::instruction_sets);
    m.def("instruction_set", [] { return std::string(slicegpt::cpu::chosen->name); });
    m.def("use", &slicegpt::cpu::use);
    slicegpt::cpu::bind_operations(m);
    slicegpt::cpu::bind_step(m);
    slicegpt::cpu::bind_gram(m);
}
