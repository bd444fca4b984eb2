// rotate_add for many rows on Hopper's wgmma: the launcher.
#pragma once

#include "decode.h"

namespace slicegpt {

// float16 or bfloat16; `rank` is 0. All pointers and row strides are multiples of 16 bytes (but sumsq, and bias: of 4),
// N and without a shortcut also d multiples of 8. `blocks`: 1, or 2 that share what they read of the weights. Returns
// as decode_rotate_add, kNoWgmma where has_rotate_wgmma() is false.
int rotate_add_wgmma(const RotateAddArguments& arguments, int blocks, cudaStream_t stream);

// Whether the code that the driver loaded for the current device holds the kernel.
bool has_rotate_wgmma();

}  // namespace slicegpt
