// kvcache_append_ on CPU: row i of sequence b goes to position cache_seqlens[b] + i of its cache.
// Everything is checked before the first write.

#include <torch/csrc/stable/library.h>

#include "cpu/ops/rotary.h"
#include "cpu/ops/written.h"

namespace fa3npu {
namespace {

void kvcache_append_(Tensor k_, Tensor v_, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens_,
                     MaybeTensor cache_batch_idx, MaybeTensor page_table,
                     MaybeTensor cu_seqlens_k_new, MaybeTensor rotary_cos, MaybeTensor rotary_sin,
                     MaybeTensor rotary_seqlens_, bool rotary_interleaved) {
  check_attention_dtype(k_cache, "k_cache");
  const bool packed = cu_seqlens_k_new.has_value();
  const int64_t batch = cache_seqlens_.size(0);
  const auto check_pair = [&](const Tensor& x, const Tensor& cache, const char* name) {
    FA3_CHECK(cache.dim() == 4, name, "_cache must have 4 dimensions, got ", shape_of(cache));
    FA3_CHECK(cache.stride(-1) == 1 || cache.size(-1) == 1, name,
              "_cache must have a contiguous last dimension, got stride ", cache.stride(-1));
    FA3_CHECK(x.dim() == (packed ? 3 : 4) && (packed || x.size(0) == batch) &&
                  x.size(-2) == cache.size(2) && x.size(-1) == cache.size(3),
              name, " must have the batch, nheads_k and headdim of the call, got ", shape_of(x));
    FA3_CHECK(
        x.scalar_type() == k_cache.scalar_type() && cache.scalar_type() == k_cache.scalar_type(),
        name, " and its cache must have the dtype of k_cache");
  };
  check_pair(k_, k_cache, "k");
  check_pair(v_, v_cache, "v");
  check_distinct_elements(k_cache, "k_cache");
  check_distinct_elements(v_cache, "v_cache");
  FA3_CHECK(k_.size(0) == v_.size(0) && k_.size(1) == v_.size(1), "v must have as many rows as k, ",
            shape_of(k_), ", got ", shape_of(v_));
  FA3_CHECK(k_cache.size(0) == v_cache.size(0) && k_cache.size(1) == v_cache.size(1) &&
                k_cache.size(2) == v_cache.size(2),
            "v_cache must have the shape of k_cache up to headdim, ", shape_of(k_cache), ", got ",
            shape_of(v_cache));
  // A copy where the write would change what is still to be read.
  const Span k_written(k_cache), v_written(v_cache);
  const auto apart = [&](const Tensor& t) {
    const Span read(t);
    return read.overlaps(k_written) || read.overlaps(v_written) ? torch::stable::clone(t) : t;
  };
  const Tensor k = contiguous_rows(apart(k_)), v = contiguous_rows(apart(v_));
  if (rotary_cos) rotary_cos = apart(*rotary_cos);
  if (rotary_sin) rotary_sin = apart(*rotary_sin);

  const Lengths cache_seqlens(cache_seqlens_, batch, "cache_seqlens");
  const Lengths rotary_seqlens(rotary_seqlens_, batch, "rotary_seqlens");
  const Lengths cu_seqlens(cu_seqlens_k_new, batch + 1, "cu_seqlens_k_new");
  const Cache cache(k_cache, page_table, cache_batch_idx, batch);
  std::optional<Rotary> rotary;
  if (rotary_cos) {
    FA3_CHECK(rotary_sin.has_value(), "rotary_sin must be given with rotary_cos");
    rotary.emplace(*rotary_cos, *rotary_sin, k.scalar_type(), k.size(-1), rotary_interleaved);
  }

  struct Row {
    int64_t batch, row;        // of k and v
    int64_t to_batch, to_row;  // of the cache
    int64_t position;          // for the rotation
  };
  std::vector<Row> rows;
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

  mark_written(k_cache, "k_cache");
  mark_written(v_cache, "v_cache");
  const Rows k_from = rows_of(k), v_from = rows_of(v), k_to = rows_of(k_cache),
             v_to = rows_of(v_cache);
  torch::stable::parallel_for(0, rows.size(), 64, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const Row& row = rows[r];
      for (int64_t h = 0; h < k.size(-2); ++h) {
        copy_row(k_from.at(row.batch, row.row, h), k_to.at(row.to_batch, row.to_row, h),
                 k_from.dtype, k.size(-1), rotary ? &*rotary : nullptr, row.position);
        copy_row(v_from.at(row.batch, row.row, h), v_to.at(row.to_batch, row.to_row, h),
                 v_from.dtype, v.size(-1), nullptr, 0);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3npu, CPU, m) {
  m.impl("kvcache_append_", TORCH_BOX(&kvcache_append_));
}

}  // namespace fa3npu
