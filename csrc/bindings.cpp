// The Python module slicegpt._C: every launcher with addresses and sizes as integers, returning its status.
// Checks, allocation and streams are Python's (slicegpt/ops/cuda/). Importing it touches neither driver nor
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>
#include <vector>

#include "decode.h"
#include "device.h"
#include "gram.h"
#include "rotate_wgmma.h"

namespace py = pybind11;

namespace slicegpt {
namespace {

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> items;
    size_t begin = 0;
    for (size_t comma; (comma = text.find(',', begin)) != std::string::npos; begin = comma + 1)
        items.push_back(text.substr(begin, comma - begin));
    items.push_back(text.substr(begin));
    return items;
}

std::string describe(int status) {
    switch (status) {
        case kOk:
            return "success";
        case kBadDtype:
            return "dtype not supported by this kernel";
        case kWorkspaceTooSmall:
            return "workspace too small";
        case kTooLarge:
            return "matrix too large";
        case kBadConfig:
            return "tokens, warps or split_k out of range, or rows without the alignment that the kernel needs";
        case kNoWgmma:
            return "the wgmma kernel needs compute capability 9.0 and code built for 9.0a";
    }
    const auto error = static_cast<cudaError_t>(status);
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

GramArguments gram_arguments(uintptr_t C, int64_t C_stride, uintptr_t X, int64_t X_stride, int dtype, uintptr_t weight,
                             int64_t tokens, int64_t columns, uintptr_t workspace, size_t workspace_bytes,
                             uintptr_t stream) {
    return {reinterpret_cast<double*>(C),
            C_stride,
            reinterpret_cast<const void*>(X),
            X_stride,
            static_cast<Dtype>(dtype),
            reinterpret_cast<const double*>(weight),
            tokens,
            columns,
            reinterpret_cast<void*>(workspace),
            workspace_bytes,
            reinterpret_cast<cudaStream_t>(stream)};
}

// Defines a function of csrc/'s headers, which works on the current device, with the number of a device as its first
// argument. Where that cannot be used, the answer of a launcher is the error, and any other 0.
template <typename Result, typename... Arguments>
void define_on_device(py::module_& m, const char* name, Result (*call)(Arguments...)) {
    m.def(name, [call](int device, Arguments... arguments) -> Result {
        const DeviceScope scope(device);
        if (scope.status == 0) return call(arguments...);
        if constexpr (std::is_same_v<Result, int>) return scope.status;
        return Result{};
    });
}

void bind_gram(py::module_& m) {
    m.def("gram_arguments", &gram_arguments, py::arg("C"), py::arg("C_stride"), py::arg("X"), py::arg("X_stride"),
          py::arg("dtype"), py::arg("weight"), py::arg("tokens"), py::arg("columns"), py::arg("workspace"),
          py::arg("workspace_bytes"), py::arg("stream"));
    py::class_<GramArguments>(m, "GramArguments", py::module_local());
    define_on_device(m, "gram_fp64", &gram_fp64);
    define_on_device(m, "gram_fp64_workspace", &gram_fp64_workspace);
    define_on_device(
        m, "gram_exact", +[](const GramArguments& arguments, int kernel) {
            return gram_exact(arguments, static_cast<ExactKernel>(kernel));
        });
    define_on_device(m, "gram_exact_has_wgmma", &gram_exact_has_wgmma);
    define_on_device(
        m, "gram_exact_workspace", +[](int64_t tokens, int64_t columns, int dtype) {
            return gram_exact_workspace(tokens, columns, static_cast<Dtype>(dtype));
        });
    define_on_device(m, "gram_fast", &gram_fast);
    define_on_device(m, "gram_fast_workspace", &gram_fast_workspace);
}

// An address as Python gives it; 0 is null.
struct Address {
    uintptr_t value;
    template <typename T>
    operator T*() const {
        return reinterpret_cast<T*>(value);
    }
};

void bind_decode(py::module_& m) {
    using A = uintptr_t;
    py::class_<DecodeLaunch>(m, "DecodeLaunch", py::module_local())
        .def(py::init([](int row_warps, int column_warps, int split_k, A partial, A arrivals, bool overlap, A stream) {
                 return DecodeLaunch{row_warps,         column_warps, split_k,        Address{partial},
                                     Address{arrivals}, overlap,      Address{stream}};
             }),
             py::arg("row_warps"), py::arg("column_warps"), py::arg("split_k"), py::arg("partial"), py::arg("arrivals"),
             py::arg("overlap"), py::arg("stream"));
    py::class_<NormLinearArguments>(m, "NormLinearArguments", py::module_local())
        .def(py::init([](A h, int64_t h_stride, A weight, int64_t weight_stride, A bias, A sumsq, int parts, A y,
                         int64_t y_stride, int dtype, int tokens, int d, int N, int n_scaled, int activation,
                         bool gated, float divisor, float eps) {
                 return NormLinearArguments{Address{h},
                                            h_stride,
                                            Address{weight},
                                            weight_stride,
                                            Address{bias},
                                            Address{sumsq},
                                            parts,
                                            Address{y},
                                            y_stride,
                                            static_cast<Dtype>(dtype),
                                            tokens,
                                            d,
                                            N,
                                            n_scaled,
                                            static_cast<Activation>(activation),
                                            gated,
                                            divisor,
                                            eps};
             }),
             py::arg("h"), py::arg("h_stride"), py::arg("weight"), py::arg("weight_stride"), py::arg("bias"),
             py::arg("sumsq"), py::arg("parts"), py::arg("y"), py::arg("y_stride"), py::arg("dtype"), py::arg("tokens"),
             py::arg("d"), py::arg("N"), py::arg("n_scaled"), py::arg("activation"), py::arg("gated"),
             py::arg("divisor"), py::arg("eps"));
    py::class_<RotateAddArguments>(m, "RotateAddArguments", py::module_local())
        .def(py::init([](A a, int64_t a_stride, A weight, int64_t weight_stride, A h, int64_t h_stride, A shortcut,
                         int64_t shortcut_stride, A bias, A z, int64_t z_stride, A factor, int64_t factor_stride,
                         A h_next, int64_t h_next_stride, A sumsq, int dtype, int tokens, int K, int d, int N,
                         int rank) {
                 return RotateAddArguments{Address{a},
                                           a_stride,
                                           Address{weight},
                                           weight_stride,
                                           Address{h},
                                           h_stride,
                                           Address{shortcut},
                                           shortcut_stride,
                                           Address{bias},
                                           Address{z},
                                           z_stride,
                                           Address{factor},
                                           factor_stride,
                                           Address{h_next},
                                           h_next_stride,
                                           Address{sumsq},
                                           static_cast<Dtype>(dtype),
                                           tokens,
                                           K,
                                           d,
                                           N,
                                           rank};
             }),
             py::arg("a"), py::arg("a_stride"), py::arg("weight"), py::arg("weight_stride"), py::arg("h"),
             py::arg("h_stride"), py::arg("shortcut"), py::arg("shortcut_stride"), py::arg("bias"), py::arg("z"),
             py::arg("z_stride"), py::arg("factor"), py::arg("factor_stride"), py::arg("h_next"),
             py::arg("h_next_stride"), py::arg("sumsq"), py::arg("dtype"), py::arg("tokens"), py::arg("K"),
             py::arg("d"), py::arg("N"), py::arg("rank"));
    define_on_device(m, "decode_norm_linear", &decode_norm_linear);
    define_on_device(m, "decode_rotate_add", &decode_rotate_add);
    define_on_device(
        m, "rotate_add_wgmma", +[](const RotateAddArguments& arguments, int blocks, A stream) {
            return rotate_add_wgmma(arguments, blocks, Address{stream});
        });
    define_on_device(m, "has_rotate_wgmma", &has_rotate_wgmma);
    define_on_device(
        m, "norm_linear_epilogue", +[](const NormLinearArguments& arguments, A product, A stream) {
            return norm_linear_epilogue(arguments, Address{product}, Address{stream});
        });
    define_on_device(
        m, "rotate_add_epilogue", +[](const RotateAddArguments& arguments, A product, A second, A stream) {
            return rotate_add_epilogue(arguments, Address{product}, Address{second}, Address{stream});
        });
}

}  // namespace
}  // namespace slicegpt

PYBIND11_MODULE(_C, m) {
    m.def("version", [] { return std::string(SLICEGPT_VERSION); });
    m.def("nvcc_version", [] { return std::string(SLICEGPT_NVCC); });
    m.def("architectures", [] { return slicegpt::split(SLICEGPT_ARCHITECTURES); });
    m.def("error_string", &slicegpt::describe);
    slicegpt::bind_gram(m);
    slicegpt::bind_decode(m);
}
