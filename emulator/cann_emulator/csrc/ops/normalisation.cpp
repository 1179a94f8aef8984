// aclnnRmsNorm and aclnnAddRmsNorm: rows divided by their root mean square, times gamma. The
// arithmetic is in float32 and rounds once.
#include "aclnn.h"

namespace {

using aclnn::value;
using at::Tensor;

void check(const char* op, const Tensor& x, const Tensor& gamma, const Tensor& y,
           const Tensor& rstd) {
  bool rows = gamma.dim() >= 1 && gamma.dim() <= x.dim() &&
              x.sizes().slice(x.dim() - gamma.dim()) == gamma.sizes();
  aclnn::require(op,
                 {
                     {x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf ||
                          x.scalar_type() == at::kBFloat16,
                      "x must be float32, float16 or bfloat16"},
                     {gamma.scalar_type() == x.scalar_type() || gamma.scalar_type() == at::kFloat,
                      "gamma must have the dtype of x, or float32"},
                     {rows, "gamma must have the shape of the last dimensions of x"},
                     {y.sizes() == x.sizes(), "y must have the shape of x"},
                     {rstd.scalar_type() == at::kFloat, "rstd must be float32"},
                 });
}

void normalise(const Tensor& x, const Tensor& gamma, double epsilon, const Tensor& y,
               const Tensor& rstd) {
  std::vector<int64_t> row;
  for (int64_t d = x.dim() - gamma.dim(); d < x.dim(); ++d) row.push_back(d);
  Tensor wide = x.to(at::kFloat);
  Tensor scale = (wide * wide).mean(row, /*keepdim=*/true).add(epsilon).rsqrt();
  y.copy_(wide * scale * gamma.to(at::kFloat));
  rstd.copy_(scale.view(rstd.sizes()));
}

}  // namespace

extern "C" {

int aclnnRmsNormGetWorkspaceSize(const aclTensor* x_, const aclTensor* gamma_, double epsilon,
                                 const aclTensor* y_, const aclTensor* rstd_, uint64_t* workspace,
                                 aclOpExecutor** executor) {
  return aclnn::prepare(workspace, executor, [&] {
    Tensor x = value(x_), gamma = value(gamma_), y = value(y_), rstd = value(rstd_);
    check("aclnnRmsNorm", x, gamma, y, rstd);
    return [=] { normalise(x, gamma, epsilon, y, rstd); };
  });
}

int aclnnAddRmsNormGetWorkspaceSize(const aclTensor* x1_, const aclTensor* x2_,
                                    const aclTensor* gamma_, double epsilon, const aclTensor* y_,
                                    const aclTensor* rstd_, const aclTensor* sum_,
                                    uint64_t* workspace, aclOpExecutor** executor) {
  return aclnn::prepare(workspace, executor, [&] {
    Tensor x1 = value(x1_), x2 = value(x2_), gamma = value(gamma_);
    Tensor y = value(y_), rstd = value(rstd_), sum = value(sum_);
    check("aclnnAddRmsNorm", x1, gamma, y, rstd);
    aclnn::require("aclnnAddRmsNorm",
                   {
                       {x1.sizes() == x2.sizes() && x1.scalar_type() == x2.scalar_type(),
                        "x1 and x2 must have one shape and dtype"},
                   });
    return [=] {
      sum.copy_(x1 + x2);
      normalise(sum, gamma, epsilon, y, rstd);
    };
  });
}
}

ACLNN_LAUNCH(aclnnRmsNorm)
ACLNN_LAUNCH(aclnnAddRmsNorm)
