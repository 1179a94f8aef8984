#include "cpu/tile/baseline.h"

#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#include <array>

#include "check.h"

namespace fa3npu {

const float* float8_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values;
    for (int i = 0; i < 256; ++i)
      values[i] = c10::Float8_e4m3fn(uint8_t(i), c10::Float8_e4m3fn::from_bits());
    return values;
  }();
  return table.data();
}

uint16_t float_to_half(float x) { return c10::Half(x).x; }

void beyond_plan(int64_t wanted, int64_t planned) {
  STD_TORCH_CHECK(false, "fa3npu: a kernel wants ", wanted, " bytes of memory, more than the ",
                  planned, " planned");
}

}  // namespace fa3npu
