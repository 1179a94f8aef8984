// What the kernels of every instruction set call: compiled once, for any machine.

#pragma once

#include <cstdint>

namespace fa3npu {

const float* float8_table();  // the 256 values of float8_e4m3fn
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
