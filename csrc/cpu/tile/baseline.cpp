#include "cpu/tile/baseline.h"

#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Float8_e5m2.h>
#include <torch/headeronly/util/Half.h>

#include <array>

#include "check.h"

namespace fa3npu {

namespace {

using torch::headeronly::ScalarType;

// of a dtype whose numbers `make` gives
template <class Make>
std::array<float, 256> values_of(const Make& make) {
  std::array<float, 256> values;
  for (int code = 0; code < 256; ++code) values[code] = float(make(uint8_t(code)));
  return values;
}

}  // namespace

const float* narrow_values(ScalarType dtype) {
  using c10::Float8_e4m3fn, c10::Float8_e5m2;
  static const auto e4m3 =
      values_of([](uint8_t x) { return Float8_e4m3fn(x, Float8_e4m3fn::from_bits()); });
  static const auto e5m2 =
      values_of([](uint8_t x) { return Float8_e5m2(x, Float8_e5m2::from_bits()); });
  static const auto int8 = values_of([](uint8_t x) { return int8_t(x); });
  return (dtype == ScalarType::Float8_e4m3fn ? e4m3
          : dtype == ScalarType::Float8_e5m2 ? e5m2
                                             : int8)
      .data();
}

uint16_t float_to_half(float x) { return c10::Half(x).x; }

void beyond_plan(int64_t wanted, int64_t planned) {
  STD_TORCH_CHECK(false, "fa3npu: a kernel wants ", wanted, " bytes of memory, more than the ",
                  planned, " planned");
}

}  // namespace fa3npu
