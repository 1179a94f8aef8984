// Scratch memory, cut into arrays. Types lay themselves out in an Arena when they are constructed.
// What that takes is planned by constructing one where there is no memory yet, bytes_of, so that no
// size is said twice; to take more than was planned is an error.

#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <cstdint>
#include <limits>
#include <new>

#include "cpu/attention.h"
#include "cpu/tile/baseline.h"
#include "cpu/tile/isa.h"

FA3NPU_TARGET_BEGIN
namespace fa3npu::FA3NPU_ISA {

class Arena {
 public:
  Arena() = default;  // without memory: counts, and gives null
  explicit Arena(Memory memory) : at_(memory.at), bytes_(memory.bytes) {}

  // An array of n, on cache lines of its own.
  template <class T>
  INLINE T* take(int64_t n) {
    const int64_t begin = used_, size = n * int64_t(sizeof(T));
    used_ += round_up(size, 64) + kRedZone;
    if (used_ > bytes_) beyond_plan(used_, bytes_);
    if (at_ == nullptr) return nullptr;
    set_ends(at_ + begin, size, used_ - begin);
    return reinterpret_cast<T*>(at_ + begin);
  }

  // An array of n, each constructed from the arguments and this.
  template <class T, class... Arguments>
  T* make(int64_t n, const Arguments&... arguments) {
    T* const objects = take<T>(n);
    const int64_t before = used_;
    if (objects == nullptr) {
      T(arguments..., *this);
      used_ = before + n * (used_ - before);
    }
    for (int64_t i = 0; objects && i < n; ++i) new (objects + i) T(arguments..., *this);
    return objects;
  }

  int64_t used() const { return used_; }

 private:
  // The address sanitizer sees what passes an array's end. What is inside is never poisoned:
  // threads may read memory that another one lays out alike.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kRedZone = 64;
  static void set_ends(char* at, int64_t size, int64_t with_red_zone) {
    __asan_unpoison_memory_region(at, size);
    __asan_poison_memory_region(at + size, with_red_zone - size);
  }
#else
  static constexpr int64_t kRedZone = 0;
  INLINE static void set_ends(char*, int64_t, int64_t) {}
#endif

  char* at_ = nullptr;
  int64_t used_ = 0, bytes_ = std::numeric_limits<int64_t>::max();
};

// The memory that a T takes.
template <class T, class... Arguments>
int64_t bytes_of(const Arguments&... arguments) {
  Arena counting;
  T(arguments..., counting);
  return counting.used();
}

}  // namespace fa3npu::FA3NPU_ISA
FA3NPU_TARGET_END
