#include "cpu/written.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/arguments.h"

namespace fa3npu {
namespace {

std::pair<const char*, const char*> span_of(const Tensor& t) {
  const char* begin = static_cast<const char*>(t.data_ptr());
  if (t.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {begin, begin + (last + 1) * element_size(t.scalar_type())};
}

}  // namespace

void check_distinct_elements(const Tensor& t, const char* name) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // (stride, size), shortest first
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != 1) steps.push_back({t.stride(i), t.size(i)});
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;  // from the first to the last element of the dimensions before
  for (const auto [stride, size] : steps) {
    FA3_CHECK(stride > reach || t.numel() == 0, name,
              " must have a place for every element, got elements that share one: shape ",
              shape_of(t), ", a stride of ", stride);
    reach += (size - 1) * stride;
  }
}

bool may_overlap(const Tensor& a, const Tensor& b) {
  const auto [a_begin, a_end] = span_of(a);
  const auto [b_begin, b_end] = span_of(b);
  return a_begin < b_end && b_begin < a_end;
}

void mark_written(const Tensor& t, const char* name) {
  // No element of it is written: but it shares its version with all views of one storage.
  const std::vector<int64_t> none(t.dim(), 0);
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch_as_strided(t.get(), none.data(), none.data(), &view));
  const Tensor empty(view);
  STD_TORCH_CHECK(aoti_torch_zero_(empty.get()) == AOTI_TORCH_SUCCESS, name, " is written: ",
                  "Inplace update to inference tensor outside InferenceMode is not allowed");
}

}  // namespace fa3npu
