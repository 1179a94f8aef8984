// Runs the forward pass: cuts a call into tiles of rows and chunks of keys, and merges these.

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/schedule/schedule.h"
#include "cpu/schedule/threads.h"
#include "cpu/tile/kernels.h"

namespace fa3npu {
namespace {

constexpr int64_t kRowTile = 960;  // most query rows (position x head of a group) of a tile

std::vector<RowTile> row_tiles(const Attention& a) {
  std::vector<RowTile> tiles;
  for (int64_t b = 0; b < a.batch_size; ++b) {
    const int64_t rows = a.rows(b);
    for (int64_t head = 0; head < a.nheads_k; ++head)
      for (int64_t first = round_up(rows, a.row_tile) - a.row_tile; first >= 0; first -= a.row_tile)
        tiles.push_back({b, head, first, std::min(a.row_tile, rows - first)});  // long rows first
  }
  return tiles;
}

// Many rows share what is loaded of K and V, unless that would leave a thread without work. No
// row's result depends on it.
int64_t choose_row_tile(const Attention& a, int64_t threads) {
  int64_t longest = 1, all = 0;
  for (int64_t b = 0; b < a.batch_size; ++b) {
    const int64_t rows = a.rows(b);
    longest = std::max(longest, rows);
    all += rows * a.nheads_k;
  }
  const int64_t fair = all / (4 * threads) / 96 * 96;
  return std::min(longest, std::clamp<int64_t>(fair, 96, kRowTile));
}

struct Chunks {
  int64_t begin, end;
};

Chunks chunks_of(const Attention& a, const RowTile& t) {
  const KeyRange keys = visible(a, t);
  if (keys.begin >= keys.end) return {0, 0};
  return {keys.begin / kChunk, (keys.end + kChunk - 1) / kChunk};
}

// Few rows: all KV heads of a token, which lie together, are read together, as far as that leaves
// work for every thread. A power of two, so that units of work stay even.
int64_t choose_together(const Attention& a, int64_t threads) {
  constexpr int64_t kMost = 32;
  if (a.qv.data) return 1;
  int64_t chunks = 0;
  for (int64_t b = 0; b < a.batch_size; ++b) {
    const int64_t rows = a.rows(b);
    if (rows > kFewRows) return 1;  // several tiles, or large ones
    if (rows == 0) continue;
    const Chunks seen = chunks_of(a, {b, 0, 0, rows});
    chunks += seen.end - seen.begin;
  }
  int64_t together = 1;
  while (together < kMost && a.nheads_k % (2 * together) == 0 &&
         chunks * a.nheads_k / (2 * together) >= threads)
    together *= 2;
  return together;
}

// A call cut into units of work, of `together` tiles each, and what both ways to run them need.
class Forward {
 public:
  Forward(const Attention& call, int64_t threads) : a_(call), threads_(threads) {
    a_.row_tile = choose_row_tile(a_, threads);
    a_.together = choose_together(a_, threads);
    tiles_ = row_tiles(a_);
    for (size_t i = 0; i < tiles_.size(); i += a_.together)
      chunks_.push_back(chunks_of(a_, tiles_[i]));
    state_bytes_ = k_.state_bytes(a_);
    scratch_bytes_ = k_.forward_bytes(a_);
  }

  void run() const {
    if (tiles_.empty()) return;
    if (units() >= threads_)
      run_units();
    else
      run_chunks();
  }

 private:
  int64_t units() const { return chunks_.size(); }
  const RowTile* tiles_of(int64_t unit) const { return tiles_.data() + unit * a_.together; }

  // Each thread takes whole units.
  void run_units() const {
    const int64_t states = a_.together * state_bytes_;
    run_dynamically(threads_, units(), 2 * states + scratch_bytes_, [&](int64_t i, Memory memory) {
      const Memory total = memory.slice(0, states), part = memory.slice(states, states);
      run_unit(i, total, part, memory.slice(2 * states, scratch_bytes_));
    });
  }

  void run_unit(int64_t i, Memory total, Memory part, Memory scratch) const {
    const RowTile* tiles = tiles_of(i);
    const Chunks chunks = chunks_[i];
    for (int64_t c = chunks.begin; c < chunks.end; ++c) {
      const bool starts = c == chunks.begin;
      k_.forward_chunk(a_, tiles, a_.together, c, starts ? total : part, scratch);
      for (int64_t t = 0; !starts && t < a_.together; ++t)
        k_.merge_state(a_, tiles[t], state(total, t), state(part, t));
    }
    for (int64_t t = 0; t < a_.together; ++t) {
      if (chunks.begin == chunks.end) k_.empty_state(a_, state(total, t));
      k_.finish(a_, tiles[t], state(total, t));
    }
  }

  // Fewer units than threads: chunks in parallel, a wave of them at a time so that memory does not
  // grow with the keys, and merged in the same order.
  void run_chunks() const {
    int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
    for (const Chunks& chunks : chunks_) {
      if (chunks.begin == chunks.end) continue;
      first = std::min(first, chunks.begin);
      last = std::max(last, chunks.end);
    }
    const int64_t wave =
        std::clamp<int64_t>(last - first, 1, (8 * threads_ + units() - 1) / units());
    const int64_t tiles = tiles_.size(), all = tiles * state_bytes_;
    GrowingMemory memory;
    const Memory states = memory.of((1 + wave) * all);
    const Memory totals = states.slice(0, all), parts = states.slice(all, wave * all);
    for (int64_t i = 0; i < tiles; ++i) k_.empty_state(a_, state(totals, i));
    for (; first < last; first += wave) run_wave(first, first + wave, totals, parts);
    run_dynamically(threads_, tiles, 0,
                    [&](int64_t i, Memory) { k_.finish(a_, tiles_[i], state(totals, i)); });
  }

  // The chunks [first, end) of all units. A unit's first chunk goes into its totals.
  void run_wave(int64_t first, int64_t end, Memory totals, Memory parts) const {
    const int64_t states = a_.together * state_bytes_;
    const auto part_of = [&](int64_t unit, int64_t chunk) {
      const bool starts = chunk == chunks_[unit].begin;
      return starts ? totals.part(unit, states)
                    : parts.part(unit * (end - first) + chunk - first, states);
    };
    std::vector<std::pair<int64_t, int64_t>> work;  // (unit, chunk)
    for (int64_t i = 0; i < units(); ++i)
      for (int64_t c = std::max(first, chunks_[i].begin); c < std::min(end, chunks_[i].end); ++c)
        work.push_back({i, c});
    run_dynamically(threads_, work.size(), scratch_bytes_, [&](int64_t i, Memory scratch) {
      const auto [unit, chunk] = work[i];
      k_.forward_chunk(a_, tiles_of(unit), a_.together, chunk, part_of(unit, chunk), scratch);
    });
    run_dynamically(threads_, tiles_.size(), 0, [&](int64_t i, Memory) {
      const int64_t unit = i / a_.together;
      const Chunks chunks = chunks_[unit];
      for (int64_t c = std::max(first, chunks.begin + 1); c < std::min(end, chunks.end); ++c)
        k_.merge_state(a_, tiles_[i], state(totals, i), state(part_of(unit, c), i % a_.together));
    });
  }

  Memory state(Memory states, int64_t i) const { return states.part(i, state_bytes_); }

  Attention a_;
  const Kernels& k_ = kernels(a_);
  int64_t threads_;
  std::vector<RowTile> tiles_;
  std::vector<Chunks> chunks_;  // of each unit
  int64_t state_bytes_, scratch_bytes_;
};

}  // namespace

void attention_forward(const Attention& call) { Forward(call, choose_threads(call)).run(); }

}  // namespace fa3npu
