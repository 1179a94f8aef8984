// The state that the files of the emulated runtime share: streams, events, captured graphs.
#pragma once
#include <acl/acl.h>
#include <acl/error_codes/rt_error_codes.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace cann {

constexpr size_t kDeviceBytes = 32ull << 30;
constexpr int kMaxDevices = 16;

// Work that a stream runs. Tasks are shared because a captured graph replays them and because a
// task group update replaces them in place. A non-zero result is the error of the stream.
using Task = std::function<int()>;
using TaskPtr = std::shared_ptr<Task>;

struct Stream;

// A captured graph. One lane per stream that took part, run in an order that only the captured
// events restrict: a lane is left behind until another lane waits for it.
struct Graph {
  struct Step {
    TaskPtr task;              // run this, or
    int wait_lane = -1;        // if >= 0: first run that lane ...
    size_t wait_position = 0;  // ... up to this step
  };
  uint32_t id = 0;
  bool capturing = true;
  std::vector<std::vector<Step>> lanes;  // lanes[0] belongs to the stream that began the capture
};
using GraphPtr = std::shared_ptr<Graph>;

struct TaskGroup {
  std::vector<TaskPtr> tasks;
};

struct Stream {
  int id = 0;
  int device = 0;
  std::deque<TaskPtr> queue;  // submitted, not yet run
  uint64_t submitted = 0, done = 0;
  int error = 0;  // sticky: reported by every later synchronisation
  std::string error_text;

  GraphPtr capture;                   // set while this stream is being captured
  int lane = 0;                       // its lane in that graph
  std::map<int, size_t> seen;         // per lane, how far this stream is ordered behind it
  std::shared_ptr<TaskGroup> group;   // open task group (capture)
  std::shared_ptr<TaskGroup> update;  // task group being updated, and its next task
  size_t update_position = 0;
};

struct Event {
  Stream* stream = nullptr;  // null: never recorded, so complete
  uint64_t position = 0;
  GraphPtr capture;  // recorded inside this capture, at:
  std::map<int, size_t> seen;
  std::chrono::steady_clock::time_point time{};
};

// device.cpp
int device_count();
int current_device();
bool process_ends();  // after aclFinalize: Python is about to go

// errors.cpp: aclGetRecentErrMsg gives the text to torch_npu, which puts it in its exception.
aclError fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));
aclError fail_again(int code, const std::string& text);  // an earlier error, reported late
void trace(const char* what);

// stream.cpp
std::recursive_mutex& run_mutex();
Stream* as_stream(aclrtStream stream);  // null is the default stream of the current device
std::vector<Stream*> all_streams();
aclError submit(aclrtStream stream, Task task);
aclError drain(Stream* stream, uint64_t up_to = UINT64_MAX);
aclError drain_all();
bool idle();  // nothing is queued anywhere
bool any_capturing(int device);

// capture.cpp
aclError record_task(Stream* stream, TaskPtr task);
aclError record_wait(Stream* stream, const Event& event);
aclError update_task(Stream* stream, TaskPtr task);  // the next task of the group being updated
bool graphs_alive();

// memory.cpp
bool is_device_memory(const void* p, size_t bytes);
void release_freed_blocks();  // frees what was freed while work was pending
void check_red_zones();

}  // namespace cann

#define TRACE() ::cann::trace(__func__)
