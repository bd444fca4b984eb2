#include "step.h"

#include "threads.h"

namespace slicegpt {
namespace cpu {

void run_step(const Kernels& kernels, const Step& step, const Moment& moment, int threads) {
    parallel(threads, [&](int thread, int count) {
        const void* h = moment.h;
        int64_t h_stride = moment.h_stride;
        for (const Block& block : step.blocks) {
            for (NormLinear input : block.inputs) {
                input.h = h;
                input.h_stride = h_stride;
                kernels.norm_linear(step.dtype, input, thread, count);
            }
            barrier();
            if (block.attends) {
                Attention attention = block.attention;
                attention.positions = moment.positions;
                attention.valid = moment.valid;
                attention.slot = moment.slot;
                attention.first = block.window && moment.slot + 1 > block.window ? moment.slot + 1 - block.window : 0;
                kernels.attend(step.dtype, attention, thread, count);
                barrier();
            }
            RotateAdd output = block.output;
            output.h = h;
            output.h_stride = h_stride;
            kernels.rotate_add(step.dtype, output, thread, count);
            barrier();
            h = output.h_next;
            h_stride = output.h_next_stride;
        }
    });
}

}  // namespace cpu
}  // namespace slicegpt
