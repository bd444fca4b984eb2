// Which tokens a fast kernel takes, which it hands over to the float64 kernel, and which are absent.
#pragma once

#include "gram.h"

namespace slicegpt {

enum Fate : uint8_t { kTaken = 0, kHandedOver = 1, kAbsent = 2 };

// By weight: 1 is taken, 0 absent, everything else handed over. A null weight takes all.
int select_by_weight(const double* weight, int64_t tokens, uint8_t* fates, cudaStream_t stream);

// Appends first + i, for all i with fates[i] == kHandedOver in increasing order, to `rows` after the *count
// rows there.
int append_handed_over(const uint8_t* fates, int64_t tokens, int64_t first, int* rows, int* count, cudaStream_t stream);

}  // namespace slicegpt
