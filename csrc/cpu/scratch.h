// Memory of the calling thread that lives until the thread ends.
#pragma once

#include <cstdint>

namespace slicegpt {
namespace cpu {

// At least so many floats, aligned to 64 bytes; the next call of the same thread gives the same memory.
float* scratch(int64_t floats);

}  // namespace cpu
}  // namespace slicegpt
