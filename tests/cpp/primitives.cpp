// The primitives of one instruction set, against double and against what they promise bit for bit.
// Compiled once for each, as the kernels are: -DFA3NPU_FOR_AVX2. Prints the greatest errors of the
// exponential; returns 1 if anything is wrong.

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cfloat>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/tile/baseline.h"
#include "cpu/tile/convert.h"
#include "cpu/tile/isa.h"
#include "cpu/tile/product.h"
#include "cpu/tile/vector.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {
namespace {

// Not __FMA__: no compiler defines it after a pragma.
#if defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = FA3NPU_BYTES > 16;
#endif

int failures = 0;

__attribute__((format(printf, 2, 3))) void check(bool ok, const char* format, ...) {
  if (ok || ++failures > 20) return;
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::puts("");
}

template <class T>
bool same(const T& a, const T& b) {  // bits
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class To, class From>
To as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof(To));
  return to;
}

double uniform() {  // in [-1, 1)
  static std::mt19937 generator(0);
  return generator() / 2147483648.0 - 1;
}

double ulps(float got, double want) {  // of float at `want`
  return std::abs(got - want) / std::ldexp(1.0, std::max(std::ilogb(want), -126) - 23);
}

// Numbers in [low, high], evenly spaced ones and ones with evenly spaced bits.
std::vector<float> samples(float low, float high) {
  constexpr int kCount = 1 << 21;
  std::vector<float> x = {low, high};
  for (int i = 0; i < kCount; ++i) x.push_back(float(low + (double(high) - low) * i / kCount));
  for (uint32_t bits = 0; bits < 0x7f800000u; bits += 0x80000000u / kCount + 6)
    for (const float y : {as<float>(bits), -as<float>(bits)})
      if (low <= y && y <= high) x.push_back(y);
  while (x.size() % kLanes<float>) x.push_back(low);
  return x;
}

template <class F, class Want>
void check_ulps(const char* name, double bound, float low, float high, const F& f,
                const Want& want) {
  double worst = 0;
  float worst_at = 0;
  const std::vector<float> x = samples(low, high);
  for (size_t i = 0; i < x.size(); i += kLanes<float>) {
    float y[kLanes<float>];
    store(y, f(vec(&x[i])));
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
      const double error = ulps(y[lane], want(double(x[i + lane])));
      if (error > worst || std::isnan(error)) worst = error, worst_at = x[i + lane];
      if (std::isnan(error)) break;
    }
    if (std::isnan(worst)) break;
  }
  std::printf("%-28s %.4f ulp at %.9g\n", name, worst, worst_at);
  check(worst <= bound, "%s: more than %g ulp", name, bound);
}

// Every rounding is where the source has one: the compiler fuses nothing, multiply_add does.
template <class T>
void test_roundings() {
  constexpr int64_t L = kLanes<T>;
  const auto alone = [](T x, T y, T z) {
    const volatile T product = x * y;
    return T(product + z);
  };
  for (int round = 0; round < 1000; ++round) {
    T x[L], y[L], z[L], written[L], fused[L];
    for (int64_t i = 0; i < L; ++i)
      x[i] = T(uniform()), y[i] = T(uniform()), z[i] = -x[i] * y[i];  // what is left is a rounding
    store(written, vec(x) * vec(y) + vec(z));
    store(fused, multiply_add(vec(x), vec(y), vec(z)));
    for (int64_t i = 0; i < L; ++i) {
      check(same(T(x[i] * y[i] + z[i]), alone(x[i], y[i], z[i])), "a sum of numbers is fused");
      check(same(written[i], alone(x[i], y[i], z[i])), "a sum of vectors is fused");
      check(same(fused[i], kFused ? std::fma(x[i], y[i], z[i]) : written[i]), "multiply_add");
    }
  }
}

struct Case {
  float x, want;
};
const float nan_ = std::numeric_limits<float>::quiet_NaN();

// f at one lane, whatever stands in the others; `alone` computes it by itself.
template <class F, class Alone>
void check_cases(const char* name, const F& f, const Alone& alone, const std::vector<Case>& cases) {
  for (const auto& [x, want] : cases)
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
      float in[kLanes<float>], out[kLanes<float>];
      for (int64_t i = 0; i < kLanes<float>; ++i) in[i] = i == lane ? x : float(-i);
      store(out, f(vec(in)));
      const bool right = std::isnan(want) ? std::isnan(out[lane]) : same(out[lane], want);
      check(right, "%s(%g) is %g, not %g", name, x, out[lane], want);
      check(same(alone(x), out[lane]), "%s(%g) has other bits alone", name, x);
    }
}

// f of doubles in [-range, range] is the library's, bit for bit.
template <class F, class Want>
void check_doubles(const char* name, double range, const F& f, const Want& want) {
  double x[kLanes<double>], y[kLanes<double>];
  for (int i = 0; i < 1000; ++i) {
    for (double& one : x) one = range * uniform();
    store(y, f(vec(x)));
    for (int64_t lane = 0; lane < kLanes<double>; ++lane)
      check(same(y[lane], want(x[lane])), "%s of double at %g", name, x[lane]);
  }
}

template <class U>
void test_exp2(const char* name, double bound) {
  const auto exp2 = [](const Vec<float>& x) { return exp2_<U>(x); };
  check_ulps(name, bound, -126.0f, 127.4f, exp2, [](double x) { return std::exp2(x); });
  check_cases(name, exp2, [](float x) { return exp2_<U>(x); },
              {{0, 1},
               {-0.0f, 1},
               {FLT_MIN, 1},
               {-1e-42f, 1},
               {-1, 0.5f},
               {3, 8},
               {-126.0f, FLT_MIN},
               {-kInf, 0},
               {-127.0f, 0},
               {-150.0f, 0},
               {-1e9f, 0},
               {-FLT_MAX, 0},
               {129.0f, kInf},
               {1e9f, kInf},
               {FLT_MAX, kInf},
               {kInf, kInf},
               {nan_, nan_},
               {-nan_, nan_}});
  check_doubles(
      name, 1000, [](const Vec<double>& x) { return exp2_<double>(x); },
      [](double x) { return std::exp2(x); });
}

void test_softcapped() {
  for (const float softcap : {0.5f, 15.0f, 30.0f, 50.0f}) {
    char name[64];
    std::snprintf(name, sizeof(name), "softcap %g tanh(x / %g)", softcap, softcap);
    check_ulps(
        name, 6, 1e-30f, 30 * softcap, [&](const Vec<float>& x) { return softcapped(x, softcap); },
        [&](double x) { return softcap * std::tanh(x / softcap); });
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (const auto& [x, want] : {std::pair(kInf, softcap), {1e30f, softcap}, {0.0f, 0.0f}}) {
      check(softcapped(Vec<float>{} + x, softcap)[0] == want, "softcapped(%g, %g)", x, softcap);
      check(softcapped(Vec<float>{} - x, softcap)[0] == -want, "softcapped(-%g, %g)", x, softcap);
    }
    check(std::isnan(softcapped(Vec<float>{} + nan, softcap)[0]), "softcapped(nan, %g)", softcap);
    for (int i = 0; i < 1000; ++i) {
      const float x = 5 * softcap * float(uniform());
      check(ulps(softcapped(Vec<float>{} + x, softcap)[0],
                 softcap * std::tanh(double(x) / softcap)) <= 6,
            "softcapped(%g, %g)", x, softcap);
      check(softcapped(Vec<double>{} + x, double(softcap))[0] ==
                double(softcap) * std::tanh(double(x) / softcap),
            "softcapped of double (%g, %g)", x, softcap);
    }
  }
}

template <class T>
void test_reductions() {
  constexpr int64_t L = kLanes<T>;
  for (int round = 0; round < 100; ++round) {
    T x[L][L];
    Vec<T> rows[L];
    for (auto& row : x)
      for (T& one : row) one = T(std::ldexp(uniform(), round % 20));
    for (int64_t i = 0; i < L; ++i) rows[i] = vec(x[i]);
    const Vec<T> sum = sums<T>(rows), maximum = maxima<T>(rows);
    for (int64_t i = 0; i < L; ++i) {
      long double want = 0, size = 0;
      for (const T one : x[i]) want += one, size += std::abs(one);
      check(std::abs(sum[i] - want) <= L * std::numeric_limits<T>::epsilon() * size,
            "lane %d of sums", int(i));
      check(maximum[i] == *std::max_element(x[i], x[i] + L), "lane %d of maxima", int(i));

      // the same row in another lane, beside other rows
      const int64_t other = (i + round) % L;
      const T beside[] = {T(kInf), -T(kInf), std::numeric_limits<T>::quiet_NaN(), T(round)};
      for (int64_t j = 0; j < L; ++j)
        rows[j] = j == other ? vec(x[i]) : Vec<T>{} + beside[(j + round) % 4];
      check(same<T>(sums<T>(rows)[other], sum[i]), "a sum depends on other rows or its lane");
      check(same<T>(maxima<T>(rows)[other], maximum[i]), "a maximum depends on other rows");
      for (int64_t j = 0; j < L; ++j) rows[j] = vec(x[j]);
    }
  }
}

template <class U>
void test_transpose() {
  typedef std::conditional_t<sizeof(U) == 4, uint32_t, uint64_t> Bits;
  constexpr int64_t L = kLanes<U>, ld = L + 3;
  const auto bits = [](int64_t i, int64_t j) { return Bits(1 + i * L + j) * Bits(0x01010101); };
  U from[L][L], to[L * ld];
  for (int64_t i = 0; i < L; ++i)
    for (int64_t j = 0; j < L; ++j) from[i][j] = as<U>(bits(i, j));
  std::memset(static_cast<void*>(to), 0xee, sizeof(to));
  transpose<U>([&](int64_t i) { return vec(from[i]); }, to, ld);
  for (int64_t j = 0; j < L; ++j)
    for (int64_t i = 0; i < ld && j * ld + i < L * ld; ++i) {
      const Bits want = i < L ? bits(i, j) : Bits(0xeeeeeeeeeeeeeeeeu);
      check(as<Bits>(to[j * ld + i]) == want, "transpose at %d, %d", int(j), int(i));
    }
}

// ---- conversions ----

// The value of a 16-bit float with `mantissa` bits; past the greatest finite one, what would
// follow.
double decode(int bits, int mantissa) {
  const int exponent = (bits & 0x7fff) >> mantissa, bias = (1 << (14 - mantissa)) - 1;
  const int fraction = bits & ((1 << mantissa) - 1);
  const double magnitude = exponent == 0
                               ? std::ldexp(fraction, 1 - bias - mantissa)
                               : std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  return bits & 0x8000 ? -magnitude : magnitude;
}

struct Format {
  const char* name;
  ScalarType dtype;
  int mantissa;
  int infinity() const { return 0x7fff >> mantissa << mantissa; }
  float value(int bits) const {
    const int magnitude = bits & 0x7fff;
    if (magnitude > infinity()) return std::numeric_limits<float>::quiet_NaN();
    if (magnitude == infinity()) return bits & 0x8000 ? -kInf : kInf;
    return float(decode(bits, mantissa));
  }
};
const Format kHalf = {"float16", ScalarType::Half, 10};
const Format kBFloat16 = {"bfloat16", ScalarType::BFloat16, 7};

bool same_or_nan(float a, float b) { return std::isnan(a) ? std::isnan(b) : same(a, b); }

template <class From, class Scalar>
void test_loads(const Format& format, const Scalar& scalar) {
  constexpr int L = kLanes<float>;
  for (int first = 0; first < 65536; first += L) {
    uint16_t bits[L + 1];
    float row[L + 1], y[L];
    for (int i = 0; i <= L; ++i) bits[i] = uint16_t(first + i);
    store(y, From::vector(reinterpret_cast<const char*>(bits)));
    load_row<float>(reinterpret_cast<const char*>(bits), format.dtype, L + 1, row);
    for (int i = 0; i < L; ++i) {
      const float want = format.value(first + i);
      check(same_or_nan(y[i], want), "%s %04x as a vector: %g", format.name, first + i, y[i]);
      check(same_or_nan(scalar(bits[i]), want), "%s %04x alone", format.name, first + i);
      check(same_or_nan(row[i], want), "%s %04x in a row", format.name, first + i);
    }
    check(same_or_nan(row[L], format.value(bits[L])), "%s: the row's last", format.name);
  }
}

struct NarrowFormat {
  const char* name;
  ScalarType dtype;
  int mantissa, bias, largest;  // the largest finite magnitude's code; mantissa 0: whole numbers
  float value(int code) const {
    if (mantissa == 0) return float(int8_t(code));
    const int magnitude = code & 0x7f, exponent = magnitude >> mantissa;
    const int fraction = magnitude - (exponent << mantissa);
    if (magnitude > largest && (fraction || mantissa == 3)) return NAN;
    const double one = std::ldexp(1, exponent ? exponent - bias : 1 - bias);
    const double x = one * ((exponent ? 1 : 0) + std::ldexp(fraction, -mantissa));
    return float(magnitude > largest ? kInf : x) * (code & 0x80 ? -1 : 1);
  }
};
const NarrowFormat kNarrowFormats[] = {{"float8_e4m3fn", ScalarType::Float8_e4m3fn, 3, 7, 0x7e},
                                       {"float8_e5m2", ScalarType::Float8_e5m2, 2, 15, 0x7b},
                                       {"int8", ScalarType::Char, 0, 0, 0}};

// What converts after it has put codes in order: the bits of one vector after another.
template <class From>
void test_codes(const char* codes) {
  (void)codes;
#if FA3NPU_BFLOAT16
  if constexpr (kOfCodes<From>) {
    const char* rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = codes + i;
    const Interleaved<Pair> want = interleaved(From::vector(codes), From::vector(codes + 5));
    const Interleaved<Pair> got = From::interleaved(codes, codes + 5);
    check(same(got.first, want.first) && same(got.last, want.last), "two rows, interleaved");
    Vec<Pair> x[8], y[16];
    From::transposed(rows, 0, x);
    for (int i = 0; i < 16; ++i) y[i] = From::vector(rows[i]);
    transpose_square<Pair>(y);
    for (int i = 0; i < 8; ++i) check(same(x[i], y[i]), "pair %d of 16 rows", i);
  }
#endif
}

// Every code of 8 bits: in the table, as a vector, in rows of any length.
template <class U>
void test_narrow_loads() {
  constexpr int N = kLanes<U> * kDepth<U>;
  for (const NarrowFormat& format : kNarrowFormats) {
    char codes[256 + 2 * N + 1];
    for (size_t i = 0; i < sizeof(codes); ++i) codes[i] = char(i);
    const auto check_units = [&](const U* got, int first, int count, const char* how) {
      for (int i = 0; i < count; ++i) {
        const float x = number(got[i / kDepth<U>], i % kDepth<U>);
        const float want = format.value(uint8_t(first + i));
        check(same_or_nan(x, want), "%s %02x %s: %g, not %g", format.name, (first + i) % 256, how,
              x, want);
      }
    };
    for (int first = 0; first < 256; ++first) {
      check(same_or_nan(narrow_values(format.dtype)[first], format.value(first)),
            "%s %02x in the table", format.name, first);
      U to[2 * kLanes<U> + 1];
      const bool read = with_reader<U>(format.dtype, [&](auto reader) {
        check(reader.kElements == N && reader.kBytes == 1, "a vector's size");
        store(to, reader.vector(codes + first));
        test_codes<decltype(reader)>(codes + first);
      });
      check(read, "%s has no reader", format.name);
      check_units(to, first, N, "as a vector");
      for (const int n : {1, N - 1, N + 1, 2 * N}) {
        load_row<U>(codes + first, format.dtype, n, to);
        check_units(to, first, n, "in a row");
        check(n % kDepth<U> == 0 || number(to[n / 2], 1) == 0, "a half pair's zero");
      }
    }
  }
}

// Every 16-bit float, the points halfway between neighbours and their neighbours, of both signs:
// what to round, and what that gives.
struct Rounding {
  std::vector<float> x;
  std::vector<uint16_t> want;
};

Rounding roundings(const Format& format, bool ties_to_even) {
  Rounding cases;
  const auto add = [&](double x, int want) {
    for (const int sign : {0, 0x8000}) {
      cases.x.push_back(sign ? -float(x) : float(x));
      cases.want.push_back(uint16_t(want | sign));
    }
  };
  for (int bits = 0; bits < format.infinity(); ++bits) {
    const double here = decode(bits, format.mantissa), next = decode(bits + 1, format.mantissa);
    const float halfway = float((here + next) / 2);
    add(here, bits);
    add(std::nextafter(halfway, 0.0f), bits);
    add(halfway, ties_to_even && bits % 2 == 0 ? bits : bits + 1);
    add(std::nextafter(halfway, kInf), bits + 1);
  }
  add(kInf, format.infinity());
  while (cases.x.size() % 32) add(0, 0);
  return cases;
}

void test_stores(const Format& format) {
  const Rounding cases = roundings(format, true);
  const int64_t size = cases.x.size();
  const std::vector<double> doubles(cases.x.begin(), cases.x.end());
  std::vector<float> halves(size);
  for (int64_t i = 0; i < size; ++i) halves[i] = cases.x[i] / 2;
  for (const int64_t n : {1, 16, 31}) {  // a vector's, those left over, both
    std::vector<uint16_t> got(size), of_double(size);
    for (int64_t i = 0; i < size; i += n) {
      const int64_t count = std::min(n, size - i);
      store_row<float>(&cases.x[i], 1, format.dtype, count, reinterpret_cast<char*>(&got[i]));
      store_row<double>(&doubles[i], 1, format.dtype, count,
                        reinterpret_cast<char*>(&of_double[i]));
    }
    for (int64_t i = 0; i < size; ++i) {
      check(got[i] == cases.want[i], "%.9g is stored as %s %04x, not %04x, in rows of %d",
            cases.x[i], format.name, got[i], cases.want[i], int(n));
      check(of_double[i] == cases.want[i], "double %.9g is stored as %s %04x", cases.x[i],
            format.name, of_double[i]);
    }
  }
  for (int bits = 0; bits < 65536; ++bits) {  // there and back, NaN included, with a scale
    const float value = format.value(bits), x[17] = {value / 2};
    if (value != 0 && std::abs(value) < FLT_MIN) continue;  // half of it is not exact
    uint16_t got[17];
    float row[17];
    std::fill_n(row, 17, x[0]);
    store_row<float>(row, 2, format.dtype, 17, reinterpret_cast<char*>(got));
    for (const int i : {0, 16})
      check(same_or_nan(format.value(got[i]), value), "%s %04x comes back as %04x", format.name,
            bits, got[i]);
  }
}

void test_rows() {
  constexpr int n = 37;
  double x[n], doubles[n];
  float floats[n];
  for (int i = 0; i < n; ++i) x[i] = uniform();
  store_row<double>(x, 2, ScalarType::Double, n, reinterpret_cast<char*>(doubles));
  store_row<double>(x, 2, ScalarType::Float, n, reinterpret_cast<char*>(floats));
  for (int i = 0; i < n; ++i)
    check(doubles[i] == 2 * x[i] && floats[i] == float(2 * x[i]), "store_row of double");
  double back[n];
  load_row<double>(reinterpret_cast<const char*>(doubles), ScalarType::Double, n, back);
  check(std::memcmp(back, doubles, sizeof(back)) == 0, "load_row of double");
  load_row<double>(reinterpret_cast<const char*>(floats), ScalarType::Float, n, back);
  check(std::equal(back, back + n, floats), "load_row of float");

  Pair pairs[n / 2 + 2];
  std::memset(pairs, 0xee, sizeof(pairs));
  load_row<Pair>(reinterpret_cast<const char*>(floats), ScalarType::BFloat16, n, pairs);
  check(std::memcmp(pairs, floats, 2 * n) == 0, "load_row of pairs");
  check(pairs[n / 2].second == 0 && pairs[n / 2 + 1].first == 0xeeee, "a half pair's zero");
}

template <class U>
void test_all_finite() {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<U>;
  std::vector<U> x(7 * L);
  const auto set = [](U& unit, int64_t half, float value) {
    if constexpr (kDepth<U> == 2)
      (half ? unit.second : unit.first) = uint16_t(as<uint32_t>(value) >> 16);
    else
      unit = T(value);
  };
  for (const int64_t n : {L, 4 * L, 7 * L})
    for (int64_t i = 0; i < n; ++i)
      for (int64_t half = 0; half < kDepth<U>; ++half) {
        for (const float bad : {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()}) {
          set(x[i], half, bad);
          check(!all_finite(x.data(), n), "all_finite overlooks %g at %d of %d", bad, int(i),
                int(n));
        }
        set(x[i], half, half ? -FLT_MAX : FLT_MAX);
        check(all_finite(x.data(), n), "all_finite at %d of %d", int(i), int(n));
      }
}

#if FA3NPU_BFLOAT16
void test_pairs() {
  constexpr int L = kLanes<float>;
  Rounding cases = roundings(kBFloat16, false);
  for (const float nan : {NAN, -NAN}) cases.x.push_back(nan), cases.want.push_back(0);
  while (cases.x.size() % (2 * L)) cases.x.push_back(1), cases.want.push_back(0x3f80);
  for (size_t i = 0; i < cases.x.size(); i += 2 * L) {
    const float *x = &cases.x[i], *y = x + L;
    uint16_t in_order[2 * L];
    Pair side_by_side[L];
    narrow(vec(x), vec(y), reinterpret_cast<Pair*>(in_order));
    store(side_by_side, pair_up(vec(x), vec(y)));
    for (int j = 0; j < 2 * L; ++j) {
      const Pair pair = side_by_side[j % L];
      for (const uint16_t got : {in_order[j], j < L ? pair.first : pair.second})
        check(std::isnan(x[j]) ? std::isnan(bfloat16_to_float(got)) : got == cases.want[i + j],
              "%.9g is rounded to %04x, not %04x", x[j], got, cases.want[i + j]);
    }
  }
  uint16_t a[2 * L], b[2 * L];
  Pair to[2 * L];
  for (int i = 0; i < 2 * L; ++i) a[i] = uint16_t(i), b[i] = uint16_t(1000 + i);
  interleave(vec(reinterpret_cast<Pair*>(a)), vec(reinterpret_cast<Pair*>(b)), to);
  for (int i = 0; i < 2 * L; ++i)
    check(to[i].first == a[i] && to[i].second == b[i], "interleave at %d", i);
}
#endif

// ---- products ----

template <class U>
U random_unit() {
  if constexpr (kDepth<U> == 2)
    return {float_to_bfloat16(float(uniform())), float_to_bfloat16(float(uniform()))};
  else
    return U(uniform());
}

// A [rows][depth] and B [depth][columns], with the room that products want and with zeros in A past
// its depth. B's go on: nothing may come of them.
template <class U>
struct Operands {
  typedef Sum<U> T;
  int64_t rows, columns, depth, ld;
  std::vector<U> a, transposed, b;
  std::vector<T> c;

  Operands(int64_t rows, int64_t columns, int64_t depth)
      : rows(rows),
        columns(columns),
        depth(depth),
        ld(round_up(depth + 1, 16)),
        a(round_up(rows, 32) * ld),
        transposed(a.size()),
        b(ld * columns),
        c(round_up(rows, 32) * columns) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < depth; ++k)
        a[r * ld + k] = transposed[k * rows + r] = random_unit<U>();
    for (U& one : b) one = random_unit<U>();
    for (T& one : c) one = T(uniform());
  }

  Left<U> left(bool transpose) const {
    return transpose ? Left<U>{transposed.data(), 1, rows} : Left<U>{a.data(), ld, 1};
  }

  // C of `count` rows from r and `width` columns from n
  std::vector<T> run(int64_t r, int64_t count, int64_t n, int64_t width, int64_t depth,
                     bool transpose, bool accumulate) const {
    std::vector<T> out = c;
    product<U>(count, width, depth, left(transpose).from_row(r), b.data() + n, columns,
               out.data() + r * columns + n, columns, accumulate);
    return out;
  }
};

template <class U>
void test_product() {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<U>, kRows = 33, kColumns = 8 * L;
  const ProductState state;
  for (const int64_t depth : {1, 5, 16, 67})
    for (const bool accumulate : {false, true}) {
      const Operands<U> x(kRows, kColumns, depth);
      const auto all = x.run(0, kRows, 0, kColumns, depth, false, accumulate);
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t n = 0; n < kColumns; ++n) {
          const T start = accumulate ? x.c[r * kColumns + n] : T(0), got = all[r * kColumns + n];
          T in_order = start;
          long double want = start, size = std::abs(start);
          for (int64_t k = 0; k < depth; ++k)
            for (int64_t half = 0; half < kDepth<U>; ++half) {
              const T a = number(x.a[r * x.ld + k], half), b = number(x.b[k * kColumns + n], half);
              in_order = kFused ? std::fma(a, b, in_order) : in_order + a * b;
              want += (long double)a * b;
              size += std::abs((long double)a * b);
            }
          check(std::abs(got - want) <= 2 * depth * std::numeric_limits<T>::epsilon() * size,
                "product of depth %d at %d, %d", int(depth), int(r), int(n));
          if (kDepth<U> == 1)
            check(got == in_order, "product of depth %d: not in order, or not fused", int(depth));
        }

      // Whatever part of it a call computes, an element has the same bits.
      const auto compare = [&](int64_t r, int64_t rows, int64_t n, int64_t columns,
                               bool transpose) {
        const auto part = x.run(r, rows, n, columns, depth, transpose, accumulate);
        for (int64_t i = 0; i < int64_t(part.size()); ++i) {
          const int64_t row = i / kColumns, column = i % kColumns;
          const bool inside = row >= r && row < r + rows && column >= n && column < n + columns;
          if (FA3NPU_AMX && row >= r + rows) continue;  // these mean nothing
          check(same(part[i], inside ? all[i] : x.c[i]),
                "%s %d, %d: %d rows from %d, %d columns from %d, depth %d%s",
                inside ? "bits of" : "written:", int(row), int(column), int(rows), int(r),
                int(columns), int(n), int(depth), transpose ? ", transposed" : "");
        }
      };
      for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33})
        for (const int64_t vectors : {1, 2, 3, 5, 8})
          for (const bool transpose : {false, true}) {
            if (FA3NPU_AMX && transpose) continue;  // not offered
            compare(0, rows, 0, vectors * L, transpose);
            if (rows < 8)
              compare(kRows - rows, rows, kColumns - vectors * L, vectors * L, transpose);
          }

      const auto longer = x.run(0, kRows, 0, kColumns, depth + 1, false, accumulate);
      check(std::equal(all.begin(), all.begin() + kRows * kColumns, longer.begin()),
            "depth %d: adding zeros changes bits", int(depth));
    }
}

#if FA3NPU_AMX
// The product of many rows and few columns: the bits of its parts, and with the sides exchanged.
void test_four_rows_of_tiles() {
  constexpr int64_t kRows = 64, kColumns = 16;
  const ProductState state;
  for (const int64_t depth : {16, 48}) {
    const Operands<Pair> x(kRows, kColumns, depth);
    std::vector<float> got(kRows * kColumns), want(got), exchanged(got);
    product<Pair>(kRows, kColumns, depth, x.left(false), x.b.data(), kColumns, got.data(), kColumns,
                  false);
    for (int64_t r = 0; r < kRows; r += 16)
      product<Pair>(16, kColumns, depth, x.left(false).from_row(r), x.b.data(), kColumns,
                    &want[r * kColumns], kColumns, false);
    check(std::equal(got.begin(), got.end(), want.begin()), "four rows of tiles");

    std::vector<Pair> b(kColumns * depth);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < kColumns; ++n) b[n * depth + k] = x.b[k * kColumns + n];
    product<Pair>(kColumns, kRows, depth, {b.data(), depth, 1}, x.transposed.data(), kRows,
                  exchanged.data(), kRows, false);
    for (int64_t i = 0; i < kRows * kColumns; ++i)
      check(same(got[i], exchanged[i % kColumns * kRows + i / kColumns]), "sides exchanged");
  }
}
#endif

// Rows that see only the first keys, with infinities and NaN in B.
template <class U>
void test_masked_product() {
  typedef Sum<U> T;
  constexpr int64_t L = kLanes<U>, rows = 7, columns = 2 * L, depth = 21, keys = depth * kDepth<U>;
  const ProductState state;
  Operands<U> x(rows, columns, depth);
  const auto sees = [](int64_t r, int64_t key) { return key < (r + 1) * keys / rows; };
  const auto set = [](U& unit, int64_t half, float value) {
    if constexpr (kDepth<U> == 2)
      (half ? unit.second : unit.first) = float_to_bfloat16(value);
    else
      unit = value;
  };
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t key = 0; key < keys; ++key)
      if (!sees(r, key)) clear(x.a[r * x.ld + key / kDepth<U>], key % kDepth<U>);
  for (int64_t k = depth; k < x.ld; ++k)  // "zero past the end"
    for (int64_t n = 0; n < columns; ++n) x.b[k * columns + n] = U{};
  std::vector<U> spare(x.b.size());
  const auto add = [&](const std::vector<U>& b) {
    std::vector<T> out = x.c;
    add_product<U>(rows, columns, depth, x.left(false), b.data(), out.data(), columns,
                   all_finite(b.data(), depth * columns), spare.data(), sees);
    return out;
  };
  const std::vector<T> finite = add(x.b);
  check(std::equal(finite.begin(), finite.begin() + rows * columns,
                   x.run(0, rows, 0, columns, depth, false, true).begin()),
        "add_product of a finite B");

  std::vector<U> b = x.b, zero = x.b;
  const float bad[] = {kInf, -kInf, std::numeric_limits<float>::quiet_NaN()};
  for (int64_t i = 0; i < columns; i += 2) {  // every other column, one or two of them in each
    for (const int64_t key : {keys - 1 - i % keys, (7 * i) % keys}) {
      set(b[key / kDepth<U> * columns + i], key % kDepth<U>, bad[i / 2 % 3]);
      set(zero[key / kDepth<U> * columns + i], key % kDepth<U>, 0);
    }
  }
  const std::vector<U> before = b;
  const std::vector<T> got = add(b), clean = add(zero);
  check(std::memcmp(before.data(), b.data(), sizeof(U) * b.size()) == 0, "add_product writes B");
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < columns; ++n) {
      T want = x.c[r * columns + n];
      for (int64_t key = 0; key < keys; ++key)
        if (sees(r, key))
          want += number(x.a[r * x.ld + key / kDepth<U>], key % kDepth<U>) *
                  number(b[key / kDepth<U> * columns + n], key % kDepth<U>);
      const T y = got[r * columns + n];
      check(std::isfinite(want) ? same(y, clean[r * columns + n])
            : std::isnan(want)  ? std::isnan(y)
                                : y == want,
            "masked product at %d, %d: %g, not %g", int(r), int(n), double(y), double(want));
    }
}

int run() {
#if FA3NPU_AMX && defined(__linux__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // as in kernels.cpp: may this process use tiles?
#endif
  std::puts(FA3NPU_NAME);
  test_roundings<float>();
  test_roundings<double>();
  test_exp2<float>("exp2", kFused ? 0.95 : 1.2);
  test_exp2<Pair>("exp2 of Pairs", 2.2);
  test_softcapped();
  test_reductions<float>();
  test_reductions<double>();
  test_transpose<float>();
  test_transpose<double>();
  test_loads<FromHalf>(kHalf, [](uint16_t h) { return half_to_float(h); });
  test_loads<FromBFloat16>(kBFloat16, [](uint16_t h) { return bfloat16_to_float(h); });
  test_stores(kHalf);
  test_stores(kBFloat16);
  test_narrow_loads<float>();
  test_rows();
  test_all_finite<float>();
  test_all_finite<double>();
#if FA3NPU_AMX
  test_four_rows_of_tiles();
#endif
#if FA3NPU_BFLOAT16
  test_transpose<Pair>();
  test_narrow_loads<Pair>();
  test_pairs();
  test_all_finite<Pair>();
  test_product<Pair>();
  test_masked_product<Pair>();
#else
  test_product<float>();
  test_product<double>();
  test_masked_product<float>();
  test_masked_product<double>();
#endif
  std::printf("%d failures\n", failures);
  return failures > 0;
}

}  // namespace
}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END

int main() { return fa3npu::FA3NPU_ISA::run(); }

FA3NPU_TARGET_TEMPLATES
