#include "cpu/ops/cache_write.h"

#include <array>
#include <string>

#include "cpu/tile/kernels.h"

namespace fa3npu {

namespace {

// Writes one head vector as the cache has it. What is rotated is rounded to its own dtype first.
void write_row(const char* from, ScalarType dtype, char* to, ScalarType cache_dtype, int64_t n,
               float descale, Quantise quantise, const Rotary* rotary, int64_t position) {
  if (dtype == cache_dtype) return copy_row(from, to, dtype, n, rotary, position);
  std::array<char, kMaxHeadDim * sizeof(float)> turned;
  if (rotary) {
    rotary->rotate(from, turned.data(), dtype, n, position);
    from = turned.data();
  }
  quantise(from, dtype, n, descale, cache_dtype, to);
}

}  // namespace

CacheWrite::CacheWrite(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                       const Tensor& v_cache, int64_t dim)
    : k_cache_(k_cache), v_cache_(v_cache) {
  check_cache_dtype(k_cache, "k_cache");
  check_pair(k, k_cache, "k", dim);
  check_pair(v, v_cache, "v", dim);
  for (int64_t i = 0; i + 2 < dim; ++i)
    FA3_CHECK(k.size(i) == v.size(i), "v must have as many rows as k, ", shape_of(k), ", got ",
              shape_of(v));
  for (int64_t i = 0; i < 3; ++i)
    FA3_CHECK(k_cache.size(i) == v_cache.size(i), "v_cache must have the shape of k_cache up to ",
              "headdim, ", shape_of(k_cache), ", got ", shape_of(v_cache));
  k_ = contiguous_rows(apart(k));
  v_ = contiguous_rows(apart(v));
}

void CacheWrite::check_pair(const Tensor& x, const Tensor& cache, const char* name,
                            int64_t dim) const {
  FA3_CHECK(cache.dim() == 4, name, "_cache must have 4 dimensions, got ", shape_of(cache));
  FA3_CHECK(cache.stride(-1) == 1 || cache.size(-1) == 1, name,
            "_cache must have a contiguous last dimension, got stride ", cache.stride(-1));
  FA3_CHECK(cache.scalar_type() == k_cache_.scalar_type(), name,
            "_cache must have the dtype of k_cache");
  check_distinct_elements(cache, (std::string(name) + "_cache").c_str());
  FA3_CHECK(cache.size(2) > 0 && cache.size(3) > 0 && cache.size(3) <= kMaxHeadDim, name,
            "_cache must have heads, of 1 to ", kMaxHeadDim, " elements, got ", shape_of(cache));
  FA3_CHECK(x.dim() == dim && x.size(-2) == cache.size(2) && x.size(-1) == cache.size(3), name,
            " must have the batch, nheads_k and headdim of the call, got ", shape_of(x));
  const ScalarType dtype = x.scalar_type();
  const bool narrows = is_narrow(cache.scalar_type()) && is_wide(dtype);
  FA3_CHECK(dtype == cache.scalar_type() || narrows, name, " must have the dtype of its cache",
            is_narrow(cache.scalar_type()) ? ", float16, bfloat16 or float32" : "", ", got ",
            torch::headeronly::toString(dtype));
}

void CacheWrite::set_descales(const MaybeTensor& k_descale, const MaybeTensor& v_descale,
                              std::optional<int64_t> batch_size) {
  const int64_t nheads_k = k_cache_.size(2);
  if (k_.scalar_type() != k_cache_.scalar_type())
    k_descale_ = descales_of(k_descale, batch_size, nheads_k, "k_descale");
  if (v_.scalar_type() != v_cache_.scalar_type())
    v_descale_ = descales_of(v_descale, batch_size, nheads_k, "v_descale");
}

Tensor CacheWrite::apart(const Tensor& t) const {
  const Span read(t);
  const bool changes = read.overlaps(Span(k_cache_)) || read.overlaps(Span(v_cache_));
  return changes ? torch::stable::clone(t) : t;
}

void CacheWrite::write(const std::vector<NewRow>& rows, const Rotary* rotary) const {
  mark_written(k_cache_, "k_cache");
  mark_written(v_cache_, "v_cache");
  const Rows k = rows_of(k_), v = rows_of(v_), k_to = rows_of(k_cache_), v_to = rows_of(v_cache_);
  const Quantise quantise = quantise_kernel();
  const int64_t nheads_k = k_cache_.size(2), headdim = k_.size(-1), headdim_v = v_.size(-1);
  torch::stable::parallel_for(0, rows.size(), 64, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const NewRow& row = rows[r];
      for (int64_t h = 0; h < nheads_k; ++h) {
        write_row(k.at(row.batch, row.row, h), k.dtype, k_to.at(row.to_batch, row.to_row, h),
                  k_to.dtype, headdim, k_descale_.get(row.batch, h, 1), quantise, rotary,
                  row.position);
        write_row(v.at(row.batch, row.row, h), v.dtype, v_to.at(row.to_batch, row.to_row, h),
                  v_to.dtype, headdim_v, v_descale_.get(row.batch, h, 1), quantise, nullptr, 0);
      }
    }
  });
}

}  // namespace fa3npu
