// The kernels' own checks. They are the last line: fa3_ops/checks.py has the user's messages for
// what can be told from shapes; what needs values is told here and becomes a ValueError in
// fa3_ops/errors.py.

#pragma once

#include <torch/headeronly/util/Exception.h>

// Throws std::runtime_error (RuntimeError in Python) with the rest of the arguments as its text.
#define FA3_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fa3npu: ", __VA_ARGS__)
