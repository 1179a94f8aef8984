// Events: a position in a stream, or in a lane of the graph being captured.
#include "runtime.h"

namespace {

using cann::as_stream;
using cann::drain;
using cann::Event;
using cann::fail;
using cann::Stream;

Event* as_event(aclrtEvent event) { return static_cast<Event*>(event); }

aclError captured(const char* what) {
  return fail(ACL_ERROR_RT_EVENT_CAPTURED, "%s an event that was recorded in a capture", what);
}

}  // namespace

extern "C" {

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) {
  *event = new Event;
  return 0;
}
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) {
  *event = new Event;
  return 0;
}
aclError aclrtDestroyEvent(aclrtEvent event) {
  delete as_event(event);
  return 0;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  TRACE();
  std::lock_guard<std::recursive_mutex> lock(cann::run_mutex());
  Stream* stream = as_stream(stream_handle);
  Event* event = as_event(handle);
  event->stream = stream;
  event->position = stream->submitted;
  event->capture = stream->capture;
  event->seen = stream->seen;
  event->time = std::chrono::steady_clock::now();
  return 0;
}

aclError aclrtResetEvent(aclrtEvent event, aclrtStream) {
  as_event(event)->stream = nullptr;
  return 0;
}

aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
  TRACE();
  std::lock_guard<std::recursive_mutex> lock(cann::run_mutex());
  Stream* stream = as_stream(stream_handle);
  Event* event = as_event(handle);
  if (!event->stream) return 0;
  if (event->capture) {
    if (!event->capture->capturing) return captured("wait for");
    return cann::record_wait(stream, *event);
  }
  if (stream->capture)
    return fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                "a capturing stream waits for an event that was recorded outside the capture");
  // A copy of the position: the event may be recorded again before the wait runs.
  return cann::submit(stream_handle, [other = event->stream, position = event->position] {
    return drain(other, position);
  });
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  TRACE();
  Event* event = as_event(handle);
  if (event->capture) return captured("synchronisation with");
  return event->stream ? drain(event->stream, event->position) : 0;
}

// As aclrtStreamQuery: a query that finds work before the event runs one task of it.
aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  Event* event = as_event(handle);
  if (event->capture) return captured("query of");
  *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
  if (!event->stream || event->stream->done >= event->position) return 0;
  *status = ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return drain(event->stream, event->stream->done + 1);
}

aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return 0;
}

// Times are those of the recording call: the emulator has no clock of the device.
aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
  using Milliseconds = std::chrono::duration<float, std::milli>;
  *milliseconds = Milliseconds(as_event(end)->time - as_event(start)->time).count();
  return 0;
}
aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* microseconds) {
  *microseconds = std::chrono::duration_cast<std::chrono::microseconds>(
                      as_event(event)->time.time_since_epoch())
                      .count();
  return 0;
}
}
