// The aclnn ops behind torch_npu's copies, casts and fills, and matmul, which its own autograd
// calls directly. All other aten ops run in aten.cpp.
#include "aclnn.h"

using aclnn::prepare;
using aclnn::value;

extern "C" {

int aclnnInplaceCopyGetWorkspaceSize(const aclTensor* to, const aclTensor* from,
                                     uint64_t* workspace, aclOpExecutor** executor) {
  return prepare(workspace, executor,
                 [&] { return [to = value(to), from = value(from)] { to.copy_(from); }; });
}

int aclnnCastGetWorkspaceSize(const aclTensor* from, aclDataType, const aclTensor* to,
                              uint64_t* workspace, aclOpExecutor** executor) {
  return aclnnInplaceCopyGetWorkspaceSize(to, from, workspace, executor);
}

int aclnnMatmulGetWorkspaceSize(const aclTensor* a, const aclTensor* b, const aclTensor* out,
                                int8_t, uint64_t* workspace, aclOpExecutor** executor) {
  return prepare(workspace, executor, [&] {
    return [a = value(a), b = value(b), out = value(out)] { out.copy_(at::matmul(a, b)); };
  });
}

int aclnnInplaceZeroGetWorkspaceSize(const aclTensor* tensor, uint64_t* workspace,
                                     aclOpExecutor** executor) {
  return prepare(workspace, executor, [&] { return [t = value(tensor)] { t.zero_(); }; });
}

int aclnnInplaceOneGetWorkspaceSize(const aclTensor* tensor, uint64_t* workspace,
                                    aclOpExecutor** executor) {
  return prepare(workspace, executor, [&] { return [t = value(tensor)] { t.fill_(1); }; });
}

int aclnnInplaceFillScalarGetWorkspaceSize(const aclTensor* tensor, const aclScalar* scalar,
                                           uint64_t* workspace, aclOpExecutor** executor) {
  return prepare(workspace, executor,
                 [&] { return [t = value(tensor), s = value(scalar)] { t.fill_(s); }; });
}
}

ACLNN_LAUNCH(aclnnInplaceCopy)
ACLNN_LAUNCH(aclnnCast)
ACLNN_LAUNCH(aclnnMatmul)
ACLNN_LAUNCH(aclnnInplaceZero)
ACLNN_LAUNCH(aclnnInplaceOne)
ACLNN_LAUNCH(aclnnInplaceFillScalar)
