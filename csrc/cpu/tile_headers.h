// What tile.h needs, included before a tile_*.cpp chooses its instruction set: inline code of these
// headers is shared by all of them and must run on every machine.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/attention.h"

// What lies between these is compiled for an instruction set.
#define FA3NPU_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define FA3NPU_TARGET(features) \
  FA3NPU_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FA3NPU_TARGET_END FA3NPU_PRAGMA(clang attribute pop)
#else
#define FA3NPU_TARGET(features) FA3NPU_PRAGMA(GCC target(features))
#define FA3NPU_TARGET_END
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's intrinsics use them so
#endif

namespace fa3npu {

const float* float8_table();  // the 256 values of float8_e4m3fn
uint16_t float_to_half(float x);

#if defined(__x86_64__)
namespace avx512 {  // what the instruction sets above it share
void forward_chunk(const Attention& a, const RowTile* tiles, int64_t count, int64_t chunk,
                   char* states, char* scratch);
void empty_state(const Attention& a, char* state);
void merge_state(const Attention& a, const RowTile& t, char* into, const char* from);
void finish(const Attention& a, const RowTile& t, const char* state);
void backward_delta(const Attention& a, int64_t sequence, int64_t begin, int64_t end,
                    char* scratch);
void backward_keys(const Attention& a, const KeyTask& task, char* scratch);
}  // namespace avx512
#endif

}  // namespace fa3npu
