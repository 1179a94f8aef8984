// The kernels' own checks. A plain call meets no others: what fa3_ops/ops/checks.py refuses, which
// has the user's messages for what can be told from shapes, must be refused here, before anything
// is written. What needs values is told here and becomes a ValueError in fa3_ops/ops/errors.py.

#pragma once

#include <torch/headeronly/util/Exception.h>

// Throws std::runtime_error (RuntimeError in Python) with the rest of the arguments as its text.
#define FA3_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fa3npu: ", __VA_ARGS__)
