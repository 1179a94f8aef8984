// Runs linear: arranges some rows of x for all columns, and spreads these over threads.

#include <algorithm>

#include "cpu/linear.h"
#include "cpu/schedule/schedule.h"
#include "cpu/schedule/threads.h"
#include "cpu/tile/kernels.h"

namespace fa3npu {
namespace {

constexpr int64_t kColumns = 48;  // a unit of work is a multiple of so many
constexpr int64_t kRows = 32;     // so many are arranged at a time

void run_rows(const Linear& l, const Kernels& k) {
  thread_local GrowingMemory memory;
  const Memory x = memory.of(k.arranged_bytes(l));
  const int64_t scratch = k.linear_bytes(l), units = (l.rows + kRows - 1) / kRows;
  run_dynamically(choose_threads(double(l.rows) * l.depth), units, scratch,
                  [&](int64_t i, Memory own) { k.arrange_x(l, i * kRows, x, own); });
  const int64_t threads = choose_threads(double(l.rows) * l.depth * l.columns);
  const int64_t columns =
      threads == 1 ? l.columns : round_up(l.columns / (4 * threads) + 1, kColumns);
  run_dynamically(threads, (l.columns + columns - 1) / columns, scratch,
                  [&](int64_t i, Memory own) {
                    const int64_t begin = i * columns;
                    k.linear_columns(l, x, begin, std::min(begin + columns, l.columns), own);
                  });
}

}  // namespace

void linear(const Linear& call) {
  const Kernels& k = kernels(call.x.dtype);
  if (call.columns == 0) return;
  for (int64_t first = 0; first < call.rows; first += k.linear_rows)
    run_rows(call.of_rows(first, std::min(k.linear_rows, call.rows - first)), k);
}

}  // namespace fa3npu
