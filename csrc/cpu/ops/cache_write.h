// What kvcache_append_ and kvcache_scatter_ have in common: new keys and values, checked against
// the caches, copied into them or quantised on the way.

#pragma once

#include <vector>

#include "cpu/ops/arguments.h"
#include "cpu/ops/rotary.h"
#include "cpu/ops/written.h"

namespace fa3npu {

struct NewRow {
  int64_t batch, row;        // of k and v; batch: whose descales divide it
  int64_t to_batch, to_row;  // of the caches
  int64_t position;          // for the rotation of k
};

class CacheWrite {
 public:
  // k and v are (..., nheads_k, d) of `dim` dimensions, the caches (batch, rows, nheads_k, d).
  CacheWrite(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
             int64_t dim);

  // Factors of what the caches hold, (batch_size, nheads_k), (nheads_k,) or one number; without
  // batch_size there are no sequences. Read only where the caches are narrower than k and v.
  void set_descales(const MaybeTensor& k_descale, const MaybeTensor& v_descale,
                    std::optional<int64_t> batch_size);

  // t, or a copy where the write would change what is still to be read.
  Tensor apart(const Tensor& t) const;

  // All rows have been checked.
  void write(const std::vector<NewRow>& rows, const Rotary* rotary) const;

 private:
  void check_pair(const Tensor& x, const Tensor& cache, const char* name, int64_t dim) const;

  Tensor k_cache_, v_cache_, k_, v_;
  Scalars k_descale_, v_descale_;
};

}  // namespace fa3npu
