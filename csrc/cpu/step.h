// One token of each row of a batch through all blocks of a network, in one parallel region.
#pragma once

#include <cstdint>
#include <vector>

#include "decode.h"

namespace slicegpt {
namespace cpu {

// From one boundary to the next. The inputs write side by side into `room`; attention comes first, and is over
// [v | k | q | z], so that the output projection reads what follows v and k. Pointers to what changes from call to call
// (h, positions, valid, first, slot) are filled in by `run_step`.
struct Block {
    std::vector<NormLinear> inputs;
    bool attends;
    Attention attention;
    int64_t window;  // tokens that a token sees, itself included; 0: all
    RotateAdd output;
};

struct Step {
    Dtype dtype;
    std::vector<Block> blocks;
};

struct Moment {
    const void* h;  // [batch, d] at boundary 0
    int64_t h_stride;
    const int64_t* positions;  // these as in Attention
    const uint8_t* valid;
    int64_t slot;
};

void run_step(const Kernels& kernels, const Step& step, const Moment& moment, int threads);

}  // namespace cpu
}  // namespace slicegpt
