// The op compiler path (aclop*) that old kernels of torch_npu take: refused by name. And Huawei's
// bounded string functions, which torch_npu links to.
#include <acl/acl_op_compiler.h>

#include <cstdarg>
#include <cstdio>

#include "runtime.h"

extern "C" {

size_t aclGetCompileoptSize(aclCompileOpt) { return 256; }
aclError aclGetCompileopt(aclCompileOpt, char* value, size_t length) {
  snprintf(value, length, "disable");
  return 0;
}
aclError aclSetCompileopt(aclCompileOpt, const char*) { return 0; }

aclError aclopCompileAndExecute(const char* op, int, const aclTensorDesc* const[],
                                const aclDataBuffer* const[], int, const aclTensorDesc* const[],
                                aclDataBuffer* const[], const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream) {
  return cann::fail(ACL_ERROR_API_NOT_SUPPORT, "acl op %s is not emulated", op);
}

int vsnprintf_s(char* to, size_t room, size_t, const char* format, va_list args) {
  return vsnprintf(to, room, format, args);
}
int snprintf_s(char* to, size_t room, size_t count, const char* format, ...) {
  va_list args;
  va_start(args, format);
  int written = vsnprintf_s(to, room, count, format, args);
  va_end(args);
  return written;
}
int strcpy_s(char* to, size_t room, const char* from) {
  snprintf(to, room, "%s", from);
  return 0;
}
}
