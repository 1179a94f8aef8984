// linear on CPU: out = x weight^T + bias, x (..., K), weight (N, K), bias (N,), at any strides.

#include <torch/csrc/stable/library.h>

#include "cpu/linear.h"
#include "cpu/ops/arguments.h"
#include "cpu/schedule/schedule.h"

namespace fa3npu {
namespace {

void check_like_x(const Tensor& t, const Tensor& x, const char* name) {
  FA3_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x, ",
            torch::headeronly::toString(x.scalar_type()), ", got ",
            torch::headeronly::toString(t.scalar_type()));
}

Matrix matrix_of(const Tensor& t) {  // a vector is one row
  const int64_t element = element_size(t.scalar_type());
  const int64_t row = t.dim() > 1 ? t.stride(-2) * element : 0;
  return {static_cast<char*>(t.data_ptr()), t.scalar_type(), row, t.stride(-1) * element, element};
}

Tensor linear_(Tensor x, Tensor weight, MaybeTensor bias) {
  const ScalarType dtype = x.scalar_type();
  FA3_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float ||
                dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
            "x must be float64, float32, float16 or bfloat16, got ",
            torch::headeronly::toString(dtype));
  FA3_CHECK(x.dim() >= 1, "x must have a dimension at least, got ", shape_of(x));
  FA3_CHECK(weight.dim() == 2 && weight.size(1) == x.size(-1), "weight must have shape (N, ",
            x.size(-1), "), got ", shape_of(weight));
  check_like_x(weight, x, "weight");
  if (bias) {
    FA3_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must have shape (",
              weight.size(0), ",), got ", shape_of(*bias));
    check_like_x(*bias, x, "bias");
  }
  Linear l;
  l.columns = weight.size(0);
  l.depth = weight.size(1);
  l.rows = 1;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    shape.push_back(x.size(i));
    l.rows *= x.size(i);
  }
  shape.push_back(l.columns);
  // Rows at any distance, but only one.
  const Tensor rows = x.dim() == 2 ? x : torch::stable::reshape(x, {l.rows, l.depth});
  Tensor out = empty(shape, dtype);
  l.x = matrix_of(rows);
  l.weight = matrix_of(weight);
  if (bias) l.bias = matrix_of(*bias);
  l.out = matrix_of(out);
  l.out.row = l.columns * l.out.element;
  linear(l);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CPU, m) { m.impl("linear", TORCH_BOX(&linear_)); }

}  // namespace fa3npu
