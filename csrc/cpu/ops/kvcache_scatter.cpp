// kvcache_scatter_ on CPU: row i of k and v goes to slot_mapping[i] of the caches. Every slot is
// checked before the first write.

#include <torch/csrc/stable/library.h>

#include "cpu/ops/cache_write.h"

namespace fa3npu {
namespace {

// Slots are entry * rows + row of caches (entries, rows, ...); negative ones are skipped.
template <class Slot>
std::vector<NewRow> rows_at(const Tensor& slot_mapping, const Tensor& k_cache) {
  const Slot* slots = slot_mapping.const_data_ptr<Slot>();
  const int64_t stride = slot_mapping.stride(0), per_entry = k_cache.size(1);
  const int64_t capacity = k_cache.size(0) * per_entry;
  std::vector<NewRow> rows;
  rows.reserve(slot_mapping.size(0));
  for (int64_t i = 0; i < slot_mapping.size(0); ++i) {
    const int64_t slot = slots[i * stride];
    FA3_CHECK(slot < capacity, "slot_mapping[", i, "] must be less than the ", capacity,
              " slots of the cache, got ", slot);
    if (slot >= 0) rows.push_back({0, i, slot / per_entry, slot % per_entry, 0});
  }
  return rows;
}

void kvcache_scatter_(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping,
                      MaybeTensor k_descale, MaybeTensor v_descale) {
  CacheWrite caches(k, v, k_cache, v_cache, 3);
  caches.set_descales(k_descale, v_descale, std::nullopt);
  descales_of(k_descale, std::nullopt, k_cache.size(2), "k_descale");  // though nothing is narrowed
  descales_of(v_descale, std::nullopt, k_cache.size(2), "v_descale");
  FA3_CHECK(slot_mapping.dim() == 1 && slot_mapping.size(0) <= k.size(0),
            "slot_mapping must have a slot for each of the ", k.size(0),
            " rows of k, or for the first of them, got ", shape_of(slot_mapping));
  const ScalarType dtype = slot_mapping.scalar_type();
  FA3_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
            "slot_mapping must have dtype torch.int32 or torch.int64, got ",
            torch::headeronly::toString(dtype));
  caches.write(dtype == ScalarType::Int ? rows_at<int32_t>(slot_mapping, k_cache)
                                        : rows_at<int64_t>(slot_mapping, k_cache),
               nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CPU, m) {
  m.impl("kvcache_scatter_", TORCH_BOX(&kvcache_scatter_));
}

}  // namespace fa3npu
