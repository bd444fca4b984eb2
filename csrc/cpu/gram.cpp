#include "gram.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>

#include "decode.h"
#include "threads.h"

namespace slicegpt {
namespace cpu {
namespace {

// A column of a run, in bytes: 512 tokens in float64, 1024 in float32, 2048 in bfloat16. Longer runs read and write C
// less often, and take more memory.
constexpr int64_t kColumnBytes = 4096;
// Left panels that are multiplied with one right panel after the other: they stay in the second-level cache.
constexpr int64_t kGroupBytes = 1 << 18;
// Rows of C that a thread finishes at a time, and the size of the blocks that it mirrors: one cache line by as many
// rows as a set of the first-level cache holds, which rows of a power of two bytes all meet in.
constexpr int64_t kFinishedRows = 32, kMirrored = 8;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(char* p) const { std::free(p); }
};

// Numbers from 0, each for one thread: threads that are slow, or share their processor, take fewer.
class Tasks {
  public:
    template <typename Body>
    void each(int64_t count, const Body& body) {
        for (int64_t task = next_++; task < count; task = next_++) body(task);
    }
    void restart() { next_ = 0; }

  private:
    std::atomic<int64_t> next_{0};
};

// A barrier whose threads soon sleep. OpenMP's would have them spin: where other work takes turns with them on the
// processors, a thread then spends its turn waiting for one that waits for a turn, and every barrier costs a time slice
// (measured: 8 ms a run of 3 ms).
class Meeting {
  public:
    void wait(int threads) {
        if (threads == 1) return;
        const int64_t before = meetings_;
        if (++arrived_ == threads) {
            arrived_ = 0;
            const std::lock_guard<std::mutex> lock(mutex_);
            ++meetings_;
            all_.notify_all();
            return;
        }
        const auto until = std::chrono::steady_clock::now() + kSpin;
        while (meetings_ == before)
            if (std::chrono::steady_clock::now() > until) {
                std::unique_lock<std::mutex> lock(mutex_);
                all_.wait(lock, [&] { return meetings_ != before; });
            }
    }

  private:
    // As long as the last task of another thread may take.
    static constexpr std::chrono::microseconds kSpin{50};
    std::atomic<int> arrived_{0};
    std::atomic<int64_t> meetings_{0};
    std::mutex mutex_;
    std::condition_variable all_;
};

void mark_infinities(double* row, int64_t count) {
    // Only of infinities and NaN is the difference with themselves not 0.
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) found |= row[i] - row[i] != 0;
    if (!found) return;
    for (int64_t i = 0; i < count; ++i)
        if (row[i] - row[i] != 0) row[i] = std::numeric_limits<double>::quiet_NaN();
}

void finish_rows(const Gram& op, int64_t begin, int64_t end) {
    const int64_t D = op.right.count;
    double* C = op.C;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = op.triangle ? row : 0;
        mark_infinities(C + row * D + first, D - first);
    }
    if (!op.triangle) return;
    // Column blocks outside: the rows that are written then get all of a block's lines one after the other.
    for (int64_t j = begin; j < D; j += kMirrored)
        for (int64_t i = begin; i < std::min(end, j + kMirrored); i += kMirrored)
            for (int64_t column = j; column < std::min(j + kMirrored, D); ++column)
                for (int64_t row = i; row < std::min({i + kMirrored, end, column}); ++row)
                    C[column * D + row] = C[row * D + column];
}

class Work {
  public:
    Work(const GramKernels& kernels, const Gram& op)
        : kernels_(kernels),
          op_(op),
          run_(std::min(kColumnBytes / kernels.item_bytes, divided_up(op.tokens, kPackedTokens) * kPackedTokens)),
          left_panels_(divided_up(op.left.count, kernels.panel_columns)),
          right_panels_(divided_up(op.right.count, kernels.panel_columns)),
          group_(std::max<int64_t>(1, kGroupBytes / (kColumnBytes * kernels.panel_columns))) {
        const int64_t panel_bytes = run_ * kernels.panel_columns * kernels.item_bytes;
        const bool one = op.triangle && !op.weight;
        const int64_t bytes = (left_panels_ + (one ? 0 : right_panels_)) * panel_bytes;
        if (bytes == 0) return;
        memory_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
        if (!memory_) throw std::bad_alloc();
        left_ = memory_.get();
        right_ = one ? left_ : left_ + left_panels_ * panel_bytes;
    }

    // All of a thread's part; the threads of a region run it together.
    void operator()(int thread, int threads) {
        for (int64_t first = 0; first < op_.tokens; first += run_) {
            const int64_t tokens = std::min(run_, op_.tokens - first);
            // Nobody takes the tasks of another stage than the one between the barriers around it.
            if (thread == 0) multiplying_.restart();
            const int64_t blocks = divided_up(tokens, kPackedTokens);
            packing_.each(op_.triangle ? blocks : 2 * blocks, [&](int64_t task) { pack(first, tokens, blocks, task); });
            meeting_.wait(threads);
            if (thread == 0) packing_.restart();
            multiplying_.each(tile_tasks(), [&](int64_t task) { multiply(tokens, task); });
            meeting_.wait(threads);
        }
        const int64_t rows = op_.left.count;
        finishing_.each(divided_up(rows, kFinishedRows), [&](int64_t task) {
            finish_rows(op_, task * kFinishedRows, std::min(rows, (task + 1) * kFinishedRows));
        });
    }

  private:
    void pack(int64_t first, int64_t tokens, int64_t blocks, int64_t task) const {
        const bool is_left = task < blocks;
        const int64_t at = (is_left ? task : task - blocks) * kPackedTokens;
        void* plain = is_left ? left_ : nullptr;
        void* weighted = !is_left || (op_.triangle && op_.weight) ? right_ : nullptr;
        kernels_.pack({is_left ? op_.left : op_.right, op_.dtype, op_.rows, op_.weight, first + at,
                       std::min<int64_t>(kPackedTokens, tokens - at), at, run_, plain, weighted});
    }

    int64_t tile_tasks() const {
        int64_t count = 0;
        for (int64_t left = 0; left < left_panels_; left += group_) count += right_panels_ - first_right(left);
        return count;
    }

    // The first right panel that a group of left ones is multiplied with.
    int64_t first_right(int64_t left) const { return op_.triangle ? left : 0; }

    void multiply(int64_t tokens, int64_t task) const {
        int64_t left = 0;
        for (; task >= right_panels_ - first_right(left); left += group_) task -= right_panels_ - first_right(left);
        kernels_.multiply({left_, right_, tokens, run_, left, std::min(left + group_, left_panels_),
                           first_right(left) + task, op_.left.count, op_.right.count, op_.C, op_.triangle});
    }

    const GramKernels& kernels_;
    const Gram& op_;
    const int64_t run_, left_panels_, right_panels_, group_;
    std::unique_ptr<char, Free> memory_;
    char *left_ = nullptr, *right_ = nullptr;
    Tasks packing_, multiplying_, finishing_;
    Meeting meeting_;
};

const GramKernels& kernels_for(const Kernels& kernels, const Gram& op) {
    if (!op.fast) return kernels.gram_fp64;
    const bool pairs = op.dtype == Dtype::kBfloat16 && !op.weight && kernels.gram_bf16;
    return pairs ? *kernels.gram_bf16 : kernels.gram_fast;
}

}  // namespace

void run_gram(const Kernels& kernels, const Gram& op, int threads) {
    Work work(kernels_for(kernels, op), op);
    parallel(threads, [&](int thread, int count) { work(thread, count); });
}

}  // namespace cpu
}  // namespace slicegpt
