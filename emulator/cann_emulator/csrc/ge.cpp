// The few GE classes that torchair needs to turn an FX graph into a GraphDef, and the registry of
// operator definitions. Graphs are built, never run. Compiled with the old C++ string ABI, as CANN.
#include <graph/ascend_string.h>
#include <graph/gnode.h>
#include <graph/graph.h>
#include <graph/tensor.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "emulator_api.h"

namespace ge {

using Status = uint32_t;
using Options = std::map<AscendString, AscendString>;
constexpr Status kFailed = 1;

AscendString::AscendString(const char_t* const text)
    : name_(text ? std::make_shared<std::string>(text) : nullptr) {}
const char_t* AscendString::GetString() const { return name_ ? name_->c_str() : ""; }
size_t AscendString::GetLength() const { return name_ ? name_->size() : 0; }
size_t AscendString::Hash() const { return std::hash<std::string>()(GetString()); }
bool AscendString::operator<(const AscendString& other) const {
  return strcmp(GetString(), other.GetString()) < 0;
}
bool AscendString::operator==(const AscendString& other) const {
  return strcmp(GetString(), other.GetString()) == 0;
}

// The real class is private to CANN: torchair only calls these members.
class Session {
 public:
  explicit Session(const Options&);
  ~Session();
  Status AddGraph(uint32_t, const Graph&, const Options&);
  Status CompileGraph(uint32_t);
  Status RemoveGraph(uint32_t);
};
Session::Session(const Options&) {}
Session::~Session() {}
Status Session::AddGraph(uint32_t, const Graph&, const Options&) { return 0; }
Status Session::CompileGraph(uint32_t) { return kFailed; }  // all execution begins with this
Status Session::RemoveGraph(uint32_t) { return 0; }

std::string GEGetErrorMsg() {
  return "emulated CANN: GE execution is not emulated; use config.debug.run_eagerly = True";
}
AscendString GEGetWarningMsgV2() { return AscendString(""); }
Status GEInitialize(const Options&) { return 0; }
Status GEFinalize() { return 0; }

Graph::Graph(const char_t*) {}
graphStatus Graph::CopyFrom(const Graph&) { return 0; }
graphStatus Graph::LoadFromSerializedModelArray(const void*, size_t) { return 0; }
graphStatus Graph::SaveToFile(const char_t* path) const {
  if (FILE* file = fopen(path, "w")) fclose(file);
  return 0;
}
std::vector<GNode> Graph::GetAllNodes() const { return {}; }

}  // namespace ge

// Operator definitions: (name, kind) of every input, output and attribute, in order.
using Fields = std::vector<std::pair<ge::AscendString, ge::AscendString>>;

namespace {

struct Definition {
  Fields inputs, outputs, attrs;
};

std::map<std::string, Definition>& definitions() {
  static std::map<std::string, Definition> map;
  return map;
}

Fields parse(const char* text) {  // "query:required,key:dynamic"
  Fields fields;
  std::stringstream stream(text);
  for (std::string field; std::getline(stream, field, ',');) {
    size_t colon = field.find(':');
    fields.emplace_back(field.substr(0, colon).c_str(), field.substr(colon + 1).c_str());
  }
  return fields;
}

}  // namespace

extern "C" {

void emu_register_ir(const char* op, const char* inputs, const char* outputs, const char* attrs) {
  definitions()[op] = Definition{parse(inputs), parse(outputs), parse(attrs)};
}

uint32_t GetRegisteredIrDef(const char* op, Fields& inputs, Fields& outputs, Fields& attrs) {
  auto it = definitions().find(op);
  if (it == definitions().end()) return ge::kFailed;
  inputs = it->second.inputs;
  outputs = it->second.outputs;
  attrs = it->second.attrs;
  return 0;
}
}
