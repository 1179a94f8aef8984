// Runs an attention call: cuts it into tiles, spreads them over the threads, picks the kernels.

#include "cpu/attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/tile_headers.h"

namespace fa3npu {

#if defined(__x86_64__)
namespace amx {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace portable {
extern const Kernels table;
}

namespace {

#if defined(__x86_64__)
// Whether there are tiles of bfloat16 and the system lets this process use their registers.
bool has_amx() {
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned kAmx = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAmx) != kAmx) return false;
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> best_first;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    const bool bfloat16 = __builtin_cpu_supports("avx512bf16");
    if (bfloat16 && has_amx()) best_first.push_back(&amx::table);
    best_first.push_back(&avx512::table);
    if (bfloat16)  // twice as fast as float32 on AMD's cores, slower on Intel's
      best_first.insert(best_first.end() - (__builtin_cpu_is("amd") ? 1 : 0), &avx512_bf16::table);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    best_first.push_back(&avx2::table);
#endif
  best_first.push_back(&portable::table);
  return best_first;
}

std::string cpu_capabilities() {
  std::string names;
  for (const Kernels* k : supported_kernels())
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  return names;
}

const Kernels& choose_kernels() {
  const auto supported = supported_kernels();
  const char* wanted = std::getenv("FA3NPU_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return *supported.front();
  for (const Kernels* k : supported)
    if (std::strcmp(k->name, wanted) == 0) return *k;
  FA3_CHECK(false, "FA3NPU_CPU_CAPABILITY must be one of ", cpu_capabilities(),
            " on this machine, got ", wanted);
  return *supported.front();
}

// Memory that a thread keeps between calls and that only grows.
char* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<char, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64))));
    size = memory ? bytes : 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

// Calls work(i, scratch) for i in [0, count), each on whichever thread is free next.
template <class F>
void run_dynamically(int64_t threads, int64_t count, int64_t scratch_bytes, const F& work) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  const auto loop = [&](int64_t, int64_t) {
    char* scratch = thread_scratch(scratch_bytes);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, scratch);
  };
  threads = std::min(threads, count);
  if (threads == 1)
    loop(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, loop);
}

std::vector<RowTile> row_tiles(const Attention& a) {
  std::vector<RowTile> tiles;
  for (int64_t b = 0; b < a.batch_size; ++b) {
    const int64_t rows = a.sequences[b].q_len * a.group();
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
    const int64_t rows = a.sequences[b].q_len * a.group();
    longest = std::max(longest, rows);
    all += rows * a.nheads_k;
  }
  const int64_t fair = all / (4 * threads) / 96 * 96;
  return std::min(longest, std::clamp<int64_t>(fair, 96, kRowTile));
}

// As many threads as have at least some microseconds of work each.
int64_t choose_threads(const Attention& a) {
  constexpr double kLeastWork = 1 << 19;  // multiplications
  double work = 0;
  for (int64_t b = 0; b < a.batch_size; ++b)
    work += double(a.sequences[b].q_len) * a.sequences[b].k_len;
  work *= double(a.nheads) * (a.headdim + a.headdim_v);
  return std::clamp<int64_t>(work / kLeastWork, 1, torch::stable::get_num_threads());
}

int64_t widths(const Attention& a) { return round_up(a.headdim, 32) + round_up(a.headdim_v, 32); }

int64_t scratch_bytes(const Attention& a) {  // the most that any kernel takes
  const int64_t element = a.is_double() ? 8 : 4;
  const int64_t keys = 4 * 288 * widths(a);  // rows, spare, transposed and strips of a panel
  const int64_t rows = a.row_capacity() * (widths(a) + 16) + kFewRows * (256 + widths(a));
  return element * (keys + a.together * rows + 4 * 96 * 128) + 65536;
}

int64_t backward_scratch_bytes(const Attention& a) {
  const int64_t element = a.is_double() ? 8 : 4;
  const int64_t keys = 3 * (kKeyTile + 128) * widths(a);
  const int64_t rows = a.row_capacity() * (5 * widths(a) + 4 * 128 + 32);
  return element * (keys + rows + 4 * 96 * 128) + 65536;
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
    const int64_t rows = a.sequences[b].q_len * a.group();
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

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

const float* float8_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values;
    for (int i = 0; i < 256; ++i)
      values.push_back(c10::Float8_e4m3fn(uint8_t(i), c10::Float8_e4m3fn::from_bits()));
    return values;
  }();
  return table.data();
}

uint16_t float_to_half(float x) { return c10::Half(x).x; }

int64_t state_bytes(const Attention& a) {
  const int64_t element = a.is_double() ? 8 : 4;
  return round_up(element * (a.row_capacity() * (2 + a.state_ld()) + 64), 64);
}

void attention_forward(const Attention& call) {
  const Kernels& k = kernels();
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
  const std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(64, bytes)), &std::free);
  if (!memory) throw std::bad_alloc();
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

std::string cpu_capability() { return kernels().name; }

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cpu_capabilities", TORCH_BOX(&cpu_capabilities));
}

void attention_backward(const Attention& call) {
  const Kernels& k = kernels();
  Attention a = call;
  a.row_tile = 256;  // not the threads' business: dk and dv are summed tile by tile
  const int64_t threads = choose_threads(a), scratch = backward_scratch_bytes(a);
  const auto tiles = row_tiles(a);
  run_dynamically(threads, tiles.size(), scratch,
                  [&](int64_t i, char* at) { k.backward_delta(a, tiles[i], at); });
  run_dynamically(threads, tiles.size(), scratch,
                  [&](int64_t i, char* at) { k.backward_dq(a, tiles[i], at); });

  struct KeyTile {
    int64_t sequence, head, first;
  };
  std::vector<KeyTile> keys;
  for (int64_t b = 0; b < a.batch_size; ++b)
    for (int64_t head = 0; head < a.nheads_k; ++head)
      for (int64_t first = 0; first < a.sequences[b].k_len; first += kKeyTile)
        keys.push_back({b, head, first});
  run_dynamically(threads, keys.size(), scratch, [&](int64_t i, char* at) {
    k.backward_dkdv(a, keys[i].sequence, keys[i].head, keys[i].first, at);
  });
}

}  // namespace fa3npu
