// One call of linear as plain data, out = x weight^T + bias: what the operator builds after
// checking its arguments and what the kernels read.

#pragma once

#include <cstdint>

#include "cpu/attention.h"

namespace fa3npu {

// Rows of numbers, at any strides, in bytes.
struct Matrix {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Undefined;
  int64_t row = 0, col = 0, element = 0;

  char* at(int64_t r, int64_t c) const { return data + r * row + c * col; }
  Matrix from_row(int64_t r) const { return {at(r, 0), dtype, row, col, element}; }
};

struct Linear {
  Matrix x, weight;  // (rows, depth), (columns, depth)
  Matrix bias;       // one row of columns; without data: none
  Matrix out;        // (rows, columns), columns side by side
  int64_t rows, columns, depth;

  Linear of_rows(int64_t first, int64_t count) const {
    Linear part = *this;
    part.x = x.from_row(first);
    part.out = out.from_row(first);
    part.rows = count;
    return part;
  }
};

}  // namespace fa3npu
