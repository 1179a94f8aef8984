#include "cpu/ops/written.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/ops/arguments.h"

namespace fa3npu {

Span::Span(const Tensor& t) : begin(static_cast<const char*>(t.data_ptr())), end(begin) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return;
    last += (sizes[i] - 1) * strides[i];
  }
  end += (last + 1) * element_size(t.scalar_type());
}

void check_distinct_elements(const Tensor& t, const char* name) {
  if (t.is_contiguous()) return;
  std::vector<std::pair<int64_t, int64_t>> steps;  // (stride, size), shortest first
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != 1) steps.push_back({t.stride(i), t.size(i)});
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;  // from the first to the last element of the dimensions before
  for (const auto& [stride, size] : steps) {
    FA3_CHECK(stride > reach || t.numel() == 0, name,
              " must have a place for every element, got elements that share one: shape ",
              shape_of(t), ", a stride of ", stride);
    reach += (size - 1) * stride;
  }
}

void mark_written(const Tensor& t, const char* name) {
  // A copy onto itself copies nothing, but is a write in the eyes of autograd.
  STD_TORCH_CHECK(aoti_torch_copy_(t.get(), t.get(), 0) == AOTI_TORCH_SUCCESS, name,
                  " is written: Inplace update to inference tensor outside InferenceMode is not "
                  "allowed");
}

}  // namespace fa3npu
