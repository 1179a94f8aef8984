// The attention loops over one tile of query rows. tile_*.cpp compile this file once per
// instruction set, each in its own namespace; the vectors are the compiler's, as wide as a
// register.
//
// Bits: an element of a product is always summed in the order of its index, a row's softmax never
// mixes with another row's, and masked keys add exact zeros. So a row's result does not depend on
// the tile, the batch or the thread that computed it.

// No include guard and no other includes: see tile_*.cpp.

// clang-format off
#include "cpu/vector.h"
#include "cpu/convert.h"
#include "cpu/product.h"
#include "cpu/operands.h"
#include "cpu/softmax.h"
#include "cpu/decode.h"
#include "cpu/forward.h"
#include "cpu/backward.h"
// clang-format on

// Where bfloat16 has products of its own, all other dtypes are AVX512's.
#if FA3NPU_BFLOAT16
#define FA3NPU_RUN(kernel, ...) \
  (a.q.dtype == ScalarType::BFloat16 ? kernel##_<Pair> : avx512::kernel)(a, __VA_ARGS__)
#define FA3NPU_RUN_SUMS(kernel, ...) avx512::kernel(a, __VA_ARGS__)
#else
#define FA3NPU_RUN(kernel, ...) \
  (a.is_double() ? kernel##_<double> : kernel##_<float>)(a, __VA_ARGS__)
#define FA3NPU_RUN_SUMS FA3NPU_RUN
#endif

void forward_chunk(const Attention& a, const RowTile* tiles, int64_t count, int64_t chunk,
                   char* states, char* scratch) {
  FA3NPU_RUN(forward_chunk, tiles, count, chunk, states, scratch);
}
void empty_state(const Attention& a, char* state) { FA3NPU_RUN_SUMS(empty_state, state); }
void merge_state(const Attention& a, const RowTile& t, char* into, const char* from) {
  FA3NPU_RUN_SUMS(merge_state, t, into, from);
}
void finish(const Attention& a, const RowTile& t, const char* state) {
  FA3NPU_RUN_SUMS(finish, t, state);
}
void backward_delta(const Attention& a, int64_t sequence, int64_t begin, int64_t end,
                    char* scratch) {
  FA3NPU_RUN(backward_delta, sequence, begin, end, scratch);
}
void backward_keys(const Attention& a, const KeyTask& task, char* scratch) {
  FA3NPU_RUN(backward_keys, task, scratch);
}

extern const Kernels table;
const Kernels table = {FA3NPU_NAME, forward_chunk,  empty_state,  merge_state,
                       finish,      backward_delta, backward_keys};
