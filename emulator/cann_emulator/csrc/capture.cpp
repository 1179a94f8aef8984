// Graph capture: records tasks instead of running them, and replays them.
#include <cstdio>
#include <unordered_map>

#include "runtime.h"

namespace {

using cann::as_stream;
using cann::fail;
using cann::Graph;
using cann::GraphPtr;
using cann::Stream;
using cann::TaskGroup;

// Never destroyed, see stream.cpp.
auto& graphs = *new std::unordered_map<aclmdlRI, GraphPtr>;
auto& groups = *new std::unordered_map<aclrtTaskGrp, std::shared_ptr<TaskGroup>>;
uint32_t next_graph_id = 1;

// Runs one lane up to a step, and first whatever its steps wait for.
int run_lane(const Graph& graph, std::vector<size_t>& position, int lane, size_t up_to) {
  while (position[lane] < up_to) {
    const Graph::Step& step = graph.lanes[lane][position[lane]++];
    int error =
        step.task ? (*step.task)() : run_lane(graph, position, step.wait_lane, step.wait_position);
    if (error) return error;
  }
  return 0;
}

int replay(const Graph& graph) {
  std::vector<size_t> position(graph.lanes.size(), 0);
  for (size_t lane = 0; lane < graph.lanes.size(); ++lane)
    if (int error = run_lane(graph, position, static_cast<int>(lane), graph.lanes[lane].size()))
      return error;
  return 0;
}

void join(Stream* stream, const GraphPtr& graph) {
  stream->capture = graph;
  stream->lane = static_cast<int>(graph->lanes.size());
  stream->seen.clear();
  graph->lanes.emplace_back();
}

// The steps of a lane up to and including its last task.
size_t length_of_work(const std::vector<Graph::Step>& lane) {
  size_t length = lane.size();
  while (length && !lane[length - 1].task) --length;
  return length;
}

}  // namespace

namespace cann {

bool graphs_alive() {
  std::lock_guard<std::recursive_mutex> lock(run_mutex());
  return !graphs.empty();
}

aclError record_task(Stream* stream, TaskPtr task) {
  auto& lane = stream->capture->lanes[stream->lane];
  Graph::Step step;
  step.task = task;
  lane.push_back(step);
  stream->seen[stream->lane] = lane.size();
  if (stream->group) stream->group->tasks.push_back(task);
  return 0;
}

// A stream that waits for a captured event joins the capture, as on the device.
aclError record_wait(Stream* stream, const Event& event) {
  if (!stream->capture) join(stream, event.capture);
  if (stream->capture != event.capture)
    return fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a wait joins two captures");
  for (auto [lane, position] : event.seen) {
    if (lane == stream->lane || stream->seen[lane] >= position) continue;
    Graph::Step step;
    step.wait_lane = lane;
    step.wait_position = position;
    auto& own = stream->capture->lanes[stream->lane];
    own.push_back(step);
    stream->seen[stream->lane] = own.size();
    stream->seen[lane] = position;
  }
  return 0;
}

aclError update_task(Stream* stream, TaskPtr task) {
  if (stream->update_position >= stream->update->tasks.size())
    return fail(ACL_ERROR_RT_MODEL_UPDATE_FAILED, "a task group is updated with more tasks");
  *stream->update->tasks[stream->update_position++] = *task;
  return 0;
}

}  // namespace cann

extern "C" {

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode) {
  TRACE();
  std::lock_guard<std::recursive_mutex> lock(cann::run_mutex());
  Stream* stream = as_stream(handle);
  if (stream->capture) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is capturing");
  auto graph = std::make_shared<Graph>();
  graph->id = next_graph_id++;
  graphs[graph.get()] = graph;
  join(stream, graph);
  return 0;
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* model) {
  TRACE();
  std::lock_guard<std::recursive_mutex> lock(cann::run_mutex());
  Stream* origin = as_stream(handle);
  GraphPtr graph = origin->capture;
  *model = nullptr;
  if (!graph) return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "no capture to end");
  if (origin->lane != 0)
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "the capture began on another stream");
  bool joined = true;
  for (size_t lane = 1; lane < graph->lanes.size(); ++lane)
    joined &= origin->seen[static_cast<int>(lane)] >= length_of_work(graph->lanes[lane]);
  graph->capturing = false;
  for (Stream* stream : cann::all_streams())
    if (stream->capture == graph) stream->capture = nullptr, stream->seen.clear();
  if (!joined) {
    graphs.erase(graph.get());
    return fail(ACL_ERROR_RT_STREAM_UNJOINED,
                "a stream that took part in the capture was not waited for before its end");
  }
  *model = graph.get();
  return 0;
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status,
                                aclmdlRI* model) {
  const GraphPtr& graph = as_stream(handle)->capture;
  *status = graph ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (model) *model = graph.get();
  return 0;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode*) { return 0; }

aclError aclmdlRIGetId(aclmdlRI model, uint32_t* id) {
  *id = static_cast<Graph*>(model)->id;
  return 0;
}

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
  TRACE();
  auto it = graphs.find(model);
  if (it == graphs.end()) return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such graph");
  return cann::submit(stream, [graph = it->second] { return replay(*graph); });
}

aclError aclmdlRIExecute(aclmdlRI model, int32_t) {
  auto it = graphs.find(model);
  if (it == graphs.end()) return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such graph");
  return replay(*it->second);
}

aclError aclmdlRIDestroy(aclmdlRI model) {
  TRACE();
  {
    std::lock_guard<std::recursive_mutex> lock(cann::run_mutex());
    graphs.erase(model);
  }
  cann::release_freed_blocks();
  return 0;
}

aclError aclmdlRIDebugPrint(aclmdlRI model) {
  auto* graph = static_cast<Graph*>(model);
  for (size_t lane = 0; lane < graph->lanes.size(); ++lane)
    fprintf(stderr, "[cann_emulator] graph %u, stream %zu: %zu steps\n", graph->id, lane,
            graph->lanes[lane].size());
  return 0;
}

// Task groups: tasks of a graph that are replaced between replays (host lengths of attention).
aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
  as_stream(stream)->group = std::make_shared<TaskGroup>();
  return 0;
}
aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp* handle) {
  auto group = std::exchange(as_stream(stream)->group, nullptr);
  *handle = group.get();
  groups[*handle] = group;
  return 0;
}
aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group) {
  Stream* stream = as_stream(handle);
  stream->update = groups.at(group);
  stream->update_position = 0;
  return 0;
}
aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
  Stream* stream = as_stream(handle);
  auto group = std::exchange(stream->update, nullptr);
  if (stream->update_position != group->tasks.size())
    return fail(ACL_ERROR_RT_MODEL_UPDATE_FAILED, "a task group is updated with fewer tasks");
  return 0;
}
}
