// The Python module slicegpt._C: every launcher with addresses and sizes as integers, returning its status.
// Checks, allocation and streams are Python's (slicegpt/ops/cuda.py). Importing it touches neither driver nor
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "gram.h"

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
        case kBadDigits:
            return "digits out of range";
        case kTooLarge:
            return "matrix too large";
    }
    const auto error = static_cast<cudaError_t>(status);
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

GramArguments gram_arguments(uintptr_t C, int64_t C_stride, uintptr_t X, int64_t X_stride, int dtype,
                             uintptr_t weight, int64_t tokens, int64_t columns, uintptr_t workspace,
                             size_t workspace_bytes, uintptr_t stream) {
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

void bind_gram(py::module_& m) {
    m.def("gram_arguments", &gram_arguments, py::arg("C"), py::arg("C_stride"), py::arg("X"),
          py::arg("X_stride"), py::arg("dtype"), py::arg("weight"), py::arg("tokens"), py::arg("columns"),
          py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"));
    py::class_<GramArguments>(m, "GramArguments", py::module_local());
    m.def("gram_fp64", &gram_fp64);
    m.def("gram_fp64_workspace", &gram_fp64_workspace);
    m.def("gram_exact", &gram_exact);
    m.def("gram_exact_workspace", [](int64_t tokens, int64_t columns, int dtype, int digits) {
        return gram_exact_workspace(tokens, columns, static_cast<Dtype>(dtype), digits);
    });
    m.def("gram_fast", &gram_fast);
    m.def("gram_fast_workspace", &gram_fast_workspace);
}

}  // namespace
}  // namespace slicegpt

PYBIND11_MODULE(_C, m) {
    m.def("version", [] { return std::string(SLICEGPT_VERSION); });
    m.def("nvcc_version", [] { return std::string(SLICEGPT_NVCC); });
    m.def("architectures", [] { return slicegpt::split(SLICEGPT_ARCHITECTURES); });
    m.def("error_string", &slicegpt::describe);
    slicegpt::bind_gram(m);
}
