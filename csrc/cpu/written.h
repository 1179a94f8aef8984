// What a kernel does for the tensors that it writes, as PyTorch's own in-place operators do.

#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fa3npu {

// An element has a place of its own: no broadcast dimension, no strides that meet.
void check_distinct_elements(const torch::stable::Tensor& t, const char* name);

// Whether the memory that two tensors span has a byte in common.
bool may_overlap(const torch::stable::Tensor& a, const torch::stable::Tensor& b);

// Raises the version that autograd compares. Before the write: PyTorch refuses an inference tensor
// outside of inference mode.
void mark_written(const torch::stable::Tensor& t, const char* name);

}  // namespace fa3npu
