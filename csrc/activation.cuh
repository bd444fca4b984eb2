// The activations, in float32.
#pragma once

#include "decode.h"
#include "ptx.cuh"

namespace slicegpt {

__device__ __forceinline__ float activate(float x, Activation activation) {
    switch (activation) {
        case Activation::kRelu:
            return x < 0.f ? 0.f : x;  // a NaN stays one
        case Activation::kGelu:
            return 0.5f * x * (1.f + erff(x * 0.70710678f));
        case Activation::kGeluTanh:
            return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
        case Activation::kSilu:
            return x / (1.f + expf(-x));
        case Activation::kRelu2:
            return x < 0.f ? 0.f : x * x;
        default:
            return x;
    }
}

}  // namespace slicegpt
