// Facts about the current device that launch configurations depend on, and what its calls answer.
#pragma once

#include <cuda_runtime.h>

namespace slicegpt {

// A call's error as CUDA's code. The runtime keeps the last error until it is asked for: left there, it would be blamed
// on the next launch, which may be fine.
inline int report(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return int(error);
}

// Makes a device the current one of this thread, and the one before it again at the end. The extension links a CUDA
// runtime of its own, and launches go to the current device: that of the tensors need not be.
class DeviceScope {
  public:
    explicit DeviceScope(int device) : status(report(cudaGetDevice(&before_))) {
        if (status == 0 && device != before_) {
            status = report(cudaSetDevice(device));
            changed_ = status == 0;
        }
    }
    ~DeviceScope() {
        if (changed_) report(cudaSetDevice(before_));
    }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

    int status;  // 0, or CUDA's code: the device cannot be used

  private:
    int before_ = 0;
    bool changed_ = false;
};

// Streaming multiprocessors of the current device; 1 where it cannot be asked (the launch will then say why).
inline int multiprocessors() {
    int device = 0, count = 0;
    if (report(cudaGetDevice(&device))) return 1;
    if (report(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device))) return 1;
    return count > 0 ? count : 1;
}

// The major compute capability of the current device; 0 where it cannot be asked.
inline int capability_major() {
    int device = 0, major = 0;
    if (report(cudaGetDevice(&device))) return 0;
    if (report(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device))) return 0;
    return major;
}

inline size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace slicegpt
