// AMX's tiles in memory, as Intel's manual describes them, for tests on machines without them and
// for sanitizers, which see no access of the real ones: `make test-amx`. What the processor would
// refuse ends the process.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cpu/tile/convert.h"

#if FA3NPU_AMX
FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

struct Tile {
  int64_t rows;  // 0: not configured
  Pair row[16][16];
};
inline thread_local Tile tiles[8];

INLINE void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX would refuse an instruction: %s\n", what);
  std::abort();
}

template <int T>
INLINE Tile& configured() {
  expect(tiles[T].rows > 0, "tiles are not configured");
  return tiles[T];
}

// Not inlined: instructions are many, and what sanitizers add to each takes minutes to compile.
template <int T>
__attribute__((noinline)) void tile_zero() {
  Tile& tile = configured<T>();
  tile = {tile.rows, {}};
}
template <int T>
__attribute__((noinline)) void tile_load(const void* from, int64_t row_bytes) {
  tile_zero<T>();
  for (int64_t r = 0; r < tiles[T].rows; ++r)
    __builtin_memcpy(tiles[T].row[r], static_cast<const char*>(from) + r * row_bytes, 64);
}
template <int T>
void tile_load_far(const void* from, int64_t row_bytes) {
  tile_load<T>(from, row_bytes);
}
template <int T>
__attribute__((noinline)) void tile_store(void* to, int64_t row_bytes) {
  const Tile& tile = configured<T>();
  for (int64_t r = 0; r < tile.rows; ++r)
    __builtin_memcpy(static_cast<char*>(to) + r * row_bytes, tile.row[r], 64);
}

// First and second numbers of pairs are summed apart, then both and C.
template <int C, int A, int B>
__attribute__((noinline)) void tile_multiply_add() {
  static_assert(C != A && C != B && A != B);
  Tile& c = configured<C>();
  const Tile &a = configured<A>(), &b = configured<B>();
  expect(c.rows == a.rows && b.rows == 16, "a product of tiles of other shapes");
  for (int64_t r = 0; r < c.rows; ++r) {
    Vec<float> first{}, second{};
    for (int64_t k = 0; k < 16; ++k) {
      const auto x = splat(a.row[r][k]), y = vec<Pair>(b.row[k]);
      const auto multiply_half = [](const auto& x, const auto& y, const Vec<float>& sum) {
        return flushed(multiply_add(flushed((Vec<float>)x), flushed((Vec<float>)y), sum));
      };
      first = multiply_half(x << 16, y << 16, first);
      second = multiply_half(x & ~0xffff, y & ~0xffff, second);
    }
    float* const sums = reinterpret_cast<float*>(c.row[r]);
    store<float>(sums, flushed(flushed(vec<float>(sums)) + flushed(first + second)));
  }
}

// As the real one.
struct ProductState {
  explicit ProductState(int64_t rows = 16) {
    expect(tiles[0].rows == 0, "tiles are configured already");
    expect(0 < rows && rows <= 16, "a tile has 1 to 16 rows");
    for (int i = 0; i < 8; ++i) tiles[i] = {i < 5 ? rows : 16, {}};
  }
  ~ProductState() {
    for (Tile& tile : tiles) tile = {};
  }
};

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
#endif
