// Error text and tracing.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "emulator_api.h"
#include "runtime.h"

namespace cann {

static thread_local std::string recent_error;

aclError fail(int code, const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  recent_error = std::string("emulated CANN: ") + text;
  return code;
}

aclError fail_again(int code, const std::string& text) {
  recent_error = text;
  return code;
}

void trace(const char* what) {
  static const bool on = getenv("CANNEMU_TRACE") != nullptr;
  if (on) fprintf(stderr, "[cann_emulator] %s\n", what);
}

}  // namespace cann

extern "C" {

int emu_fail(int code, const char* text) { return cann::fail(code, "%s", text); }

// Every function of CANN that has no emulation ends in one of these, see build.py.
long emu_harmless(const char* name) {
  cann::trace(name);
  return 0;
}
long emu_unemulated(const char* name) {
  cann::trace(name);
  return cann::fail(ACL_ERROR_API_NOT_SUPPORT, "%s is not emulated", name);
}
long emu_abort(const char* name) {
  fprintf(stderr, "[cann_emulator] %s is not emulated\n", name);
  abort();
}

const char* aclGetRecentErrMsg() {
  return cann::recent_error.empty() ? nullptr : cann::recent_error.c_str();
}
}
