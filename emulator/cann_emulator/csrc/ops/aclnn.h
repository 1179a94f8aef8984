// aclnn ops on the host: the objects behind the handles, and the macro that defines an op.
#pragma once
#include <ATen/ATen.h>
#include <acl/acl.h>

#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "../emulator_api.h"

struct aclTensor {
  at::Tensor tensor;  // over the device's bytes, not owning them
};
struct aclScalar {
  at::Scalar scalar;
};
struct aclIntArray {
  std::vector<int64_t> values;
};
struct aclBoolArray {
  std::vector<char> values;
};
struct aclFloatArray {
  std::vector<float> values;
};
struct aclTensorList {
  std::vector<const aclTensor*> tensors;
};
struct aclScalarList {
  std::vector<const aclScalar*> scalars;
};
struct aclOpExecutor {
  std::function<void()> body;
};

namespace aclnn {

inline at::Tensor value(const aclTensor* tensor) { return tensor ? tensor->tensor : at::Tensor(); }
inline at::Scalar value(const aclScalar* scalar) { return scalar ? scalar->scalar : at::Scalar(1); }

// What an op demands of its inputs. A rule that does not hold refuses the call, with its text.
struct Rule {
  bool holds;
  const char* text;
};
void require(const char* op, std::initializer_list<Rule> rules);

// GetWorkspaceSize of an op: `check` refuses what the op refuses and returns the work to do. An
// exception becomes the error of the call, with its text.
int prepare(uint64_t* workspace, aclOpExecutor** executor,
            const std::function<std::function<void()>()>& check);
// The op itself: submits the work to the stream.
int launch(aclOpExecutor* executor, aclrtStream stream);

}  // namespace aclnn

#define ACLNN_LAUNCH(NAME)                                                            \
  extern "C" int NAME(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) { \
    return aclnn::launch(executor, stream);                                           \
  }
