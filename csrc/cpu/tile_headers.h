// What tile.h needs, included before a tile_*.cpp chooses its instruction set: inline code of these
// headers is shared by all of them and must run on every machine.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>

#include "cpu/attention.h"

namespace fa3npu {

const float* float8_table();  // the 256 values of float8_e4m3fn
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

}  // namespace fa3npu
