// Device memory is host memory with a red zone behind every block.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace {

using cann::fail;
using cann::submit;

constexpr size_t kRedZoneBytes = 64;
constexpr unsigned char kRedZone = 0xA5;
constexpr int kPoison = 0xFF;  // NaN in every float type, -1 in every signed integer

struct Block {
  size_t bytes;
  int device;
};
// By address. Never destroyed, see stream.cpp.
using Blocks = std::map<uintptr_t, Block>;
auto& blocks = *new Blocks;   // live
auto& freed = *new Blocks;    // freed, but queued work may still touch them
auto& retired = *new Blocks;  // freed and poisoned, but a graph may still touch them
auto& pinned = *new Blocks;   // on the host, from aclrtMallocHost
auto& blocks_mutex = *new std::mutex;
struct Usage {
  size_t now = 0, peak = 0;
};
Usage usage[cann::kMaxDevices];

bool contains(const Blocks& map, const void* p, size_t bytes) {
  auto address = reinterpret_cast<uintptr_t>(p);
  auto it = map.upper_bound(address);
  if (it == map.begin()) return false;
  --it;
  return address + bytes <= it->first + it->second.bytes;
}

void poison(void* p, size_t bytes) {
  static const bool on = getenv("CANNEMU_POISON") != nullptr;
  if (on) memset(p, kPoison, bytes);
}

void check_red_zone(uintptr_t address, size_t bytes) {
  auto* zone = reinterpret_cast<unsigned char*>(address) + bytes;
  for (size_t i = 0; i < kRedZoneBytes; ++i) {
    if (zone[i] == kRedZone) continue;
    fprintf(stderr, "[cann_emulator] write past the end of device block %p (%zu bytes)\n",
            reinterpret_cast<void*>(address), bytes);
    abort();
  }
}

aclError check_copy(const void* to, size_t room, const void* from, size_t bytes,
                    aclrtMemcpyKind kind) {
  bool from_device = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  bool to_device = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  if (bytes > room) return fail(ACL_ERROR_RT_PARAM_INVALID, "memcpy: %zu into %zu", bytes, room);
  if (from_device && !cann::is_device_memory(from, bytes))
    return fail(ACL_ERROR_RT_PARAM_INVALID, "memcpy: source %p is not device memory", from);
  if (to_device && !cann::is_device_memory(to, bytes))
    return fail(ACL_ERROR_RT_PARAM_INVALID, "memcpy: target %p is not device memory", to);
  return 0;
}

}  // namespace

namespace cann {

bool is_device_memory(const void* p, size_t bytes) {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  // A graph's tensors may outlive their blocks, as in PyTorch's graph pools.
  return contains(blocks, p, bytes) || contains(retired, p, bytes);
}

void check_red_zones() {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  for (auto [address, block] : blocks) check_red_zone(address, block.bytes);
}

void release_freed_blocks() {
  // Never waits: the caller may hold Python's lock, which a running kernel waits for.
  std::unique_lock<std::recursive_mutex> running(run_mutex(), std::try_to_lock);
  if (!running || !idle()) return;
  const bool keep = graphs_alive();
  std::lock_guard<std::mutex> lock(blocks_mutex);
  for (auto [address, block] : freed) poison(reinterpret_cast<void*>(address), block.bytes);
  retired.merge(freed);
  if (keep) return;
  for (auto [address, block] : retired) {
    check_red_zone(address, block.bytes);
    free(reinterpret_cast<void*>(address));
  }
  retired.clear();
}

}  // namespace cann

extern "C" {

aclError aclrtMalloc(void** p, size_t bytes, aclrtMemMallocPolicy) {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  const int device = cann::current_device();
  Usage& use = usage[device];
  if (use.now + bytes > cann::kDeviceBytes || posix_memalign(p, 512, bytes + kRedZoneBytes))
    return ACL_ERROR_RT_MEMORY_ALLOCATION;
  poison(*p, bytes);
  memset(static_cast<char*>(*p) + bytes, kRedZone, kRedZoneBytes);
  blocks[reinterpret_cast<uintptr_t>(*p)] = {bytes, device};
  use.now += bytes;
  use.peak = std::max(use.peak, use.now);
  return 0;
}

aclError aclrtMallocAlign32(void** p, size_t bytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(p, bytes, policy);
}

// Freeing runs nothing: if it drained the streams, a missing stream wait would go unnoticed
// whenever a temporary dies. The block lives on until nothing can touch it.
aclError aclrtFree(void* p) {
  {
    std::lock_guard<std::mutex> lock(blocks_mutex);
    auto it = blocks.find(reinterpret_cast<uintptr_t>(p));
    if (it == blocks.end()) return fail(ACL_ERROR_RT_PARAM_INVALID, "%p is no device block", p);
    check_red_zone(it->first, it->second.bytes);
    usage[it->second.device].now -= it->second.bytes;
    freed.insert(*it);
    blocks.erase(it);
  }
  cann::release_freed_blocks();
  return 0;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free_bytes, size_t* total_bytes) {
  *total_bytes = cann::kDeviceBytes;
  *free_bytes = cann::kDeviceBytes - usage[cann::current_device()].now;
  return 0;
}

aclError aclrtMallocHost(void** p, size_t bytes) {
  if (posix_memalign(p, 64, bytes)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  std::lock_guard<std::mutex> lock(blocks_mutex);
  pinned[reinterpret_cast<uintptr_t>(*p)] = {bytes, 0};
  return 0;
}

aclError aclrtMallocHostWithCfg(void** p, uint64_t bytes, aclrtMallocConfig*) {
  return aclrtMallocHost(p, bytes);
}

aclError aclrtFreeHost(void* p) {
  std::lock_guard<std::mutex> lock(blocks_mutex);
  pinned.erase(reinterpret_cast<uintptr_t>(p));
  free(p);
  return 0;
}

aclError aclrtPointerGetAttributes(const void* p, aclrtPtrAttributes* attributes) {
  memset(attributes, 0, sizeof *attributes);
  std::lock_guard<std::mutex> lock(blocks_mutex);
  attributes->location.type = contains(blocks, p, 1)   ? ACL_MEM_LOCATION_TYPE_DEVICE
                              : contains(pinned, p, 1) ? ACL_MEM_LOCATION_TYPE_HOST
                                                       : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  return 0;
}

aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  TRACE();
  if (auto error = check_copy(to, room, from, bytes, kind)) return error;
  if (cann::any_capturing(cann::current_device()))
    return fail(ACL_ERROR_RT_STREAM_CAPTURED, "a synchronous copy during a capture");
  memmove(to, from, bytes);
  return 0;
}

aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes,
                          aclrtMemcpyKind kind, aclrtStream stream) {
  TRACE();
  if (auto error = check_copy(to, room, from, bytes, kind)) return error;
  bool pageable;
  {
    std::lock_guard<std::mutex> lock(blocks_mutex);
    pageable = kind == ACL_MEMCPY_HOST_TO_DEVICE && !contains(pinned, from, bytes);
  }
  if (!pageable) {
    return submit(stream, [=] {
      memmove(to, from, bytes);
      return 0;
    });
  }
  // Pageable memory is read before the call returns: the caller may free it.
  auto* begin = static_cast<const char*>(from);
  auto staged = std::make_shared<std::vector<char>>(begin, begin + bytes);
  return submit(stream, [=] {
    memcpy(to, staged->data(), bytes);
    return 0;
  });
}

aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t bytes,
                                       aclrtMemcpyKind kind, aclrtStream stream) {
  return aclrtMemcpyAsync(to, room, from, bytes, kind, stream);
}

aclError aclrtMemset(void* p, size_t room, int32_t value, size_t bytes) {
  if (bytes > room) return ACL_ERROR_RT_PARAM_INVALID;
  memset(p, value, bytes);
  return 0;
}

aclError aclrtMemsetAsync(void* p, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
  if (bytes > room) return ACL_ERROR_RT_PARAM_INVALID;
  return submit(stream, [=] {
    memset(p, value, bytes);
    return 0;
  });
}

// A torch_npu allocator, one block per tensor, see cann_emulator/allocator.py.
void* emu_malloc(ssize_t bytes, int, aclrtStream) {
  void* p = nullptr;
  return bytes && aclrtMalloc(&p, bytes, ACL_MEM_MALLOC_HUGE_FIRST) == 0 ? p : nullptr;
}
void emu_free(void* p, ssize_t, int, aclrtStream) { aclrtFree(p); }
size_t emu_used_bytes(int device, int peak) {
  return peak ? usage[device].peak : usage[device].now;
}
void emu_reset_peak(int device) { usage[device].peak = usage[device].now; }
}
