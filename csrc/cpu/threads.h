// Parallel regions on the OpenMP runtime that torch has loaded.
//
// The module is linked to no OpenMP library: GNU's entry points (which LLVM's and Intel's runtimes offer as well) bind
// to the copy that torch brought into the process, so that there is one pool of threads, and torch.set_num_threads
// governs it.
#pragma once

#include <cstdint>

namespace slicegpt {
namespace cpu {

// body(thread, threads) on up to `threads` threads; alone where the caller is in a parallel region already.
template <typename Body>
void parallel(int threads, const Body& body);

// Waits for the other threads of the region.
void barrier();

// The file that the OpenMP functions were found in.
const char* openmp_library();

namespace detail {
void run(int threads, void (*function)(void*), void* data);
int thread_number();
int thread_count();
}  // namespace detail

template <typename Body>
void parallel(int threads, const Body& body) {
    struct Call {
        static void make(void* data) {
            (*static_cast<const Body*>(data))(detail::thread_number(), detail::thread_count());
        }
    };
    detail::run(threads, &Call::make, const_cast<Body*>(&body));
}

}  // namespace cpu
}  // namespace slicegpt
