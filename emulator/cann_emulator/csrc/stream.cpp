// Streams. Under CANNEMU_LAZY work runs only when something synchronises with it, so a missing
// stream wait gives wrong numbers every time; otherwise it runs when it is submitted.
#include <array>
#include <cstdlib>

#include "emulator_api.h"
#include "runtime.h"

namespace {

using cann::as_stream;
using cann::drain;
using cann::fail;
using cann::Stream;
using cann::submit;

const bool lazy = getenv("CANNEMU_LAZY") != nullptr;
// Global containers are never destroyed: Python may free tensors and graphs until the very end.
auto& default_streams = *new std::array<Stream, cann::kMaxDevices>;
auto& created_streams = *new std::vector<Stream*>;  // streams stay, since events point at them
int queued = 0;                                     // tasks on all queues

aclError create(aclrtStream* stream) {
  std::lock_guard<std::recursive_mutex> lock(cann::run_mutex());
  auto* created = new Stream;
  created_streams.push_back(created);
  created->id = static_cast<int>(created_streams.size());
  created->device = cann::current_device();
  *stream = created;
  return 0;
}

}  // namespace

namespace cann {

std::recursive_mutex& run_mutex() {
  static auto& mutex = *new std::recursive_mutex;
  return mutex;
}

Stream* as_stream(aclrtStream stream) {
  if (stream) return static_cast<Stream*>(stream);
  Stream* default_stream = &default_streams[current_device()];
  default_stream->device = current_device();
  return default_stream;
}

std::vector<Stream*> all_streams() {
  std::lock_guard<std::recursive_mutex> lock(run_mutex());
  std::vector<Stream*> streams = created_streams;
  for (auto& stream : default_streams) streams.push_back(&stream);
  return streams;
}

aclError submit(aclrtStream handle, Task task) {
  Stream* stream = as_stream(handle);
  if (!lazy && !stream->capture && !stream->update) return task();
  std::lock_guard<std::recursive_mutex> lock(run_mutex());
  auto shared = std::make_shared<Task>(std::move(task));
  if (stream->capture) return record_task(stream, shared);
  if (stream->update) return update_task(stream, shared);
  stream->queue.push_back(shared);
  ++queued;
  ++stream->submitted;
  return 0;
}

aclError drain(Stream* stream, uint64_t up_to) {
  std::lock_guard<std::recursive_mutex> lock(run_mutex());
  while (stream->done < up_to && !stream->queue.empty()) {
    TaskPtr task = std::move(stream->queue.front());
    stream->queue.pop_front();
    --queued;
    ++stream->done;
    int error = (*task)();
    if (error && !stream->error) {
      stream->error = error;
      stream->error_text = aclGetRecentErrMsg();
    }
  }
  release_freed_blocks();
  int error = std::exchange(stream->error, 0);
  return error ? fail_again(error, stream->error_text) : 0;
}

aclError drain_all() {
  aclError first = 0;
  for (Stream* stream : all_streams()) {
    aclError error = drain(stream);
    if (!first) first = error;
  }
  return first;
}

bool idle() {
  std::lock_guard<std::recursive_mutex> lock(run_mutex());
  return queued == 0;
}

bool any_capturing(int device) {
  for (Stream* stream : all_streams())
    if (stream->capture && stream->device == device) return true;
  return false;
}

}  // namespace cann

extern "C" {

int emu_submit(void* stream, int (*fn)(void*), void* arg, void (*destroy)(void*)) {
  std::shared_ptr<void> owner(arg, [destroy](void* p) {
    if (destroy && !cann::process_ends()) destroy(p);
  });
  return submit(stream, [fn, owner] { return fn(owner.get()); });
}

int emu_drain(void* stream) { return aclrtSynchronizeStream(stream); }
int emu_capturing(void* stream) { return as_stream(stream)->capture != nullptr; }
int emu_lazy() { return lazy; }
int emu_pending() { return queued; }

aclError aclrtCreateStream(aclrtStream* stream) {
  TRACE();
  return create(stream);
}
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  TRACE();
  return create(stream);
}
aclError aclrtDestroyStream(aclrtStream stream) { return drain(as_stream(stream)); }
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

aclError aclrtSynchronizeStream(aclrtStream stream) {
  TRACE();
  if (as_stream(stream)->capture)
    return fail(ACL_ERROR_RT_STREAM_CAPTURED, "synchronisation of a stream during its capture");
  return drain(as_stream(stream));
}
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) {
  return aclrtSynchronizeStream(stream);
}

// "Not ready" is seen at least once per queued task, and each query runs one, so that polling ends.
aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  Stream* stream = as_stream(handle);
  if (stream->capture)
    return fail(ACL_ERROR_RT_STREAM_CAPTURED, "query of a stream during its capture");
  *status = stream->queue.empty() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return drain(stream, stream->done + 1);
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  *id = as_stream(stream)->id;
  return 0;
}

aclError aclrtLaunchHostFunc(aclrtStream stream, void (*fn)(void*), void* arg) {
  TRACE();
  return submit(stream, [=] {
    fn(arg);
    return 0;
  });
}
aclError aclrtLaunchCallback(aclrtCallback fn, void* arg, aclrtCallbackBlockType,
                             aclrtStream stream) {
  return aclrtLaunchHostFunc(stream, fn, arg);
}

// Settings that change nothing here.
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return 0; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return 0; }
aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
  *flag = 0;
  return 0;
}
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) { return 0; }
aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return 0; }
aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return 0; }
}
