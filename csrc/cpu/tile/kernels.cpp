// Which instruction sets this machine runs, and which of them the kernels are taken from.

#include "cpu/tile/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <vector>

#include "check.h"

namespace fa3npu {

namespace {

#if defined(__x86_64__)
// Whether there are tiles of bfloat16 and the system lets this process use their registers.
bool has_amx() {
#if defined(FA3NPU_EMULATED_TILES)
  return true;
#else
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned kTiles = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTiles) != kTiles) return false;
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
#endif
}
#endif

std::vector<const InstructionSet*> supported() {
  std::vector<const InstructionSet*> best_first;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    // Cooper Lake, which lacks VBMI, would take AVX512 first anyway.
    const bool bfloat16 =
        __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    if (bfloat16 && has_amx()) best_first.push_back(&kAmx);
    best_first.push_back(&kAvx512);
    if (bfloat16)  // twice as fast as float32 on AMD's cores, slower on Intel's
      best_first.insert(best_first.end() - (__builtin_cpu_is("amd") ? 1 : 0), &kAvx512Bf16);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    best_first.push_back(&kAvx2);
#endif
  best_first.push_back(&kPortable);
  return best_first;
}

// The set, with AVX512's kernels for what it has none for.
InstructionSet completed(InstructionSet set) {
#if defined(__x86_64__)
  if (set.float32 == nullptr) set.float32 = kAvx512.float32;
  if (set.float64 == nullptr) set.float64 = kAvx512.float64;
#endif
  return set;
}

InstructionSet choose() {
  const auto sets = supported();
  const char* wanted = std::getenv("FA3NPU_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return completed(*sets.front());
  for (const InstructionSet* set : sets)
    if (std::string(wanted) == set->name) return completed(*set);
  FA3_CHECK(false, "FA3NPU_CPU_CAPABILITY must be one of ", cpu_capabilities(),
            " on this machine, got ", wanted);
  return *sets.front();
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

}  // namespace

const Kernels& kernels(const Attention& a) {
  // A qv's product has another descale than q's: q and qv take them, which are float32 then.
  const bool own_scales = a.qv.data != nullptr && is_narrow(a.k.dtype);
  return kernels(own_scales ? ScalarType::Float : a.q.dtype);
}

const Kernels& kernels(ScalarType dtype) {
  if (dtype == ScalarType::Double) return *chosen().float64;
  return dtype == ScalarType::BFloat16 ? *chosen().bfloat16 : *chosen().float32;
}

Quantise quantise_kernel() { return chosen().quantise; }

std::string cpu_capability() { return chosen().name; }

std::string cpu_capabilities() {
  std::string names;
  for (const InstructionSet* set : supported())
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  return names;
}

}  // namespace fa3npu
