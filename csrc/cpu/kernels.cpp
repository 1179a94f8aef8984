// Which instruction sets this machine runs, and which of them the kernels are taken from.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
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

std::string cpu_capability() { return kernels().name; }

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cpu_capabilities", TORCH_BOX(&cpu_capabilities));
}

}  // namespace fa3npu
