// Rotary position embedding of one head vector, in float32 and rounded once.

#pragma once

#include "cpu/ops/arguments.h"

namespace fa3npu {

struct Rotary {
  Rows cos, sin;  // (seqlen_ro, rotary_dim / 2), the dtype of what they rotate or float32
  int64_t positions = 0, dim = 0;
  bool interleaved = true;

  Rotary(const Tensor& rotary_cos, const Tensor& rotary_sin, ScalarType dtype, int64_t headdim,
         bool interleaved);
  void check(int64_t position, int64_t count, int64_t b) const;
  void rotate(const char* from, char* to, ScalarType dtype, int64_t headdim,
              int64_t position) const;
};

// Copies one head vector, rotated if there is a Rotary.
void copy_row(const char* from, char* to, ScalarType dtype, int64_t headdim, const Rotary* rotary,
              int64_t position);

}  // namespace fa3npu
