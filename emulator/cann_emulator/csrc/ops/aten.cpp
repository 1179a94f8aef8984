// aten ops on npu tensors, run by PyTorch's CPU kernels over the same bytes.
//
// Outside a capture, and without CANNEMU_LAZY, an op runs at once. Otherwise its outputs are
// allocated with the shapes of its meta kernel and the op itself is submitted to the stream, so
// that a capture records it and changes no memory.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <torch/library.h>

#include "../emulator_api.h"

extern "C" const char* aclGetRecentErrMsg();

namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
constexpr int kKernelFailed = 507015;  // ACL_ERROR_RT_AICORE_EXCEPTION

// A function that torch_npu exports. The hooks of torch for these are newer than torch 2.10.
template <class Function>
Function* of_torch_npu(const char* symbol) {
  static void* library = dlopen("libtorch_npu.so", RTLD_LAZY | RTLD_NOLOAD);
  auto* function = reinterpret_cast<Function*>(library ? dlsym(library, symbol) : nullptr);
  TORCH_CHECK(function, "torch_npu has no ", symbol);
  return function;
}

void* current_stream(c10::Device device) {
  // c10_npu::NPUStream::stream() const: an NPUStream is a c10::Stream
  static auto* native = of_torch_npu<void*(const c10::Stream*)>("_ZNK7c10_npu9NPUStream6streamEv");
  c10::Stream stream = c10::impl::VirtualGuardImpl(kNpu).getStream(device);
  return native(&stream);
}

void check(int error) { TORCH_CHECK(error == 0, aclGetRecentErrMsg(), " (error ", error, ")"); }

bool is_npu(const Tensor& t) { return t.defined() && t.device().type() == kNpu; }

// The CPU tensor over an npu tensor's bytes. It does not keep them alive: an op on the device does
// not either.
Tensor host_alias(const Tensor& t) {
  auto options = t.options().device(at::kCPU);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  return at::from_blob(t.mutable_data_ptr(), t.sizes(), t.strides(), options);
}

Tensor owning_alias(const Tensor& t) {
  TORCH_CHECK(is_npu(t), "host(): expected an npu tensor");
  auto options = t.options().device(at::kCPU);
  if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  return at::from_blob(
      t.mutable_data_ptr(), t.sizes(), t.strides(), [storage = t.storage()](void*) {}, options);
}

Tensor empty_npu_like(const Tensor& t, c10::Device device) {
  auto options = t.options().device(device);
  return t.is_non_overlapping_and_dense() ? at::empty_strided(t.sizes(), t.strides(), options)
                                          : at::empty(t.sizes(), options);
}

// Applies fn to every tensor of a value: a tensor, or a list of (optional) tensors.
template <class Fn>
IValue map_tensors(const IValue& value, Fn fn) {
  if (value.isTensor()) return fn(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(fn(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional<Tensor>(fn(*t)) : std::nullopt);
    return list;
  }
  return value;
}

template <class Fn>
void each_tensor(const Stack& values, Fn fn) {
  for (const IValue& value : values)
    map_tensors(value, [&](const Tensor& t) {
      fn(t);
      return t;
    });
}

// A CPU generator at the seed and offset of the npu generator, which moves on: seeding, saving and
// restoring the npu generator thus work as on the device.
at::Generator draw(at::Generator npu) {
  std::lock_guard<std::mutex> lock(npu.mutex());
  uint64_t offset = npu.get_offset();
  npu.set_offset(offset + 4);
  return at::make_generator<at::CPUGeneratorImpl>(npu.current_seed() + 0x9E3779B97F4A7C15 * offset);
}

// The kernel of one op.
class HostKernel final : public c10::OperatorKernel {
 public:
  explicit HostKernel(const c10::OperatorHandle& op) {
    const auto& arguments = op.schema().arguments();
    value_dependent_ =
        op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape);
    random_ = op.hasTag(at::Tag::nondeterministic_seeded);
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].is_out()) out_arguments_.push_back(i);
      if (arguments[i].name() == "indices" &&
          arguments[i].type()->kind() == c10::TypeKind::ListType)
        indexes_ = true;
      if (arguments[i].name() == "generator") generator_argument_ = static_cast<int>(i);
      if (arguments[i].name() == "output_size") output_size_argument_ = static_cast<int>(i);
    }
  }

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const size_t count = op.schema().arguments().size();
    Stack args(stack->end() - count, stack->end());
    torch::jit::drop(*stack, count);
    c10::Device device = device_of(op, args);
    c10::OptionalDeviceGuard guard(device);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    void* stream = current_stream(device);
    Stack results = emu_capturing(stream) ? record(op, args, device, stream)
                    : emu_lazy()          ? postpone(op, args, device, stream)
                                          : run_now(op, args, device);
    stack->insert(stack->end(), results.begin(), results.end());
  }

 private:
  struct Pair {
    Tensor npu, other;
  };
  using Pairs = std::vector<Pair>;

  bool indexes_ = false;  // index, index_put: a list of indices, each a mask, numbers or nothing
  bool value_dependent_, random_;
  std::vector<size_t> out_arguments_;
  int generator_argument_ = -1, output_size_argument_ = -1;

  // The device of the call. Like a real kernel, refuses tensors of several devices.
  c10::Device device_of(const c10::OperatorHandle& op, const Stack& args) const {
    std::optional<c10::Device> device;
    each_tensor(args, [&](const Tensor& t) {
      if (!is_npu(t)) return;
      TORCH_CHECK(!device || *device == t.device(), op.schema().name(),
                  ": Expected all tensors to be on the same device, but found at least two "
                  "devices, ",
                  *device, " and ", t.device(), "!");
      device = t.device();
    });
    if (device && !indexes_) {
      each_tensor(args, [&](const Tensor& t) {
        TORCH_CHECK(!t.defined() || is_npu(t) || t.dim() == 0, op.schema().name(),
                    ": Expected all tensors to be on the same device, but found at least two "
                    "devices, ",
                    *device, " and ", t.device(), "!");
      });
    }
    for (const IValue& value : args)
      if (value.isDevice() && !device) device = value.toDevice();
    c10::impl::VirtualGuardImpl npu(kNpu);
    if (!device) device = npu.getDevice();
    return device->has_index() ? *device : npu.getDevice();
  }

  // Whether the shape of the result, or the result itself, is known only to the device.
  bool needs_values(const Stack& args) const {
    if (output_size_argument_ >= 0 && !args[output_size_argument_].isNone()) return false;
    if (!indexes_) return value_dependent_;
    bool mask = false;
    for (const IValue& value : args)
      if (value.isOptionalTensorList() || value.isTensorList())
        map_tensors(value, [&](const Tensor& t) {
          mask |= t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
          return t;
        });
    return mask;
  }

  // The arguments on another device: the CPU (aliases of the same bytes) or meta.
  template <class Fn>
  Stack convert(const Stack& args, c10::Device device, Pairs& pairs, Fn convert_tensor) const {
    Stack converted;
    for (const IValue& value : args) {
      if (value.isDevice()) {
        converted.emplace_back(device);
      } else if (value.isGenerator()) {
        converted.emplace_back();
      } else {
        converted.push_back(map_tensors(value, [&](const Tensor& t) {
          if (!t.defined()) return t;
          Tensor other = convert_tensor(t);
          if (is_npu(t)) pairs.push_back({t, other});
          return other;
        }));
      }
    }
    return converted;
  }

  std::optional<at::Generator> generator(const Stack& args, c10::Device device) const {
    if (!random_) return std::nullopt;
    if (generator_argument_ >= 0 && args[generator_argument_].isGenerator())
      return args[generator_argument_].toGenerator();
    static auto* of_device = of_torch_npu<const at::Generator&(c10::DeviceIndex)>(
        "_ZN6at_npu6detail22getDefaultNPUGeneratorEa");
    return of_device(device.index());
  }

  // Calls the op on the CPU; random ops draw from the given CPU generator.
  Stack call(const c10::OperatorHandle& op, Stack args, std::optional<at::Generator> random) const {
    if (random && generator_argument_ >= 0) {
      args[generator_argument_] = *random;
      op.callBoxed(&args);
    } else if (random) {  // an op without the argument: it draws from the default generator
      at::Generator cpu = at::detail::getDefaultCPUGenerator();
      auto state = cpu.get_state();
      cpu.set_state(random->get_state());
      op.callBoxed(&args);
      cpu.set_state(state);
    } else {
      op.callBoxed(&args);
    }
    return args;
  }

  static Tensor find(const Pairs& pairs, const Tensor& other) {
    for (const Pair& pair : pairs)
      if (pair.other.is_same(other)) return pair.npu;
    return {};
  }

  Stack run_now(const c10::OperatorHandle& op, const Stack& args, c10::Device device) const {
    Pairs pairs;
    Stack host = convert(args, at::kCPU, pairs,
                         [](const Tensor& t) { return is_npu(t) ? host_alias(t) : t; });
    // Tensors given as out= may have another shape: the op gets empty ones, copied afterwards.
    Pairs outs;
    for (size_t i : out_arguments_)
      host[i] = map_tensors(args[i], [&](const Tensor& t) {
        outs.push_back({t, at::empty({0}, t.options().device(at::kCPU))});
        return outs.back().other;
      });
    auto random = generator(args, device);
    Stack results = call(op, std::move(host), random ? std::optional(draw(*random)) : std::nullopt);
    for (Pair& out : outs) {
      if (out.npu.sizes() != out.other.sizes()) out.npu.resize_(out.other.sizes());
      host_alias(out.npu).copy_(out.other);
    }
    pairs.insert(pairs.begin(), outs.begin(), outs.end());
    for (IValue& result : results)
      result = map_tensors(result, [&](const Tensor& t) {
        if (!t.defined()) return t;
        if (Tensor npu = find(pairs, t); npu.defined()) return npu;
        Tensor npu = empty_npu_like(t, device);
        host_alias(npu).copy_(t);
        return npu;
      });
    return results;
  }

  Stack record(const c10::OperatorHandle& op, const Stack& args, c10::Device device,
               void* stream) const {
    TORCH_CHECK(!needs_values(args), op.schema().name(),
                " cannot be captured: its result depends on values, so it synchronises the stream "
                "(error 107027)");
    each_tensor(args, [&](const Tensor& t) {
      TORCH_CHECK(!t.defined() || is_npu(t) || t.dim() == 0, op.schema().name(),
                  " cannot be captured: it copies a tensor of the host (error 107027)");
    });
    return enqueue(op, args, infer(op, args), device, stream, /*captured=*/true);
  }

  Stack postpone(const c10::OperatorHandle& op, const Stack& args, c10::Device device,
                 void* stream) const {
    std::optional<Inferred> inferred;
    if (!needs_values(args)) {
      try {
        inferred = infer(op, args);
      } catch (const std::exception&) {  // no meta kernel, or wrong arguments: the CPU's op says so
      }
    }
    if (inferred) return enqueue(op, args, *inferred, device, stream, /*captured=*/false);
    check(emu_drain(stream));
    return run_now(op, args, device);
  }

  struct Inferred {
    Stack results;
    Pairs pairs;
  };

  // What the op's meta kernel says about its results.
  Inferred infer(const c10::OperatorHandle& op, const Stack& args) const {
    Inferred inferred;
    inferred.results = convert(args, at::kMeta, inferred.pairs, [](const Tensor& t) {
      if (!is_npu(t) && t.dim() == 0) return t;  // a number: its kind decides the dtype
      return at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta));
    });
    op.callBoxed(&inferred.results);
    return inferred;
  }

  Stack enqueue(const c10::OperatorHandle& op, const Stack& args, const Inferred& inferred,
                c10::Device device, void* stream, bool captured) const {
    for (const Pair& pair : inferred.pairs)  // tensors given as out=
      if (pair.npu.sizes() != pair.other.sizes()) pair.npu.resize_(pair.other.sizes());
    Stack results = inferred.results;
    std::vector<Tensor> targets;  // of every tensor that the op returns
    for (IValue& result : results)
      result = map_tensors(result, [&](const Tensor& t) {
        if (!t.defined()) return t;
        Tensor npu = find(inferred.pairs, t);
        targets.emplace_back();
        if (npu.defined()) return npu;
        npu = empty_npu_like(t, device);
        targets.back() = host_alias(npu);
        return npu;
      });
    Pairs unused;
    // A CPU tensor is read when the op is called, so the queued op gets a copy.
    Stack host = convert(args, at::kCPU, unused, [](const Tensor& t) {
      if (is_npu(t)) return host_alias(t);
      Tensor copy = t.clone();
      if (t.unsafeGetTensorImpl()->is_wrapped_number())  // a Python number: decides the dtype
        copy.unsafeGetTensorImpl()->set_wrapped_number(true);
      return copy;
    });
    auto random = generator(args, device);
    // Each replay draws anew; a queued op draws in the order of the calls.
    auto drawn = random && !captured ? std::optional(draw(*random)) : std::nullopt;
    submit(stream, [this, op, host, targets, random, drawn] {
      Stack values = call(op, host, drawn ? drawn : random ? std::optional(draw(*random)) : drawn);
      size_t i = 0;
      each_tensor(values, [&](const Tensor& t) {
        if (!t.defined()) return;
        if (targets[i].defined()) targets[i].copy_(t);
        ++i;
      });
    });
    return results;
  }

  static void submit(void* stream, std::function<void()> body) {
    auto run = [](void* p) {
      // The work may run in any context, under a dispatch mode for example: use a clean one.
      at::ThreadLocalStateGuard state(clean_state());
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      try {
        (*static_cast<std::function<void()>*>(p))();
        return 0;
      } catch (const c10::Error& error) {
        return emu_fail(kKernelFailed, error.what_without_backtrace());
      } catch (const std::exception& error) {
        return emu_fail(kKernelFailed, error.what());
      }
    };
    check(emu_submit(stream, run, new std::function<void()>(std::move(body)),
                     [](void* p) { delete static_cast<std::function<void()>*>(p); }));
  }

 public:
  static const at::ThreadLocalState& clean_state() {
    static const at::ThreadLocalState state;
    return state;
  }
};

struct SilentWarnings final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Replaces torch_npu's kernel of one aten op. The caller names the ops, see aten.py.
void route(const std::string& name, const std::string& overload) {
  HostKernel::clean_state();  // taken now, while no mode is active
  static auto* library =      // never destroyed: torch_npu's kernels are gone by then
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__,
                         __LINE__);
  SilentWarnings silent;  // the dispatcher warns that a kernel is replaced, as intended
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  std::string full = overload.empty() ? name : name + "." + overload;
  library->impl(full.c_str(),
                torch::CppFunction::makeFromBoxedFunctor(std::make_unique<HostKernel>(op)));
}

}  // namespace

TORCH_LIBRARY(cann_emulator, m) {
  m.def("host(Tensor x) -> Tensor", &owning_alias);
  m.def("route(str name, str overload) -> ()", &route);
}
