// How a call is spread over threads, and their memory.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/attention.h"
#include "cpu/tile/baseline.h"

namespace fa3npu {

// As many threads as have at least some microseconds of work each.
inline int64_t choose_threads(double multiplications) {
  constexpr double kLeastWork = 1 << 18;
  return std::clamp<int64_t>(multiplications / kLeastWork, 1, torch::stable::get_num_threads());
}

inline int64_t choose_threads(const Attention& a) {
  double work = 0;
  for (int64_t b = 0; b < a.batch_size; ++b)
    work += double(a.sequences[b].q_len) * (a.sequences[b].k_len - a.sequences[b].k_first);
  return choose_threads(work * a.nheads * (a.headdim + a.headdim_v));
}

// Memory that only grows; what it held is lost then.
class GrowingMemory {
 public:
  Memory of(int64_t bytes) {
    if (size_ < bytes) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64))));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return {memory_.get(), bytes};
  }

 private:
  std::unique_ptr<char, decltype(&std::free)> memory_{nullptr, &std::free};
  int64_t size_ = 0;
};

inline Memory thread_scratch(int64_t bytes) {  // that a thread keeps between calls
  thread_local GrowingMemory memory;
  return memory.of(bytes);
}

// Calls work(i, scratch) for i in [0, count), each on whichever thread is free next.
template <class F>
void run_dynamically(int64_t threads, int64_t count, int64_t scratch_bytes, const F& work) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  const auto loop = [&](int64_t, int64_t) {
    const Memory scratch = thread_scratch(scratch_bytes);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, scratch);
  };
  threads = std::min(threads, count);
  if (threads == 1)
    loop(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, loop);
}

}  // namespace fa3npu
