// The kernels of an instruction set, and the work that the schedule hands them.

#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "cpu/attention.h"
#include "cpu/linear.h"
#include "cpu/tile/baseline.h"

namespace fa3npu {

constexpr int64_t kKeyTile = 512;      // most keys whose dk and dv are computed together,
constexpr int64_t kKeyTileUnit = 128;  // which are a multiple of this many
constexpr int64_t kFewRows = 16;       // a tile of at most so many is computed as in a decode

// Up to row_tile query rows of one sequence and one KV head. Row r is position r / group of head
// head_k * group + r % group, so that all heads of a group share what is loaded of K and V.
struct RowTile {
  int64_t sequence, head_k, first, rows;
};

inline KeyRange visible(const Attention& a, const RowTile& t) {
  const Sequence& s = a.sequences[t.sequence];
  const KeyRange first = a.visible(s, t.first / a.group());
  const KeyRange last = a.visible(s, (t.first + t.rows - 1) / a.group());
  return {first.begin, last.end};
}

// The backward's tile of keys, [first, end) of one sequence and KV head.
struct KeyTask {
  int64_t sequence, head_k, first, end;
  Memory dq;                    // the sums of all rows of the sequence and KV head, by row tile
  std::atomic<int64_t>* turns;  // by row tile: the first key that its dq has not yet

  void wait(int64_t row_tile) const;
  void done(int64_t row_tile) const;
};

// One list for all instruction sets. A state is a partial result: for each row its maximum, sum and
// unscaled output. All memory is uninitialised, and as large as the call's tiles want it:
struct Kernels {
  int64_t (*state_bytes)(const Attention& a);     // of each state; a multiple of 64, as the others
  int64_t (*forward_bytes)(const Attention& a);   // of forward_chunk's scratch
  int64_t (*backward_bytes)(const Attention& a);  // of backward_delta's and backward_keys'
  int64_t (*dq_bytes)(const Attention& a);        // of the sums of a row tile

  void (*forward_chunk)(const Attention& a, const RowTile* tiles, int64_t count, int64_t chunk,
                        Memory states, Memory scratch);
  void (*empty_state)(const Attention& a, Memory state);
  void (*merge_state)(const Attention& a, const RowTile& t, Memory into, Memory from);
  void (*finish)(const Attention& a, const RowTile& t, Memory state);
  void (*backward_delta)(const Attention& a, int64_t sequence, int64_t begin, int64_t end,
                         Memory scratch);
  void (*backward_keys)(const Attention& a, const KeyTask& task, Memory scratch);

  int64_t linear_rows;                         // most rows of x in the following's calls
  int64_t (*arranged_bytes)(const Linear& l);  // of all rows of x
  int64_t (*linear_bytes)(const Linear& l);    // of both functions' scratch
  // Some rows of x, from `first` on, as linear_columns takes them.
  void (*arrange_x)(const Linear& l, int64_t first, Memory x, Memory scratch);
  void (*linear_columns)(const Linear& l, Memory x, int64_t begin, int64_t end, Memory scratch);
};

// One head vector of 16 or 32 bits as a narrow cache has it, see quantise.h.
using Quantise = void (*)(const char* from, ScalarType dtype, int64_t n, float descale,
                          ScalarType to_dtype, char* to);

// By what is multiplied. All but float64 and, in some sets, bfloat16 is float32. A set without
// kernels for it leaves it to AVX512's.
struct InstructionSet {
  const char* name;
  const Kernels *bfloat16, *float32, *float64;
  Quantise quantise;
};

#if defined(__x86_64__)
extern const InstructionSet kAmx, kAvx512Bf16, kAvx512, kAvx2;
#endif
extern const InstructionSet kPortable;

// For a call, of the best set that this machine runs or the one FA3NPU_CPU_CAPABILITY names.
const Kernels& kernels(const Attention& a);
const Kernels& kernels(ScalarType dtype);
Quantise quantise_kernel();
std::string cpu_capability();    // that set
std::string cpu_capabilities();  // all that this machine runs, best first

}  // namespace fa3npu
