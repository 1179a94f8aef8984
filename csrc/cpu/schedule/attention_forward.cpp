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

int64_t scratch_bytes(const Attention& a) {   // the most that any kernel takes
  const int64_t keys = 4 * 288 * a.widths();  // rows, spare, transposed and strips of a panel
  const int64_t rows = a.row_capacity() * (a.widths() + 16) + kFewRows * (256 + a.widths());
  return a.sum_size() * (keys + a.together * rows + 4 * 96 * 128) + 65536;
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

}  // namespace

int64_t state_bytes(const Attention& a) {
  return round_up(a.sum_size() * (a.row_capacity() * (2 + a.state_ld()) + 64), 64);
}

void attention_forward(const Attention& call) {
  const Kernels& k = kernels(call.q.dtype);
  const int64_t threads = choose_threads(call);
  Attention a = call;
  a.row_tile = choose_row_tile(a, threads);
  a.together = choose_together(a, threads);
  const auto tiles = row_tiles(a);
  if (tiles.empty()) return;
  const int64_t state = state_bytes(a), together = a.together, states = together * state;
  const int64_t units = tiles.size() / together;  // of `together` tiles each
  const auto tiles_of = [&](int64_t unit) { return tiles.data() + unit * together; };
  std::vector<Chunks> chunks_of_unit;
  for (int64_t i = 0; i < units; ++i) chunks_of_unit.push_back(chunks_of(a, *tiles_of(i)));

  if (units >= threads) {
    run_dynamically(threads, units, 2 * states + scratch_bytes(a), [&](int64_t i, char* scratch) {
      char *total = scratch, *part = scratch + states, *rest = scratch + 2 * states;
      const RowTile* unit = tiles_of(i);
      const Chunks chunks = chunks_of_unit[i];
      for (int64_t c = chunks.begin; c < chunks.end; ++c) {
        k.forward_chunk(a, unit, together, c, c == chunks.begin ? total : part, rest);
        for (int64_t t = 0; c > chunks.begin && t < together; ++t)
          k.merge_state(a, unit[t], total + t * state, part + t * state);
      }
      for (int64_t t = 0; t < together; ++t) {
        if (chunks.begin == chunks.end) k.empty_state(a, total + t * state);
        k.finish(a, unit[t], total + t * state);
      }
    });
    return;
  }

  // Fewer units than threads: chunks in parallel, a wave of them at a time so that memory does not
  // grow with the keys, and merged in the same order.
  int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
  for (const Chunks& chunks : chunks_of_unit) {
    if (chunks.begin == chunks.end) continue;
    first = std::min(first, chunks.begin);
    last = std::max(last, chunks.end);
  }
  const int64_t wave = std::clamp<int64_t>(last - first, 1, (8 * threads + units - 1) / units);
  const int64_t bytes = (1 + wave) * units * states;
  const Memory memory = aligned_memory(bytes);
  char *totals = memory.get(), *parts = totals + units * states;
  for (int64_t i = 0; i < int64_t(tiles.size()); ++i) k.empty_state(a, totals + i * state);
  for (; first < last; first += wave) {
    std::vector<std::pair<int64_t, int64_t>> work;  // (unit, chunk)
    for (int64_t i = 0; i < units; ++i) {
      const Chunks chunks = chunks_of_unit[i];
      for (int64_t c = std::max(first, chunks.begin); c < std::min(first + wave, chunks.end); ++c)
        work.push_back({i, c});
    }
    const auto part_of = [&](int64_t unit, int64_t chunk) {
      const bool starts = chunk == chunks_of_unit[unit].begin;  // the total
      return starts ? totals + unit * states : parts + (unit * wave + chunk - first) * states;
    };
    run_dynamically(threads, work.size(), scratch_bytes(a), [&](int64_t i, char* scratch) {
      const auto [unit, chunk] = work[i];
      k.forward_chunk(a, tiles_of(unit), together, chunk, part_of(unit, chunk), scratch);
    });
    run_dynamically(threads, tiles.size(), 0, [&](int64_t i, char*) {
      const int64_t unit = i / together, offset = i % together * state;
      const Chunks chunks = chunks_of_unit[unit];
      for (int64_t c = std::max(first, chunks.begin + 1); c < std::min(first + wave, chunks.end);
           ++c)
        k.merge_state(a, tiles[i], totals + i * state, part_of(unit, c) + offset);
    });
  }
  run_dynamically(threads, tiles.size(), 0,
                  [&](int64_t i, char*) { k.finish(a, tiles[i], totals + i * state); });
}

}  // namespace fa3npu
