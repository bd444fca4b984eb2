// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <math.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "decode.h"
#include "scratch.h"

#define SLICEGPT_MASKED_LOADS
#define SLICEGPT_PREFETCH
#define SLICEGPT_EIGHT_SUMS

namespace slicegpt {
namespace cpu {
namespace {

#include "values.h"
#include "simd_avx512.h"
#include "activation.h"
#include "product.h"
#include "attention.h"
#include "kernels.h"
#include "every_dtype.h"
#include "gram_tiles.h"

}  // namespace

const Kernels kAvx512{"avx512",  norm_linear_of,          finish_of,           rotate_add_of, row_sums_of,
                      attend_of, gram_kernels<Doubles>(), gram_kernels<Vec>(), nullptr};

}  // namespace cpu
}  // namespace slicegpt
#endif
