// Facts about the current device that launch configurations depend on.
#pragma once

#include <cuda_runtime.h>

namespace slicegpt {

// Streaming multiprocessors of the current device; 1 where it cannot be asked (the launch will then say why).
inline int multiprocessors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 1;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
    return count > 0 ? count : 1;
}

// Whether the current device has asynchronous copies (sm_80), which decides how many pipeline stages a kernel uses.
inline bool has_async_copies() {
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
    return major >= 8;
}

inline size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace slicegpt
