// Dynamic shared memory of an emulated block, between pages that nobody may touch: an access beyond it ends the
// process.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {

// Ends where a forbidden page begins, but for the few bytes that its alignment leaves: those hold a pattern, which
// check() looks for.
class GuardedBytes {
  public:
    static constexpr size_t kAlignment = 128;  // what csrc/ptx.cuh declares
    static constexpr unsigned char kPattern = 0xa5;

    GuardedBytes() = default;
    GuardedBytes(GuardedBytes&& other) noexcept { *this = static_cast<GuardedBytes&&>(other); }
    GuardedBytes& operator=(GuardedBytes&& other) noexcept {
        release();
        pages_ = other.pages_, mapped_ = other.mapped_, data_ = other.data_, size_ = other.size_;
        other.pages_ = nullptr, other.data_ = nullptr, other.mapped_ = other.size_ = 0;
        return *this;
    }
    GuardedBytes(const GuardedBytes&) = delete;
    GuardedBytes& operator=(const GuardedBytes&) = delete;
    ~GuardedBytes() { release(); }

    void resize(size_t size) {
        if (pages_ && size == size_) return;
        release();
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
        const size_t inner = (rounded + page - 1) / page * page;
        mapped_ = inner + 2 * page;
        void* const pages = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) std::perror("emulation: mmap"), std::abort();
        pages_ = static_cast<unsigned char*>(pages);
        mprotect(pages_, page, PROT_NONE);
        mprotect(pages_ + page + inner, page, PROT_NONE);
        data_ = pages_ + page + inner - rounded;
        size_ = size;
        std::memset(data_ + size_, kPattern, rounded - size_);
    }
    // Whether nothing was written between the end and the forbidden page.
    bool intact() const {
        for (size_t i = size_; i % kAlignment; ++i)
            if (data_[i] != kPattern) return false;
        return true;
    }
    unsigned char* data() { return data_; }
    unsigned char* begin() { return data_; }
    unsigned char* end() { return data_ + size_; }
    size_t size() const { return size_; }

  private:
    void release() {
        if (pages_) munmap(pages_, mapped_);
        pages_ = data_ = nullptr;
    }
    unsigned char *pages_ = nullptr, *data_ = nullptr;
    size_t mapped_ = 0, size_ = 0;
};

}  // namespace emulation
