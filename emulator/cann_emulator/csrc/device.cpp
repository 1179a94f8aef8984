// Process, devices, contexts, versions, core counts.
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace {

using cann::fail;

struct Context {
  int device;
};
Context contexts[cann::kMaxDevices];
thread_local Context* current_context = nullptr;
int initialised = 0;
bool finalised = false;

constexpr uint32_t kCubeCores = 24, kVectorCores = 48;
constexpr int64_t kL2Bytes = 192 << 20;
constexpr char kCannVersion[] = "9.1.0";

uint32_t core_count(aclrtDevResLimitType type) {
  return type == ACL_RT_DEV_RES_CUBE_CORE ? kCubeCores : kVectorCores;
}

std::map<int, int64_t> system_options;

}  // namespace

namespace cann {

int device_count() {
  const char* text = getenv("CANNEMU_DEVICES");
  return text ? atoi(text) : 1;
}

bool process_ends() { return finalised; }

int current_device() { return current_context ? current_context->device : 0; }

}  // namespace cann

extern "C" {

aclError aclInit(const char*) {
  TRACE();
  return initialised++ ? ACL_ERROR_REPEAT_INITIALIZE : 0;
}

aclError aclFinalize() {
  TRACE();
  initialised = 0;
  aclError error = cann::drain_all();
  cann::check_red_zones();
  finalised = true;
  return error;
}

const char* aclrtGetSocName() {
  TRACE();
  const char* name = getenv("CANNEMU_SOC");
  return name ? name : "Ascend910B1";
}

aclError aclrtGetDeviceCount(uint32_t* count) {
  TRACE();
  *count = cann::device_count();
  return 0;
}

aclError aclrtSetDevice(int32_t device) {
  TRACE();
  if (device < 0 || device >= cann::device_count() || device >= cann::kMaxDevices)
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "no device %d", device);
  contexts[device].device = device;
  current_context = &contexts[device];
  return 0;
}

aclError aclrtGetDevice(int32_t* device) {
  if (!current_context) return ACL_ERROR_RT_CONTEXT_NULL;
  *device = current_context->device;
  return 0;
}

aclError aclrtResetDevice(int32_t) {
  TRACE();
  current_context = nullptr;
  return 0;
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  if (!current_context) return ACL_ERROR_RT_CONTEXT_NULL;
  *context = current_context;
  return 0;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  current_context = static_cast<Context*>(context);
  return 0;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  if (flags) *flags = 0;
  *active = current_context && current_context->device == device;
  return 0;
}

aclError aclrtSynchronizeDevice() {
  TRACE();
  if (cann::any_capturing(cann::current_device()))
    return fail(ACL_ERROR_RT_STREAM_CAPTURED, "device synchronisation during a capture");
  aclError error = cann::drain_all();
  cann::check_red_zones();
  return error;
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
  *value = info == ACL_DEVICE_INFO_AI_CORE_NUM       ? kCubeCores
           : info == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? kVectorCores
                                                     : kL2Bytes;
  return 0;
}

aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t* value) {
  TRACE();
  *value = attribute == ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE
               ? static_cast<int64_t>(cann::kDeviceBytes)
               : 0;
  return 0;
}

aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  static const aclCannAttr supported[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16,
                                          ACL_CANN_ATTR_JIT_COMPILE};
  *list = supported;
  *count = 3;
  return 0;
}

aclError aclGetCannAttribute(aclCannAttr, int32_t* value) {
  *value = 1;
  return 0;
}

aclError aclsysGetVersionStr(char*, char* version) {
  strcpy(version, kCannVersion);
  return 0;
}

aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  memset(version, 0, sizeof *version);
  strcpy(version->version, kCannVersion);
  strcpy(version->majorVersion, "9");
  strcpy(version->minorVersion, "1");
  strcpy(version->releaseVersion, "0");
  return 0;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return 0;
}

// Options and limits that change nothing here.
aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return 0; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return 0; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return 0; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return 0; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return 0; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return 0; }

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  system_options[option] = value;
  return 0;
}
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  *value = system_options[option];
  return 0;
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  return aclrtSetSysParamOpt(option, value);
}
aclError aclrtCtxGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  return aclrtGetSysParamOpt(option, value);
}

aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType type, uint32_t* value) {
  *value = core_count(type);
  return 0;
}
aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type, uint32_t* value) {
  *value = core_count(type);
  return 0;
}
aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t* value) {
  *value = core_count(type);
  return 0;
}
aclError aclrtSetDeviceResLimit(int32_t, aclrtDevResLimitType, uint32_t) { return 0; }
aclError aclrtSetStreamResLimit(aclrtStream, aclrtDevResLimitType, uint32_t) { return 0; }
aclError aclrtResetDeviceResLimit(int32_t) { return 0; }
aclError aclrtResetStreamResLimit(aclrtStream) { return 0; }
aclError aclrtUseStreamResInCurrentThread(aclrtStream) { return 0; }
aclError aclrtUnuseStreamResInCurrentThread(aclrtStream) { return 0; }
}
