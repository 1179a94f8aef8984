// What a kernel does for the tensors that it writes, as PyTorch's own in-place operators do.

#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fa3npu {

// An element has a place of its own: no broadcast dimension, no strides that meet.
void check_distinct_elements(const torch::stable::Tensor& t, const char* name);

// The memory from a tensor's first to its last element.
struct Span {
  const char *begin, *end;

  explicit Span(const torch::stable::Tensor& t);
  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
};

// Raises the version that autograd compares. Before the write: PyTorch refuses an inference tensor
// outside of inference mode.
void mark_written(const torch::stable::Tensor& t, const char* name);

}  // namespace fa3npu
