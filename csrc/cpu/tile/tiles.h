// AMX's tiles: the instructions that products take, tiles numbered at compile time. gcc 12's
// intrinsics do not say which memory they read.

#pragma once

#include <cstdint>

#include "cpu/tile/isa.h"

#if FA3NPU_AMX
FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

template <int T>
INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
INLINE void tile_load(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(T) : "memory");
}
// Of what is not to fill the nearest cache.
template <int T>
INLINE void tile_load_far(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(T)
                   : "memory");
}
template <int T>
INLINE void tile_store(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
INLINE void tile_multiply_add() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Eight tiles of 64 bytes by 16 rows; those of C and of a single row of tiles of A, the first five,
// may have fewer. Released in the end: they make thread switches dear.
struct ProductState {
  explicit ProductState(int64_t rows = 16) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } tiles;
    for (int i = 0; i < 5; ++i) tiles.rows[i] = rows;
    __asm__ volatile("ldtilecfg %0" ::"m"(tiles));
  }
  ~ProductState() { _tile_release(); }
};

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
#endif
