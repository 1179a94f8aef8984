#include "cpu/ops/arguments.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/ops/written.h"
#include "cpu/schedule/schedule.h"

namespace fa3npu {

namespace {

void check_dim(const Tensor& t, int64_t dim, const char* name) {
  FA3_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", shape_of(t));
}

void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  FA3_CHECK(t.scalar_type() == dtype, name, " must have dtype ", torch::headeronly::toString(dtype),
            ", got ", torch::headeronly::toString(t.scalar_type()));
}

void check_shape(const Tensor& t, std::vector<int64_t> shape, const char* name) {
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape[i];
  if (same) return;
  std::string wanted;
  for (int64_t n : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
  FA3_CHECK(false, name, " must have shape (", wanted, "), got ", shape_of(t));
}

bool is_attention_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double || is_wide(dtype) || dtype == ScalarType::Float8_e4m3fn;
}

Scalars scalars_of(const Tensor& t) {  // (batch, nheads), (nheads,), or one number for all
  Scalars s;
  s.data = const_cast<float*>(t.const_data_ptr<float>());
  s.batch = t.dim() == 2 ? t.stride(0) : 0;
  s.head = t.dim() == 0 || t.size(-1) == 1 ? 0 : t.stride(-1);
  return s;
}

// Keys are of q's dtype, or a narrow cache beside a wider q.
void check_keys_dtype(const Tensor& q, const Tensor& k, const Tensor& v) {
  const ScalarType dtype = q.scalar_type();
  if (!is_wide(dtype) || !is_narrow(k.scalar_type())) check_dtype(k, dtype, "k");
  check_dtype(v, k.scalar_type(), "v");
}

// Of large results, which malloc often maps anew: to touch their pages one by one takes up to a
// tenth of a prefill.
void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = 2 << 20;
  if (bytes < 2 * kPage) return;
  const int64_t begin = round_up(reinterpret_cast<int64_t>(memory), kPage);
  const int64_t end = (reinterpret_cast<int64_t>(memory) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: it may fail
#endif
}

}  // namespace

int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    default:
      return is_narrow(dtype) ? 1 : 2;
  }
}

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + (t.dim() == 1 ? ",)" : ")");
}

void check_attention_dtype(ScalarType dtype, const char* name, const char* why) {
  FA3_CHECK(is_attention_dtype(dtype), name, " must be float64, float32, float16, bfloat16 or ",
            "float8_e4m3fn", why, ", got ", torch::headeronly::toString(dtype));
}

void check_cache_dtype(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  FA3_CHECK(is_attention_dtype(dtype) || is_narrow(dtype), name, " must be float64, float32, ",
            "float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8, got ",
            torch::headeronly::toString(dtype));
}

Scalars descales_of(const MaybeTensor& t, std::optional<int64_t> batch_size, int64_t nheads_k,
                    const char* name) {
  if (!t) return Scalars();
  check_dtype(*t, ScalarType::Float, name);
  const bool of_all =
      t->dim() == 0 || (t->dim() == 1 && (t->size(0) == 1 || t->size(0) == nheads_k));
  FA3_CHECK(of_all || batch_size, name, " must have shape (", nheads_k, ",), (1,) or (), got ",
            shape_of(*t));
  if (!of_all) check_shape(*t, {*batch_size, nheads_k}, name);
  return scalars_of(*t);
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &tensor));
  const Tensor result(tensor);
  advise_huge_pages(result.data_ptr(), result.numel() * element_size(dtype));
  return result;
}

Rows rows_of(const Tensor& t) {
  const int64_t bytes = element_size(t.scalar_type());
  Rows rows;
  rows.data = static_cast<char*>(t.data_ptr());
  rows.dtype = t.scalar_type();
  rows.element = bytes;
  rows.batch = t.dim() == 4 ? t.stride(0) * bytes : 0;
  rows.row = t.stride(-3) * bytes;
  rows.head = t.stride(-2) * bytes;
  return rows;
}

Lengths::Lengths(const Tensor& t, int64_t size, const char* name) {
  FA3_CHECK(t.scalar_type() == ScalarType::Int, name, " must have dtype torch.int32");
  check_shape(t, {size}, name);
  data = t.const_data_ptr<int32_t>();
  stride = t.stride(0);
  given = true;
}

void check_segment(const Lengths& cu_seqlens, int64_t b, int64_t total, const char* name) {
  FA3_CHECK(cu_seqlens[b] >= 0, name, "[", b, "] must not be negative, got ", cu_seqlens[b]);
  FA3_CHECK(cu_seqlens[b] <= cu_seqlens[b + 1], name, " must not fall, got ", cu_seqlens[b],
            " followed by ", cu_seqlens[b + 1], " at index ", b);
  FA3_CHECK(cu_seqlens[b + 1] <= total, name, "[", b + 1, "] must be at most the ", total,
            " rows of its tensor, got ", cu_seqlens[b + 1]);
}

Cache::Cache(const Tensor& k_cache, const MaybeTensor& page_table,
             const MaybeTensor& cache_batch_idx, int64_t batch_size)
    : batch_idx(cache_batch_idx, batch_size, "cache_batch_idx") {
  if (page_table) {
    check_dim(*page_table, 2, "page_table");
    FA3_CHECK(page_table->scalar_type() == ScalarType::Int,
              "page_table must have dtype torch.int32");
    FA3_CHECK(page_table->stride(1) == 1 || page_table->size(1) <= 1,
              "page_table must have a contiguous last dimension, got stride ",
              page_table->stride(1));
    FA3_CHECK(k_cache.size(1) > 0, "k_cache must have a page_size of at least 1, got ",
              shape_of(k_cache));
    page_size = k_cache.size(1);
    num_pages = k_cache.size(0);
    table_rows = page_table->size(0);
    pages_per_row = page_table->size(1);
    table_stride = page_table->stride(0);
    table = page_table->const_data_ptr<int32_t>();
  } else {
    dense_batch = k_cache.size(0);
    dense_capacity = k_cache.size(1);
  }
  const int64_t entries = page_size ? table_rows : dense_batch;
  FA3_CHECK(batch_idx || entries == batch_size, page_size ? "page_table" : "k_cache", " must have ",
            batch_size, " rows, one for each sequence, got ", entries);
}

void Cache::resolve(int64_t b, Sequence& s) const {
  const int64_t entry = batch_idx ? batch_idx[b] : b;
  const int64_t entries = page_size ? table_rows : dense_batch;
  FA3_CHECK(entry >= 0 && entry < entries, "cache_batch_idx[", b, "] must be in [0, ", entries,
            "), got ", entry);
  s.k_batch = entry;
  if (page_size) s.pages = table + entry * table_stride;
}

void Cache::check_pages(const Sequence& s, int64_t begin, int64_t end) const {
  if (page_size == 0 || begin >= end) return;
  for (int64_t i = begin / page_size; i * page_size < end; ++i)
    FA3_CHECK(is_page(s.pages[i]), "page_table[", s.k_batch, ", ", i, "] must be in [0, ",
              num_pages, "), got ", s.pages[i]);
}

Tensor contiguous_rows(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : torch::stable::contiguous(t);
}

AttentionCall::AttentionCall(const AttentionArguments& args)
    : args_(args),
      packed_q_(args.cu_seqlens_q.has_value()),
      packed_k_(args.cu_seqlens_k.has_value()) {
  check_attention_dtype(args.q.scalar_type(), "q");
  check_dim(args.q, packed_q_ ? 3 : 4, "q");
  check_dim(args.k, packed_k_ ? 3 : 4, "k");
  check_dim(args.v, packed_k_ ? 3 : 4, "v");
  check_keys_dtype(args.q, args.k, args.v);
  q_ = contiguous_rows(args.q);
  k_ = contiguous_rows(args.k);
  v_ = contiguous_rows(args.v);
  attention.q = rows_of(q_);
  attention.k = rows_of(k_);
  attention.v = rows_of(v_);
  set_heads();
  set_masks(args);
  set_sequences(args);
  set_scores(args);
}

void AttentionCall::set_heads() {
  Attention& a = attention;
  a.nheads = q_.size(-2);
  a.nheads_k = k_.size(-2);
  a.headdim = q_.size(-1);
  a.headdim_v = v_.size(-1);
  FA3_CHECK(a.nheads_k > 0 && a.nheads % a.nheads_k == 0, "nheads of q (", a.nheads,
            ") must be a multiple of nheads_k (", a.nheads_k, ")");
  FA3_CHECK(
      a.headdim >= 1 && a.headdim <= kMaxHeadDim && a.headdim_v >= 1 && a.headdim_v <= kMaxHeadDim,
      "headdim and headdim_v must be in [1, ", kMaxHeadDim, "], got ", a.headdim, " and ",
      a.headdim_v);
  FA3_CHECK(k_.size(-1) == a.headdim, "k must have the headdim of q, ", a.headdim, ", got ",
            shape_of(k_));
  for (int64_t i = 0; i < k_.dim() - 1; ++i)
    FA3_CHECK(k_.size(i) == v_.size(i), "v must have the shape of k up to headdim, ", shape_of(k_),
              ", got ", shape_of(v_));
}

void AttentionCall::set_sequences(const AttentionArguments& args) {
  const int64_t batch = packed_q_ ? args.cu_seqlens_q->size(0) - 1 : q_.size(0);
  FA3_CHECK(batch >= 0, "cu_seqlens_q must have batch_size + 1 entries, got 0");
  const Lengths cu_seqlens_q(args.cu_seqlens_q, batch + 1, "cu_seqlens_q");
  const Lengths cu_seqlens_k(args.cu_seqlens_k, batch + 1, "cu_seqlens_k");
  const Lengths seqused_q(args.seqused_q, batch, "seqused_q");
  const Lengths seqused_k(args.seqused_k, batch, args.seqused_k_name);
  const Lengths leftpad(args.cache_leftpad, batch, "cache_leftpad");
  const Lengths cache_start(args.cache_start, batch, "cache_start");
  std::optional<Cache> cache;
  if (!packed_k_) cache.emplace(k_, args.page_table, args.cache_batch_idx, batch);

  for (int64_t b = 0; b < batch; ++b) {
    Sequence s{b, 0, packed_q_ ? 0 : q_.size(1), 0, 0, 0, nullptr};
    if (packed_q_) {
      check_segment(cu_seqlens_q, b, q_.size(0), "cu_seqlens_q");
      s.q_begin = cu_seqlens_q[b];
      s.q_len = cu_seqlens_q[b + 1] - s.q_begin;
    }
    if (seqused_q) {
      FA3_CHECK(seqused_q[b] >= 0 && seqused_q[b] <= s.q_len, "seqused_q[", b, "] must be in [0, ",
                s.q_len, "], got ", seqused_q[b]);
      s.q_len = seqused_q[b];
    }
    if (packed_k_) {
      check_segment(cu_seqlens_k, b, k_.size(0), "cu_seqlens_k");
      s.k_begin = cu_seqlens_k[b];
    }
    const int64_t capacity = packed_k_ ? cu_seqlens_k[b + 1] - s.k_begin : cache->capacity();
    s.k_len = seqused_k ? seqused_k[b] : capacity;
    FA3_CHECK(s.k_len >= 0 && s.k_len <= capacity, args.seqused_k_name, "[", b, "] must be in [0, ",
              capacity, "], got ", s.k_len);
    if (cache) cache->resolve(b, s);
    if (leftpad) {
      FA3_CHECK(leftpad[b] >= 0 && leftpad[b] <= s.k_len, "cache_leftpad[", b, "] must be in [0, ",
                s.k_len, "], got ", leftpad[b]);
      s.k_begin += leftpad[b];
      s.k_len -= leftpad[b];
    }
    if (cache_start) {
      s.k_first = cache_start[b];
      FA3_CHECK(s.k_first >= 0, "cache_start[", b, "] must be at least 0, got ", s.k_first);
      s.k_begin -= s.k_first;
      s.k_len += s.k_first;
    }
    if (s.pages) check_pages(*cache, s);
    sequences_.push_back(s);
  }
  attention.batch_size = batch;
  attention.sequences = sequences_.data();
  attention.page_size = cache ? cache->page_size : 0;
}

void AttentionCall::check_pages(const Cache& cache, Sequence& s) {
  if (s.q_len == 0) return;
  const int64_t begin = s.k_begin + attention.visible(s, 0).begin;
  const int64_t end = s.k_begin + attention.visible(s, s.q_len - 1).end;
  cache.check_pages(s, begin, end);
  if (begin >= end) return;
  const int32_t seen = s.pages[begin / cache.page_size];
  const auto hidden = [&](int32_t id) { return !cache.is_page(id); };
  const int32_t* last = s.pages + (s.k_begin + s.k_len + cache.page_size - 1) / cache.page_size;
  if (std::none_of(s.pages, last, hidden)) return;
  tables_.emplace_back(s.pages, last);
  std::replace_if(tables_.back().begin(), tables_.back().end(), hidden, seen);
  s.pages = tables_.back().data();
}

void AttentionCall::set_masks(const AttentionArguments& args) {
  FA3_CHECK(args.attention_chunk >= 0, "attention_chunk must be at least 0, got ",
            args.attention_chunk);
  FA3_CHECK(args.window_size.size() == 2, "window_size must be (left, right)");
  constexpr int64_t kFar = int64_t(1) << 40;  // beyond any length; sums of it do not overflow
  attention.window_left = std::min(args.window_size[0], kFar);
  attention.window_right = args.causal ? 0 : std::min(args.window_size[1], kFar);
  attention.attention_chunk = std::min(args.attention_chunk, kFar);
}

void AttentionCall::set_scores(const AttentionArguments& args) {
  Attention& a = attention;
  if (args.qv) {
    check_shape(*args.qv, shape_like_q(a.headdim_v), "qv");
    check_dtype(*args.qv, a.q.dtype, "qv");
    kept_.push_back(contiguous_rows(*args.qv));
    a.qv = rows_of(kept_.back());
  }
  const auto descale = [&](const Rows& of, const MaybeTensor& t, const char* name) {
    return is_narrow(of.dtype) ? descales_of(t, a.batch_size, a.nheads_k, name) : Scalars();
  };
  a.q_descale = descale(a.q, args.q_descale, "q_descale");
  a.k_descale = descale(a.k, args.k_descale, "k_descale");
  a.v_descale = descale(a.v, args.v_descale, "v_descale");
  const auto as_float = [&](const Tensor& t) {
    kept_.push_back(torch::stable::to(t, ScalarType::Float));
    return scalars_of(kept_.back());
  };
  if (args.alibi_slopes) {
    const bool per_batch = args.alibi_slopes->dim() == 2;
    check_shape(*args.alibi_slopes,
                per_batch ? std::vector<int64_t>{a.batch_size, a.nheads} : std::vector{a.nheads},
                "alibi_slopes");
    a.alibi_slopes = as_float(*args.alibi_slopes);
  }
  if (args.sinks) {
    check_shape(*args.sinks, {a.nheads}, "sinks");
    a.sinks = as_float(*args.sinks);
  }

  const int64_t qk_width = a.headdim + (args.qv ? a.headdim_v : 0);
  a.softmax_scale = args.softmax_scale.value_or(1.0 / std::sqrt(double(qk_width)));
  FA3_CHECK(std::isfinite(a.softmax_scale), "softmax_scale must be finite, got ", a.softmax_scale);
  FA3_CHECK(std::isfinite(args.softcap) && args.softcap >= 0,
            "softcap must be finite and at least 0, got ", args.softcap);
  a.softcap = args.softcap;
}

std::vector<int64_t> AttentionCall::shape_like_q(int64_t width) const {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < q_.dim() - 1; ++i) shape.push_back(q_.size(i));
  shape.push_back(width);
  return shape;
}

std::vector<int64_t> AttentionCall::lse_shape() const {
  if (packed_q_) return {attention.nheads, q_.size(0)};
  return {q_.size(0), attention.nheads, q_.size(1)};
}

Scalars AttentionCall::lse_view(const Tensor& lse) const {
  Scalars view;
  view.data = const_cast<float*>(lse.const_data_ptr<float>());
  view.batch = packed_q_ ? 0 : lse.stride(0);
  view.head = lse.stride(-2);
  view.row = lse.stride(-1);
  return view;
}

bool AttentionCall::covers_q() const {
  int64_t rows = 0;
  for (const Sequence& s : sequences_) rows += s.q_len;
  return rows == (packed_q_ ? q_.size(0) : q_.size(0) * q_.size(1));
}

bool AttentionCall::covers_k() const {
  int64_t rows = 0;
  for (const Sequence& s : sequences_) rows += s.k_len;
  return rows == (packed_k_ ? k_.size(0) : k_.size(0) * k_.size(1));
}

bool AttentionCall::reads(const Tensor& out) const {
  const Span written(out);
  for (const Tensor* t : {&args_.q, &args_.k, &args_.v})
    if (Span(*t).overlaps(written)) return true;
  for (const MaybeTensor* t : {&args_.qv, &args_.page_table, &args_.q_descale, &args_.k_descale,
                               &args_.v_descale, &args_.alibi_slopes, &args_.sinks})
    if (*t && Span(**t).overlaps(written)) return true;
  return false;
}

std::tuple<Tensor, Tensor> AttentionCall::forward(MaybeTensor out) {
  Attention& a = attention;
  const std::vector<int64_t> shape = shape_like_q(a.headdim_v);
  const ScalarType dtype =
      a.q.dtype == ScalarType::Float8_e4m3fn ? ScalarType::BFloat16 : a.q.dtype;
  if (out) {
    check_shape(*out, shape, "out");
    check_dtype(*out, dtype, "out");
    FA3_CHECK(out->stride(-1) == 1 || out->size(-1) == 1,
              "out must have a contiguous last dimension, got stride ", out->stride(-1));
    check_distinct_elements(*out, "out");
    if (reads(*out)) {
      const auto [fresh, lse] = forward(std::nullopt);
      torch::stable::copy_(*out, fresh);
      return {*out, lse};
    }
    mark_written(*out, "out");
  } else {
    out = empty(shape, dtype);
  }
  Tensor lse = empty(lse_shape(), ScalarType::Float);
  if (!covers_q()) {
    torch::stable::zero_(*out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  a.out = rows_of(*out);
  a.softmax_lse = lse_view(lse);
  attention_forward(a);
  return {*out, lse};
}

std::tuple<Tensor, Tensor, Tensor> AttentionCall::backward(const Tensor& dout_, const Tensor& out_,
                                                           const Tensor& softmax_lse,
                                                           const MaybeTensor& dsoftmax_lse) {
  Attention& a = attention;
  FA3_CHECK(!is_narrow(a.k.dtype), torch::headeronly::toString(a.k.dtype), " has no backward");
  const Tensor dout = contiguous_rows(dout_), out = contiguous_rows(out_);
  check_shape(dout, shape_like_q(a.headdim_v), "dout");
  check_shape(out, shape_like_q(a.headdim_v), "out");
  check_dtype(dout, a.q.dtype, "dout");
  check_dtype(out, a.q.dtype, "out");
  check_shape(softmax_lse, lse_shape(), "softmax_lse");
  check_dtype(softmax_lse, ScalarType::Float, "softmax_lse");
  a.dout = rows_of(dout);
  a.out = rows_of(out);
  a.softmax_lse = lse_view(softmax_lse);
  if (dsoftmax_lse) {
    check_shape(*dsoftmax_lse, lse_shape(), "dsoftmax_lse");
    check_dtype(*dsoftmax_lse, ScalarType::Float, "dsoftmax_lse");
    a.dsoftmax_lse = lse_view(*dsoftmax_lse);
  }
  const auto gradient_of = [](const Tensor& t, bool covered) {
    Tensor gradient = empty({t.sizes().begin(), t.sizes().end()}, t.scalar_type());
    if (!covered) torch::stable::zero_(gradient);
    return gradient;
  };
  const Tensor dq = gradient_of(q_, covers_q()), dk = gradient_of(k_, covers_k()),
               dv = gradient_of(v_, covers_k());
  a.dq = rows_of(dq);
  a.dk = rows_of(dk);
  a.dv = rows_of(dv);
  const Tensor delta = torch::stable::new_empty(
      q_, shape_like_q(1), a.is_double() ? ScalarType::Double : ScalarType::Float);
  a.delta = rows_of(delta);
  attention_backward(a);
  return {dq, dk, dv};
}

}  // namespace fa3npu
