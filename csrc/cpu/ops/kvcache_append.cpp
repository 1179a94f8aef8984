// kvcache_append_ on CPU: row i of sequence b goes to position cache_seqlens[b] + i of its cache.
// Everything is checked before the first write.

#include <torch/csrc/stable/library.h>

#include "cpu/ops/cache_write.h"

namespace fa3npu {
namespace {

void kvcache_append_(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens_,
                     MaybeTensor cache_batch_idx, MaybeTensor page_table,
                     MaybeTensor cu_seqlens_k_new, MaybeTensor rotary_cos, MaybeTensor rotary_sin,
                     MaybeTensor rotary_seqlens_, bool rotary_interleaved, MaybeTensor k_descale,
                     MaybeTensor v_descale) {
  const bool packed = cu_seqlens_k_new.has_value();
  const int64_t batch = cache_seqlens_.size(0);
  CacheWrite caches(k, v, k_cache, v_cache, packed ? 3 : 4);
  FA3_CHECK(packed || k.size(0) == batch, "k must have the batch of cache_seqlens, ", batch,
            ", got ", shape_of(k));
  caches.set_descales(k_descale, v_descale, batch);

  const Lengths cache_seqlens(cache_seqlens_, batch, "cache_seqlens");
  const Lengths rotary_seqlens(rotary_seqlens_, batch, "rotary_seqlens");
  const Lengths cu_seqlens(cu_seqlens_k_new, batch + 1, "cu_seqlens_k_new");
  const Cache cache(k_cache, page_table, cache_batch_idx, batch);
  std::optional<Rotary> rotary;
  if (rotary_cos) {
    FA3_CHECK(rotary_sin.has_value(), "rotary_sin must be given with rotary_cos");
    rotary_cos = caches.apart(*rotary_cos);  // which the Rotary points into
    rotary_sin = caches.apart(*rotary_sin);
    rotary.emplace(*rotary_cos, *rotary_sin, k.scalar_type(), k.size(-1), rotary_interleaved);
  }

  std::vector<NewRow> rows;
  for (int64_t b = 0; b < batch; ++b) {
    if (packed) check_segment(cu_seqlens, b, k.size(0), "cu_seqlens_k_new");
    const int64_t begin = packed ? cu_seqlens[b] : 0;
    const int64_t count = packed ? cu_seqlens[b + 1] - begin : k.size(1);
    const int64_t length = cache_seqlens[b];
    FA3_CHECK(length >= 0, "cache_seqlens[", b, "] must not be negative, got ", length);
    FA3_CHECK(length + count <= cache.capacity(), "cache_seqlens[", b, "] must leave room for ",
              count, " new keys in a cache of ", cache.capacity(), ", got ", length);
    Sequence s{};
    cache.resolve(b, s);
    cache.check_pages(s, length, length + count);
    const int64_t first_position = rotary_seqlens ? rotary_seqlens[b] : length;
    if (rotary) rotary->check(first_position, count, b);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = length + i;
      if (s.pages)
        rows.push_back({b, begin + i, s.pages[at / cache.page_size], at % cache.page_size,
                        first_position + i});
      else
        rows.push_back({b, begin + i, s.k_batch, at, first_position + i});
    }
  }
  caches.write(rows, rotary ? &*rotary : nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CPU, m) {
  m.impl("kvcache_append_", TORCH_BOX(&kvcache_append_));
}

}  // namespace fa3npu
