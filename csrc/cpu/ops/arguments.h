// From an operator's arguments to an Attention: shapes, dtypes, lengths and page ids are checked
// here, before a kernel reads or writes anything.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/attention.h"

namespace fa3npu {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

std::string shape_of(const Tensor& t);
int64_t element_size(ScalarType dtype);  // in bytes

void check_attention_dtype(ScalarType dtype, const char* name, const char* why = "");

// A cache may also be of float8_e5m2 or int8.
void check_cache_dtype(const Tensor& t, const char* name);

// float32 factors of what a narrow cache holds: (batch_size, nheads_k), (nheads_k,) or one number;
// without batch_size not by sequence.
Scalars descales_of(const MaybeTensor& t, std::optional<int64_t> batch_size, int64_t nheads_k,
                    const char* name);

// An int32 vector of `size` lengths or offsets.
struct Lengths {
  const int32_t* data = nullptr;
  int64_t stride = 0;
  bool given = false;  // an empty tensor is given, though its data may be null

  Lengths() = default;
  Lengths(const Tensor& t, int64_t size, const char* name);
  Lengths(const MaybeTensor& t, int64_t size, const char* name)
      : Lengths(t ? Lengths(*t, size, name) : Lengths()) {}
  explicit operator bool() const { return given; }
  int64_t operator[](int64_t i) const { return data[i * stride]; }
};

// Checks that cu_seqlens[b] and [b + 1] bound rows of a tensor of `total` rows.
void check_segment(const Lengths& cu_seqlens, int64_t b, int64_t total, const char* name);

// The keys' side of a batch entry in a cache: dense (batch, seqlen, nheads_k, d) or paged
// (num_pages, page_size, nheads_k, d), chosen by cache_batch_idx.
struct Cache {
  int64_t page_size = 0;  // 0: dense
  int64_t num_pages = 0, pages_per_row = 0, table_rows = 0, table_stride = 0;
  const int32_t* table = nullptr;
  int64_t dense_batch = 0, dense_capacity = 0;
  Lengths batch_idx;

  Cache(const Tensor& k_cache, const MaybeTensor& page_table, const MaybeTensor& cache_batch_idx,
        int64_t batch_size);
  int64_t capacity() const { return page_size ? pages_per_row * page_size : dense_capacity; }
  bool is_page(int32_t id) const { return id >= 0 && id < num_pages; }
  // Fills k_batch and pages; checks the batch index.
  void resolve(int64_t b, Sequence& s) const;
  // Checks the ids of the pages that hold the keys [begin, end).
  void check_pages(const Sequence& s, int64_t begin, int64_t end) const;
};

struct AttentionArguments {
  Tensor q, k, v;
  MaybeTensor qv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, cache_batch_idx,
      cache_leftpad, cache_start, q_descale, k_descale, v_descale, alibi_slopes, sinks;
  std::optional<double> softmax_scale;
  bool causal;
  std::vector<int64_t> window_size;
  int64_t attention_chunk;
  double softcap;
  const char* seqused_k_name = "seqused_k";  // what the user calls it
};

// A checked call. Owns what the Attention points into.
class AttentionCall {
 public:
  explicit AttentionCall(const AttentionArguments& arguments);

  Attention attention;

  // Fresh results, or `out` given; rows past seqused_q or the last cu_seqlens_q are 0 and -inf.
  std::tuple<Tensor, Tensor> forward(MaybeTensor out);
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& out,
                                              const Tensor& softmax_lse,
                                              const MaybeTensor& dsoftmax_lse);

 private:
  void set_heads();
  void set_masks(const AttentionArguments& args);
  void set_sequences(const AttentionArguments& args);  // lengths, pages
  // Pages that no row sees may have any id. A kernel, which loads whole blocks, then gets another
  // table, in which they are a page that some row sees.
  void check_pages(const Cache& cache, Sequence& s);
  void set_scores(const AttentionArguments& args);  // scale, biases
  std::vector<int64_t> shape_like_q(int64_t width) const;
  std::vector<int64_t> lse_shape() const;
  Scalars lse_view(const Tensor& lse) const;
  bool covers_q() const, covers_k() const;
  bool reads(const Tensor& out) const;  // whether the kernel may read what it writes to `out`

  const AttentionArguments& args_;  // live as long as the call
  Tensor q_, k_, v_;
  bool packed_q_, packed_k_;
  std::vector<Sequence> sequences_;
  std::vector<Tensor> kept_;
  std::vector<std::vector<int32_t>> tables_;
};

// A new contiguous CPU tensor; torch::stable::new_empty looks its operator up by name each time.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype);

Rows rows_of(const Tensor& t);
Tensor contiguous_rows(const Tensor& t);  // t, or a copy whose last dimension is contiguous

// An operator and its .out overload, from one function that takes the optional `out` first.
template <auto F>
struct Overloads;
template <class... Args, std::tuple<Tensor, Tensor> (*F)(MaybeTensor, Args...)>
struct Overloads<F> {
  static std::tuple<Tensor, Tensor> fresh(Args... args) { return F(std::nullopt, args...); }
  static Tensor into(Args... args, Tensor out) { return std::get<1>(F(out, args...)); }
};

}  // namespace fa3npu
