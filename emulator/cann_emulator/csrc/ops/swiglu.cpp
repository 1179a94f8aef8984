// aclnnSwiGlu: the first half of a dimension, through SiLU, times the second.
#include "aclnn.h"

using aclnn::value;

extern "C" int aclnnSwiGluGetWorkspaceSize(const aclTensor* x, int64_t dim, const aclTensor* out,
                                           uint64_t* workspace, aclOpExecutor** executor) {
  return aclnn::prepare(workspace, executor, [&] {
    aclnn::require("aclnnSwiGlu", {{value(x).size(dim) % 2 == 0, "x must have two equal halves"}});
    return [x = value(x), dim, out = value(out)] {
      auto halves = x.to(at::kFloat).chunk(2, dim);
      out.copy_(at::silu(halves[0]) * halves[1]);
    };
  });
}

ACLNN_LAUNCH(aclnnSwiGlu)
