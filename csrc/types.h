// What all launchers share, on GPUs and on CPUs: the codes that Python passes in and what it gets back.
#pragma once

namespace slicegpt {

// A launcher's answer: kOk, a CUDA error code (> 0), or one of its own (< 0).
enum Status : int {
    kOk = 0,
    kBadDtype = -1,
    kWorkspaceTooSmall = -2,
    kTooLarge = -3,
    kBadConfig = -4,
    kNoWgmma = -5,
};

// The orders are slicegpt/ops/contracts.py's DTYPES and ACTIVATIONS.
enum class Dtype : int { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2, kFloat64 = 3 };
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4, kRelu2 = 5 };

// Columns of the stream that one sum of squares covers; contracts.py's SUMSQ_COLUMNS.
constexpr int kSumColumns = 32;

}  // namespace slicegpt
