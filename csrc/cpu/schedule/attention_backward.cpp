// Runs the backward pass: cuts a call into tiles of keys, which add to dq in turn.

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/attention.h"
#include "cpu/schedule/schedule.h"
#include "cpu/schedule/threads.h"
#include "cpu/tile/kernels.h"

namespace fa3npu {

void KeyTask::wait(int64_t row_tile) const {
  std::atomic<int64_t>& turn = turns[row_tile];
  for (int64_t now; (now = turn.load(std::memory_order_acquire)) != first;)
    turn.wait(now, std::memory_order_acquire);
}

void KeyTask::done(int64_t row_tile) const {
  turns[row_tile].store(end, std::memory_order_release);
  turns[row_tile].notify_all();
}

namespace {

void compute_delta(const Attention& a, int64_t threads) {
  constexpr int64_t kPositions = 32;
  struct Positions {
    int64_t sequence, begin, end;
  };
  std::vector<Positions> work;
  for (int64_t b = 0; b < a.batch_size; ++b)
    for (int64_t i = 0; i < a.sequences[b].q_len; i += kPositions)
      work.push_back({b, i, std::min(i + kPositions, a.sequences[b].q_len)});
  const Kernels& k = kernels(a);
  run_dynamically(threads, work.size(), k.backward_bytes(a), [&](int64_t i, Memory scratch) {
    k.backward_delta(a, work[i].sequence, work[i].begin, work[i].end, scratch);
  });
}

// One sequence and KV head.
struct Head {
  int64_t sequence, head_k, rows, keys;
  int64_t row_tiles_before;  // in its wave
};

int64_t row_tiles_of(const Attention& a, const Head& h) {
  return (h.rows + a.row_tile - 1) / a.row_tile;
}

std::vector<Head> heads_of(const Attention& a) {
  std::vector<Head> heads;
  for (int64_t b = 0; b < a.batch_size; ++b)
    for (int64_t head = 0; head < a.nheads_k; ++head)
      heads.push_back({b, head, a.rows(b), a.sequences[b].k_len, 0});
  return heads;
}

// Large tiles share what is loaded of q and dout, unless that would leave a thread without work. No
// result depends on it.
int64_t choose_key_tile(const std::vector<Head>& heads, int64_t threads) {
  int64_t keys = 0;
  for (const Head& head : heads) keys += head.keys;
  const int64_t fair = keys / (4 * threads) / kKeyTileUnit * kKeyTileUnit;
  return std::clamp(fair, kKeyTileUnit, kKeyTile);
}

// Heads whose dq is summed at the same time.
void run_wave(const Attention& a, int64_t threads, int64_t key_tile, const Head* heads,
              const Head* end, int64_t row_tiles, Memory dq) {
  const Kernels& k = kernels(a);
  const auto dq_of = [&](const Head& h) {
    const int64_t bytes = k.dq_bytes(a);
    return dq.slice(h.row_tiles_before * bytes, row_tiles_of(a, h) * bytes);
  };
  std::vector<std::atomic<int64_t>> turns(row_tiles);
  for (const Head* h = heads; h < end; ++h)
    for (int64_t row = 0; row < h->rows; row += a.row_tile) {
      const RowTile t{h->sequence, h->head_k, row, std::min(a.row_tile, h->rows - row)};
      turns[h->row_tiles_before + row / a.row_tile] = visible(a, t).begin / key_tile * key_tile;
    }
  std::vector<KeyTask> tasks;
  for (const Head *some = heads, *some_end; some < end; some = some_end) {  // one for each thread
    some_end = some + std::min<int64_t>(threads, end - some);
    int64_t most_keys = 0;
    for (const Head* h = some; h < some_end; ++h) most_keys = std::max(most_keys, h->keys);
    for (int64_t key = 0; key < most_keys; key += key_tile)
      for (const Head* h = some; h < some_end; ++h)
        if (key < h->keys)
          tasks.push_back({h->sequence, h->head_k, key, std::min(key + key_tile, h->keys),
                           dq_of(*h), turns.data() + h->row_tiles_before});
  }
  // Started in this order, so that no task waits for one that has no thread.
  run_dynamically(threads, tasks.size(), k.backward_bytes(a),
                  [&](int64_t i, Memory scratch) { k.backward_keys(a, tasks[i], scratch); });
}

}  // namespace

void attention_backward(const Attention& call) {
  constexpr int64_t kRows = 256, kWaveBytes = 4 << 20;  // for each thread
  Attention a = call;
  const int64_t threads = choose_threads(a);
  std::vector<Head> heads = heads_of(a);
  int64_t most_rows = 0;
  for (const Head& h : heads) most_rows = std::max(most_rows, h.rows);
  a.row_tile = std::clamp<int64_t>(round_up(most_rows, 32), 32, kRows);
  if (most_rows > 0) compute_delta(a, threads);

  const int64_t key_tile = choose_key_tile(heads, threads);
  const int64_t tile_bytes = kernels(a).dq_bytes(a);
  const Head* const end = heads.data() + heads.size();
  GrowingMemory dq;
  for (Head *first = heads.data(), *last; first < end; first = last) {
    int64_t row_tiles = 0;
    const auto fits = [&] { return row_tiles * tile_bytes < threads * kWaveBytes; };
    for (last = first; last < end && (last - first < threads || fits()); ++last) {
      last->row_tiles_before = row_tiles;
      row_tiles += row_tiles_of(a, *last);
    }
    run_wave(a, threads, key_tile, first, last, row_tiles, dq.of(row_tiles * tile_bytes));
  }
}

}  // namespace fa3npu
