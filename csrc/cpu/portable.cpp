// The kernels for any processor.
#include <math.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "decode.h"
#include "scratch.h"

namespace slicegpt {
namespace cpu {
namespace {

#include "values.h"
#include "simd_portable.h"
#include "activation.h"
#include "product.h"
#include "attention.h"
#include "kernels.h"
#include "every_dtype.h"
#include "gram_tiles.h"

}  // namespace

const Kernels kPortable{"portable", norm_linear_of,          finish_of,           rotate_add_of, row_sums_of,
                        attend_of,  gram_kernels<Doubles>(), gram_kernels<Vec>(), nullptr};

}  // namespace cpu
}  // namespace slicegpt
