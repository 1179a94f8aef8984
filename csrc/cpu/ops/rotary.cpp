#include "cpu/ops/rotary.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

namespace fa3npu {

namespace {

// Calls f with a value of the C++ type of dtype.
template <class F>
void with_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return f(c10::BFloat16());
    case ScalarType::Half:
      return f(c10::Half());
    case ScalarType::Float8_e4m3fn:
      return f(c10::Float8_e4m3fn());
    case ScalarType::Float:
      return f(float());
    default:
      return f(double());
  }
}

template <class T>
struct Wider {
  using type = float;
};
template <>
struct Wider<double> {
  using type = double;
};

}  // namespace

Rotary::Rotary(const Tensor& rotary_cos, const Tensor& rotary_sin, ScalarType dtype,
               int64_t headdim, bool interleaved)
    : interleaved(interleaved) {
  check_attention_dtype(dtype, "k", " to be rotated");
  FA3_CHECK(rotary_cos.dim() == 2, "rotary_cos must have shape (seqlen_ro, rotary_dim / 2), got ",
            shape_of(rotary_cos));
  FA3_CHECK(shape_of(rotary_sin) == shape_of(rotary_cos), "rotary_sin must have the shape of ",
            "rotary_cos, ", shape_of(rotary_cos), ", got ", shape_of(rotary_sin));
  FA3_CHECK(rotary_cos.scalar_type() == dtype || rotary_cos.scalar_type() == ScalarType::Float,
            "rotary_cos must have the dtype of q or float32, got ",
            torch::headeronly::toString(rotary_cos.scalar_type()));
  FA3_CHECK(rotary_sin.scalar_type() == rotary_cos.scalar_type(),
            "rotary_sin must have the dtype of rotary_cos, got ",
            torch::headeronly::toString(rotary_sin.scalar_type()));
  dim = rotary_cos.size(1) * 2;
  FA3_CHECK(dim <= headdim, "rotary_dim must be at most headdim, ", headdim, ", got ", dim);
  FA3_CHECK((rotary_cos.stride(1) == 1 && rotary_sin.stride(1) == 1) || dim <= 2,
            "rotary_cos and rotary_sin must have a contiguous last dimension");
  positions = rotary_cos.size(0);
  const auto rows = [](const Tensor& t) {
    Rows r;
    r.data = static_cast<char*>(t.data_ptr());
    r.dtype = t.scalar_type();
    with_type(r.dtype, [&](auto x) { r.row = t.stride(0) * int64_t(sizeof(x)); });
    return r;
  };
  cos = rows(rotary_cos);
  sin = rows(rotary_sin);
}

void Rotary::check(int64_t position, int64_t count, int64_t b) const {
  if (count == 0) return;
  FA3_CHECK(position >= 0 && position + count <= positions, "rotary_cos must reach position ",
            position + count - 1, " of sequence ", b, ", got ", positions, " positions");
}

void Rotary::rotate(const char* from_, char* to_, ScalarType dtype, int64_t headdim,
                    int64_t position) const {
  with_type(dtype, [&](auto x) {
    using T = decltype(x);
    using W = typename Wider<T>::type;
    const auto turn = [&](auto table) {
      using C = decltype(table);
      const T* from = reinterpret_cast<const T*>(from_);
      T* to = reinterpret_cast<T*>(to_);
      const C* c = reinterpret_cast<const C*>(cos.at(0, position, 0));
      const C* s = reinterpret_cast<const C*>(sin.at(0, position, 0));
      const int64_t half = dim / 2, step = interleaved ? 2 : 1, partner = interleaved ? 1 : half;
      for (int64_t i = 0; i < half; ++i) {
        const W a = static_cast<W>(from[i * step]), b = static_cast<W>(from[i * step + partner]);
        const W cos_i = static_cast<W>(c[i]), sin_i = static_cast<W>(s[i]);
        to[i * step] = static_cast<T>(a * cos_i - b * sin_i);
        to[i * step + partner] = static_cast<T>(a * sin_i + b * cos_i);
      }
      std::memcpy(to + dim, from + dim, (headdim - dim) * sizeof(T));
    };
    if (cos.dtype == ScalarType::Float) return turn(float());
    turn(x);
  });
}

void copy_row(const char* from, char* to, ScalarType dtype, int64_t headdim, const Rotary* rotary,
              int64_t position) {
  if (rotary) return rotary->rotate(from, to, dtype, headdim, position);
  std::memcpy(to, from, headdim * element_size(dtype));
}

}  // namespace fa3npu
