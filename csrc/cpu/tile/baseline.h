// What the kernels of every instruction set call: compiled once, for any machine.

#pragma once

#include <cstdint>

namespace fa3npu {

const float* float8_table();  // the 256 values of float8_e4m3fn
uint16_t float_to_half(float x);

}  // namespace fa3npu
