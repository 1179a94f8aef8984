// A call of CANN's fused attention, whatever the version of the op and the layout of its tensors.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "aclnn.h"

namespace attention {

using at::Tensor;
using Lengths = std::optional<std::vector<int64_t>>;

constexpr int64_t kMaskSize = 2048;  // of the triangle that sparse_mode 2, 3 and 4 take
enum SparseMode { kDefault = 0, kAllMask = 1, kLeftUpCausal = 2, kRightDownCausal = 3, kBand = 4 };
// What has a scale of its own; a single number is per channel, too.
enum AntiquantMode { kPerChannel = 0, kPerToken = 1, kPerHead = 2, kPerTokenAndHead = 3 };

struct Call {
  Tensor query, key, value, mask, block_table, query_rope, key_rope, sink, key_scale, value_scale;
  Tensor out, lse;
  Lengths q_lengths, kv_lengths;
  int64_t num_heads, num_kv_heads, pre_tokens, next_tokens, sparse_mode, inner_precise, block_size;
  int64_t key_antiquant_mode, value_antiquant_mode;
  double scale;
  bool want_lse;
  std::string layout;
  bool unsupported_input;  // an input that is not emulated was given

  bool tnd() const { return layout == "TND"; }
  bool paged() const { return block_table.defined(); }
  bool rope() const { return query_rope.defined(); }
  // int8 keys and values beside a wider query.
  bool antiquant() const { return key.scalar_type() == at::kChar; }
  int64_t batch() const { return tnd() ? q_lengths->size() : query.size(0); }
  int64_t max_q() const { return tnd() ? query.size(0) : query.size(layout == "BNSD" ? 2 : 1); }
  int64_t headdim() const { return layout == "BSH" ? query.size(2) / num_heads : query.size(-1); }
  int64_t headdim_v() const { return per_head(value); }
  // Without TND, a single query row takes the decode kernel, which knows no sparse_mode.
  bool decode() const { return !tnd() && max_q() == 1 && !rope(); }
  bool triangle() const { return sparse_mode >= kLeftUpCausal; }

  // The heads of a tensor that is not paged; `expected` where BSH does not tell.
  int64_t heads(const Tensor& t, int64_t expected) const {
    if (layout == "BSH") return t.size(2) % expected == 0 ? expected : 0;
    return t.size(layout == "BNSD" ? 1 : -2);
  }
  int64_t per_head(const Tensor& t) const {
    bool merged = t.dim() == 3 && (paged() || layout == "BSH");
    return merged ? t.size(2) / num_kv_heads : t.size(-1);
  }
  int64_t kv_length(int64_t b) const {
    if (!kv_lengths) return key.size(layout == "BNSD" ? 2 : 1);
    if (tnd() && !paged()) return (*kv_lengths)[b] - (b ? (*kv_lengths)[b - 1] : 0);
    return kv_lengths->size() == 1 ? kv_lengths->front() : (*kv_lengths)[b];
  }
  int64_t kv_room() const {
    if (paged()) return block_table.size(1) * block_size;
    return key.size(tnd() ? 0 : layout == "BNSD" ? 2 : 1);
  }
  int64_t q_length(int64_t b) const {
    if (tnd()) return (*q_lengths)[b] - (b ? (*q_lengths)[b - 1] : 0);
    if (!q_lengths || max_q() == 1) return max_q();  // documented as ignored when Q_S is 1
    return q_lengths->size() == 1 ? q_lengths->front() : (*q_lengths)[b];
  }
};

// Refuses what CANN documents as unsupported, and what is not emulated. In attention_rules.cpp.
void check_call(const Call& call);

}  // namespace attention
