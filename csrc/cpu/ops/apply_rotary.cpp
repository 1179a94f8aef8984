// apply_rotary on CPU: row i of sequence b is rotated at rotary_seqlens[b] + i, or at
// rotary_seqlens[b] for every row if advance is false.

#include <torch/csrc/stable/library.h>

#include "cpu/ops/rotary.h"

namespace fa3npu {
namespace {

Tensor apply_rotary(Tensor x_, Tensor rotary_cos, Tensor rotary_sin, Tensor rotary_seqlens_,
                    MaybeTensor cu_seqlens_, bool rotary_interleaved, bool advance) {
  const bool packed = cu_seqlens_.has_value();
  FA3_CHECK(x_.dim() == (packed ? 3 : 4), "x must have ", packed ? 3 : 4, " dimensions, got ",
            shape_of(x_));
  check_attention_dtype(x_.scalar_type(), "x");
  const Tensor x = contiguous_rows(x_);
  const int64_t headdim = x.size(-1), nheads = x.size(-2);
  const int64_t batch = packed ? cu_seqlens_->size(0) - 1 : x.size(0);
  const Rotary rotary(rotary_cos, rotary_sin, x.scalar_type(), headdim, rotary_interleaved);
  const Lengths rotary_seqlens(rotary_seqlens_, batch, "rotary_seqlens");
  const Lengths cu_seqlens(cu_seqlens_, batch + 1, "cu_seqlens_q");

  struct Row {
    int64_t batch, row, position;
  };
  std::vector<Row> rows;
  for (int64_t b = 0; b < batch; ++b) {
    if (packed) check_segment(cu_seqlens, b, x.size(0), "cu_seqlens_q");
    const int64_t begin = packed ? cu_seqlens[b] : 0;
    const int64_t count = packed ? cu_seqlens[b + 1] - begin : x.size(1);
    rotary.check(rotary_seqlens[b], advance ? count : std::min<int64_t>(count, 1), b);
    for (int64_t i = 0; i < count; ++i)
      rows.push_back({b, begin + i, rotary_seqlens[b] + (advance ? i : 0)});
  }

  std::vector<int64_t> shape;
  int64_t total = 1;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  for (int64_t i = 0; i < x.dim() - 2; ++i) total *= x.size(i);
  Tensor y = torch::stable::new_empty(x, shape);
  if (int64_t(rows.size()) < total) torch::stable::copy_(y, x);  // rows that no sequence owns
  const Rows from = rows_of(x), to = rows_of(y);
  torch::stable::parallel_for(0, rows.size(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t h = 0; h < nheads; ++h)
        rotary.rotate(from.at(rows[r].batch, rows[r].row, h), to.at(rows[r].batch, rows[r].row, h),
                      from.dtype, headdim, rows[r].position);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CPU, m) { m.impl("apply_rotary", TORCH_BOX(&apply_rotary)); }

}  // namespace fa3npu
