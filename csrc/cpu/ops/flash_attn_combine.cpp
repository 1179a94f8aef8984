// flash_attn_combine on CPU: merges partial outputs (num_splits, ..., nheads, headdim) by their LSE
// (num_splits, ..., nheads), in the order of the splits.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "cpu/ops/arguments.h"

namespace fa3npu {
namespace {

std::tuple<Tensor, Tensor> flash_attn_combine(Tensor out_partial_, Tensor lse_partial,
                                              std::optional<ScalarType> out_dtype) {
  const int64_t dim = out_partial_.dim();
  FA3_CHECK(dim == 4 || dim == 5, "out_partial must have shape (num_splits, batch_size, seqlen, ",
            "nheads, headdim) or (num_splits, total_q, nheads, headdim), got ",
            shape_of(out_partial_));
  FA3_CHECK(lse_partial.dim() == dim - 1, "lse_partial must have the shape of out_partial without ",
            "headdim, got ", shape_of(lse_partial));
  for (int64_t i = 0; i < dim - 1; ++i)
    FA3_CHECK(lse_partial.size(i) == out_partial_.size(i),
              "lse_partial must have the shape of out_partial without headdim, got ",
              shape_of(lse_partial));
  FA3_CHECK(out_partial_.scalar_type() == ScalarType::Float &&
                lse_partial.scalar_type() == ScalarType::Float,
            "out_partial and lse_partial must have dtype torch.float32");
  const ScalarType dtype = out_dtype.value_or(ScalarType::Float);
  FA3_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "out_dtype must be torch.float32, torch.float16 or torch.bfloat16");

  const Tensor out_partial = contiguous_rows(out_partial_);
  const int64_t splits = out_partial.size(0), batch = dim == 5 ? out_partial.size(1) : 1;
  const int64_t seqlen = out_partial.size(-3), nheads = out_partial.size(-2),
                headdim = out_partial.size(-1);
  std::vector<int64_t> shape, lse_shape;
  if (dim == 5) shape = {batch}, lse_shape = {batch};
  shape.insert(shape.end(), {seqlen, nheads, headdim});
  lse_shape.insert(lse_shape.end(), {nheads, seqlen});
  const Tensor sum = torch::stable::new_empty(out_partial, shape, ScalarType::Float);
  const Tensor lse = torch::stable::transpose(
      torch::stable::new_empty(lse_partial, lse_shape, ScalarType::Float), -2, -1);

  const int64_t out_batch = dim == 5 ? out_partial.stride(1) : 0;
  const int64_t lse_batch = dim == 5 ? lse_partial.stride(1) : 0;
  const float* out_data = out_partial.const_data_ptr<float>();
  const float* lse_data = lse_partial.const_data_ptr<float>();
  float* to = sum.mutable_data_ptr<float>();
  float* to_lse = lse.mutable_data_ptr<float>();
  constexpr float kInf = std::numeric_limits<float>::infinity();

  torch::stable::parallel_for(0, batch * seqlen * nheads, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / (seqlen * nheads), i = r / nheads % seqlen, h = r % nheads;
      const float* row =
          out_data + b * out_batch + i * out_partial.stride(-3) + h * out_partial.stride(-2);
      const float* row_lse =
          lse_data + b * lse_batch + i * lse_partial.stride(-2) + h * lse_partial.stride(-1);
      const auto lse_of = [&](int64_t split) {  // FlashAttention-2 says +inf where no key is seen
        const float x = row_lse[split * lse_partial.stride(0)];
        return x == kInf ? -kInf : x;
      };
      float maximum = -kInf, total = 0;
      for (int64_t s = 0; s < splits; ++s) maximum = std::max(maximum, lse_of(s));
      const float base = maximum == -kInf ? 0 : maximum;
      for (int64_t s = 0; s < splits; ++s) total += std::exp(lse_of(s) - base);
      float* out = to + r * headdim;
      for (int64_t c = 0; c < headdim; ++c) out[c] = 0;
      for (int64_t s = 0; s < splits; ++s) {
        const float weight = std::exp(lse_of(s) - base) / total;
        if (!(weight != 0) || total == 0) continue;  // an empty part may hold anything
        for (int64_t c = 0; c < headdim; ++c) out[c] += weight * row[s * out_partial.stride(0) + c];
      }
      to_lse[(b * nheads + h) * seqlen + i] = base + std::log(total);
    }
  });
  return {dtype == ScalarType::Float ? sum : torch::stable::to(sum, dtype), lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CPU, m) {
  m.impl("flash_attn_combine", TORCH_BOX(&flash_attn_combine));
}

}  // namespace fa3npu
