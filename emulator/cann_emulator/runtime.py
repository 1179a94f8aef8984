"""Loads the emulated CANN, then torch and torch_npu; the Python side of csrc/emulator_api.h."""

import contextlib
import ctypes
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping

from .build import LIB, LIBRARIES, ensure

if "torch_npu" in sys.modules:
    raise ImportError("import cann_emulator before torch_npu")
ensure()

# With torch_npu's task queue, the error of an op is raised by a later one, and the ops in between
# are lost without a word.
os.environ.setdefault("TASK_QUEUE_ENABLE", "0")


@contextlib.contextmanager
def _no_backend_autoload() -> Iterator[None]:
    """torch must not import torch_npu by itself: libopapi, which needs torch, comes in between."""
    name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    before = os.environ.get(name)
    os.environ[name] = "0"
    yield
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before


_rt = ctypes.CDLL(str(LIB / "libascendcl.so"), mode=ctypes.RTLD_GLOBAL)
for _name in LIBRARIES[1:]:
    ctypes.CDLL(str(LIB / f"lib{_name}.so"), mode=ctypes.RTLD_GLOBAL)
with _no_backend_autoload():
    import torch
for _name in ("opapi", "nnopbase"):  # torch_npu opens these by name, and finds them loaded
    ctypes.CDLL(str(LIB / f"lib{_name}.so"))
with contextlib.redirect_stdout(sys.stderr):  # torch_npu prints that there is no CANN
    import torch_npu  # noqa: F401

from . import allocator, atb, aten, ir  # noqa: E402

_RunFn = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_DestroyFn = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_rt.emu_submit.argtypes = [ctypes.c_void_p, _RunFn, ctypes.c_void_p, _DestroyFn]
_rt.emu_drain.argtypes = [ctypes.c_void_p]
_rt.emu_fail.argtypes = [ctypes.c_int, ctypes.c_char_p]
_rt.aclGetRecentErrMsg.restype = ctypes.c_char_p

_KERNEL_FAILED = 507015  # ACL_ERROR_RT_AICORE_EXCEPTION

_keys = itertools.count(1)
_functions: dict[int, Callable[[], object]] = {}
_errors: dict[int, BaseException] = {}  # of functions that ran while they were submitted


@_RunFn
def _run(key: int) -> int:
    try:
        # The queue may run within any mode of the caller's: the work must not be traced by it.
        # What it writes may be an inference tensor.
        with torch._C._DisableTorchDispatch(), torch.inference_mode():
            _functions[key]()
    except BaseException as error:
        _errors[key] = error
        return int(_rt.emu_fail(_KERNEL_FAILED, f"{type(error).__name__}: {error}".encode()))
    return 0


@_DestroyFn
def _destroy(key: int) -> None:
    _functions.pop(key, None)


def host(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU tensor over the same bytes as an npu tensor, which it keeps alive."""
    return torch.ops.cann_emulator.host(tensor)


def submit(fn: Callable[[], object], stream: "torch.npu.Stream | None" = None) -> None:
    """Runs fn() on an npu stream (default: the current one), as a kernel launch would.

    In order; under CANNEMU_LAZY only once something synchronises with it; and while the stream
    captures, not now but at every replay. An exception of fn is raised here if fn runs now, and
    by the synchronisation otherwise.
    """
    stream = stream or torch.npu.current_stream()
    key = next(_keys)
    _functions[key] = fn
    _errors.clear()
    code = _rt.emu_submit(stream.npu_stream, _run, key, _destroy)
    if error := _errors.pop(key, None):
        raise error
    _check(code)


def flush(stream: "torch.npu.Stream | None" = None) -> None:
    """Runs all that is queued on a stream (default: the current one); an error while capturing."""
    _check(_rt.emu_drain((stream or torch.npu.current_stream()).npu_stream))


def pending() -> int:
    """Tasks that are queued on all streams and have not run."""
    return int(_rt.emu_pending())


def register_ir(
    op: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    attrs: Mapping[str, str] | None = None,
) -> None:
    """Defines a GE operator, as an operator package of CANN would, for torchair's ge.custom_op.

    Inputs and outputs map names, in order, to "required", "optional" or "dynamic"; attributes map
    names to GE's types, such as "VT_INT", "VT_FLOAT", "VT_BOOL", "VT_STRING", "VT_LIST_INT".
    """
    fields = (",".join(f"{k}:{v}" for k, v in (m or {}).items()) for m in (inputs, outputs, attrs))
    _rt.emu_register_ir(op.encode(), *(text.encode() for text in fields))


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"{_rt.aclGetRecentErrMsg().decode()} (error {code})")


if os.environ.get("PYTORCH_NO_NPU_MEMORY_CACHING") == "1":
    allocator.install()
aten.install()
atb.install()
for _op in ir.REGISTERED:
    register_ir(_op, **ir.definition(_op))
