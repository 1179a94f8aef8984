// A kernel's memory has an end: with what is planned it succeeds, with less it throws, and it never
// writes past the end. Compiled once for each instruction set, as the kernels are, and called as
// the schedule calls them. Returns 1 if anything is wrong.

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <list>
#include <stdexcept>
#include <vector>

#include "cpu/tile/instruction_set.h"

namespace fa3npu {

void KeyTask::wait(int64_t) const {}  // one task at a time
void KeyTask::done(int64_t) const {}

namespace {

int failures = 0;

void check(bool ok, const char* kernel, const char* what, int64_t bytes, int64_t planned) {
  if (ok || ++failures > 20) return;
  std::printf("%s of %d planned bytes with %d: %s\n", kernel, int(planned), int(bytes), what);
}

template <class Run>
void check_end(const char* kernel, int64_t planned, const Run& run) {
  constexpr char kUntouched = 0x5a;
  for (const int64_t bytes : {planned, planned - 64, planned / 2, int64_t(64), int64_t(0)}) {
    std::vector<char> memory(planned + 65536, kUntouched);
    char* const end = memory.data() + memory.size();
    char* const at = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
    bool refused = false;
    try {
      run(Memory{at, bytes});
    } catch (const std::runtime_error& error) {
      refused = std::strstr(error.what(), "planned") != nullptr;
    }
    if (bytes == planned) check(!refused, kernel, "refused", bytes, planned);
    if (bytes < planned / 2) check(refused, kernel, "not refused", bytes, planned);
    const bool kept = std::all_of(at + bytes, end, [](char c) { return c == kUntouched; });
    check(kept, kernel, "written past the end", bytes, planned);
  }
}

// A call over zeros.
struct Call {
  std::list<std::vector<char>> tensors;
  Sequence sequence;
  Attention a{};

  Call(ScalarType dtype, int64_t element, int64_t q_len, int64_t group, int64_t headdim,
       int64_t headdim_v, bool with_qv)
      : sequence{0, 0, q_len, 0, 0, 200, nullptr} {
    a.sequences = &sequence;
    a.batch_size = 1;
    a.nheads_k = 4;
    a.nheads = 4 * group;
    a.headdim = headdim;
    a.headdim_v = headdim_v;
    a.softmax_scale = 1;
    a.window_left = a.window_right = -1;
    const auto rows = [&](int64_t count, int64_t heads, int64_t width, int64_t size) {
      return Rows{
          tensor(count * heads * width * size), dtype, 0, heads * width * size, width * size, size};
    };
    const auto of_q = [&](int64_t width) { return rows(q_len, a.nheads, width, element); };
    const auto of_k = [&](int64_t width) { return rows(200, a.nheads_k, width, element); };
    a.q = of_q(headdim), a.dq = of_q(headdim), a.out = of_q(headdim_v), a.dout = of_q(headdim_v);
    a.k = of_k(headdim), a.dk = of_k(headdim), a.v = of_k(headdim_v), a.dv = of_k(headdim_v);
    if (with_qv) a.qv = of_q(headdim_v);
    a.delta = rows(q_len, a.nheads, 1, std::max<int64_t>(element, 4));
    a.softmax_lse = {reinterpret_cast<float*>(tensor(q_len * a.nheads * 4)), 0, a.nheads, 1};
  }

  char* tensor(int64_t bytes) { return tensors.emplace_back(bytes).data(); }
};

void test_forward(const Kernels& k, Attention a, int64_t together) {
  const int64_t rows = a.rows(0);
  a.row_tile = rows;
  a.together = together;
  const RowTile tiles[] = {{0, 0, 0, rows}, {0, 1, 0, rows}, {0, 2, 0, rows}, {0, 3, 0, rows}};
  const int64_t state_bytes = k.state_bytes(a), scratch_bytes = k.forward_bytes(a);
  std::vector<char> enough(together * state_bytes + scratch_bytes + 64);
  char* const at = enough.data() + (64 - reinterpret_cast<uintptr_t>(enough.data()) % 64);
  const Memory states{at, together * state_bytes}, scratch{at + states.bytes, scratch_bytes};

  check_end("forward_chunk's scratch", scratch_bytes,
            [&](Memory m) { k.forward_chunk(a, tiles, together, 0, states, m); });
  check_end("forward_chunk's states", states.bytes,
            [&](Memory m) { k.forward_chunk(a, tiles, together, 0, m, scratch); });
  const Memory state = states.part(0, state_bytes);
  check_end("empty_state", state_bytes, [&](Memory m) { k.empty_state(a, m); });
  check_end("merge_state", state_bytes, [&](Memory m) {
    k.empty_state(a, m);
    k.merge_state(a, tiles[0], m, state);
  });
  check_end("finish", state_bytes, [&](Memory m) {
    k.empty_state(a, m);
    k.finish(a, tiles[0], m);
  });
}

void test_backward(const Kernels& k, Attention a) {
  const int64_t rows = a.rows(0), tile = std::min<int64_t>(256, round_up(rows, 32));
  a.row_tile = tile;
  const int64_t bytes = k.backward_bytes(a), dq_bytes = (rows + tile - 1) / tile * k.dq_bytes(a);
  std::vector<char> enough(dq_bytes + bytes + 64);
  char* const at = enough.data() + (64 - reinterpret_cast<uintptr_t>(enough.data()) % 64);
  KeyTask task{0, 1, 0, 200, {at, dq_bytes}, nullptr};
  const Memory scratch{at + dq_bytes, bytes};

  k.backward_delta(a, 0, 0, a.sequences[0].q_len, scratch);
  check_end("backward_keys' scratch", bytes, [&](Memory m) { k.backward_keys(a, task, m); });
  check_end("backward_keys' dq", dq_bytes, [&](Memory m) {
    KeyTask other = task;
    other.dq = m;
    k.backward_keys(a, other, scratch);
  });
}

void test(const Kernels* k, ScalarType dtype, int64_t element) {
  if (k == nullptr) return;  // AVX512's
  for (const auto& [headdim, headdim_v] : {std::pair(40, 24), {1, 72}, {128, 128}})
    for (const bool with_qv : {false, true})
      for (const int64_t q_len : {1, 8, 60, 150}) {
        const Call call(dtype, element, q_len, 2, headdim, headdim_v, with_qv);
        test_forward(*k, call.a, 1);
        if (q_len <= 8 && !with_qv) test_forward(*k, call.a, 4);
        if (!with_qv) test_backward(*k, call.a);
      }
}

int run() {
#if FA3NPU_AMX && defined(__linux__)
  syscall(SYS_arch_prctl, 0x1023, 18);  // as in kernels.cpp: may this process use tiles?
#endif
  std::puts(FA3NPU_NAME);
  test(FA3NPU_SET.bfloat16, ScalarType::BFloat16, 2);
  test(FA3NPU_SET.float32, ScalarType::Float, 4);
  test(FA3NPU_SET.float64, ScalarType::Double, 8);
  std::printf("%d failures\n", failures);
  return failures > 0;
}

}  // namespace
}  // namespace fa3npu

int main() { return fa3npu::run(); }
