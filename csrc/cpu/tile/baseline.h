// What the kernels of every instruction set call: compiled once, for any machine.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace fa3npu {

// The values of the 256 codes of a dtype of 8 bits: float8_e4m3fn, float8_e5m2, int8.
const float* narrow_values(torch::headeronly::ScalarType dtype);
uint16_t float_to_half(float x);

// Throws: a kernel wants more memory than was planned for it.
[[noreturn]] void beyond_plan(int64_t wanted, int64_t planned);

// Memory that knows its end.
struct Memory {
  char* at;
  int64_t bytes;

  Memory slice(int64_t begin, int64_t size) const {
    if (begin + size > bytes) beyond_plan(begin + size, bytes);
    return {at + begin, size};
  }
  Memory part(int64_t i, int64_t size) const { return slice(i * size, size); }
};

}  // namespace fa3npu
