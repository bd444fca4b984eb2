#include "threads.h"

#include <dlfcn.h>

#include <cstdlib>
#include <new>

#include "scratch.h"

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
int omp_in_parallel(void);
}

namespace slicegpt {
namespace cpu {
namespace detail {

void run(int threads, void (*function)(void*), void* data) {
    // A region inside a region has one thread, unless somebody asked OpenMP to nest.
    GOMP_parallel(function, data, omp_in_parallel() ? 1u : static_cast<unsigned>(threads), 0);
}
int thread_number() { return omp_get_thread_num(); }
int thread_count() { return omp_get_num_threads(); }

}  // namespace detail

void barrier() { GOMP_barrier(); }

const char* openmp_library() {
    Dl_info info;
    return dladdr(reinterpret_cast<void*>(&GOMP_parallel), &info) && info.dli_fname ? info.dli_fname : "unknown";
}

namespace {

struct Memory {
    float* floats = nullptr;
    int64_t size = 0;
    ~Memory() { std::free(floats); }
};
thread_local Memory memory;

}  // namespace

float* scratch(int64_t floats) {
    if (floats > memory.size) {
        const int64_t size = (floats + 1023) / 1024 * 1024;
        std::free(memory.floats);
        memory.size = 0;
        memory.floats = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
        if (!memory.floats) throw std::bad_alloc();
        memory.size = size;
    }
    return memory.floats;
}

}  // namespace cpu
}  // namespace slicegpt
