// The handles that aclnn ops take (aclTensor, aclScalar, ...), and how an op runs.
#include <ATen/core/LegacyTypeDispatch.h>

#include "aclnn.h"

namespace {

at::ScalarType scalar_type(aclDataType type) {
  switch (static_cast<int>(type)) {
    case ACL_FLOAT:
      return at::kFloat;
    case ACL_FLOAT16:
      return at::kHalf;
    case ACL_BF16:
      return at::kBFloat16;
    case ACL_DOUBLE:
      return at::kDouble;
    case ACL_BOOL:
      return at::kBool;
    case ACL_INT8:
      return at::kChar;
    case ACL_UINT8:
      return at::kByte;
    case ACL_INT16:
      return at::kShort;
    case ACL_INT32:
      return at::kInt;
    case ACL_INT64:
      return at::kLong;
    case ACL_FLOAT8_E5M2:
      return at::kFloat8_e5m2;
    case ACL_FLOAT8_E4M3FN:
      return at::kFloat8_e4m3fn;
    case ACL_COMPLEX64:
      return at::kComplexFloat;
    case ACL_COMPLEX128:
      return at::kComplexDouble;
    default:
      TORCH_CHECK(false, "emulated CANN: aclDataType ", static_cast<int>(type), " is not emulated");
  }
}

template <class Array, class T>
Array* copy_array(const T* values, uint64_t n) {
  return new Array{{values, values + n}};
}

int run(void* executor) {
  // The work may run in any context: autograd's kernels must not see it.
  at::AutoDispatchBelowADInplaceOrView guard;
  try {
    static_cast<aclOpExecutor*>(executor)->body();
    return 0;
  } catch (const c10::Error& error) {
    return emu_fail(ACL_ERROR_RT_AICORE_EXCEPTION, error.what_without_backtrace());
  }
}

}  // namespace

namespace aclnn {

void require(const char* op, std::initializer_list<Rule> rules) {
  for (const Rule& rule : rules) TORCH_CHECK(rule.holds, op, ": ", rule.text);
}

int prepare(uint64_t* workspace, aclOpExecutor** executor,
            const std::function<std::function<void()>()>& check) {
  *workspace = 0;
  try {
    *executor = new aclOpExecutor{check()};
    return 0;
  } catch (const c10::Error& error) {
    return emu_fail(ACL_ERROR_INVALID_PARAM, error.what_without_backtrace());
  }
}

int launch(aclOpExecutor* executor, aclrtStream stream) {
  return emu_submit(stream, run, executor, [](void* p) { delete static_cast<aclOpExecutor*>(p); });
}

}  // namespace aclnn

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dim, aclDataType type,
                           const int64_t* strides, int64_t offset, aclFormat, const int64_t*,
                           uint64_t, void* data) {
  auto options = at::TensorOptions().dtype(scalar_type(type));
  auto* begin = static_cast<char*>(data) + offset * options.dtype().itemsize();
  return new aclTensor{at::from_blob(begin, {sizes, dim}, {strides, dim}, options)};
}
aclScalar* aclCreateScalar(void* value, aclDataType type) {
  return new aclScalar{at::from_blob(value, {}, scalar_type(type)).item()};
}
aclIntArray* aclCreateIntArray(const int64_t* v, uint64_t n) {
  return copy_array<aclIntArray>(v, n);
}
aclBoolArray* aclCreateBoolArray(const bool* v, uint64_t n) {
  return copy_array<aclBoolArray>(v, n);
}
aclFloatArray* aclCreateFloatArray(const float* v, uint64_t n) {
  return copy_array<aclFloatArray>(v, n);
}
aclTensorList* aclCreateTensorList(const aclTensor* const* v, uint64_t n) {
  return copy_array<aclTensorList>(v, n);
}
aclScalarList* aclCreateScalarList(const aclScalar* const* v, uint64_t n) {
  return copy_array<aclScalarList>(v, n);
}

int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  delete executor;
  return 0;
}
int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return 0;
}
int aclDestroyScalar(const aclScalar* scalar) {
  delete scalar;
  return 0;
}
int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return 0;
}
int aclDestroyBoolArray(const aclBoolArray* array) {
  delete array;
  return 0;
}
int aclDestroyFloatArray(const aclFloatArray* array) {
  delete array;
  return 0;
}
int aclDestroyTensorList(const aclTensorList* list) {
  for (const aclTensor* tensor : list->tensors) delete tensor;
  delete list;
  return 0;
}
int aclDestroyScalarList(const aclScalarList* list) {
  for (const aclScalar* scalar : list->scalars) delete scalar;
  delete list;
  return 0;
}
}
