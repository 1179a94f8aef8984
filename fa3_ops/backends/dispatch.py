"""Where PyTorch's dispatcher hands calls over.

On a device whose kernels are Python, under its dispatch key. On one whose kernels are compiled,
calls go to them without Python, until somebody asks for a backend or adds one: then they pass here,
under the key that PyTorch has for choosing a backend.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fa3_ops.backends import choice, devices
from fa3_ops.backends.backend import Backend
from fa3_ops.backends.call import KINDS, Request, request_of
from fa3_ops.backends.devices import Device
from fa3_ops.backends.repeated import Kept, Repeated, forget, key_of, note, settled
from fa3_ops.backends.run import choose, serve
from fa3_ops.ops.library import implement
from fa3_ops.ops.schema import full_name_of, signature


def operators() -> list[Any]:
    """The overloads that have kernels."""
    ops = torch.ops.fa3npu
    return [
        ops.flash_attn_func.default,
        ops.flash_attn_func_backward.default,
        ops.flash_attn_varlen_func.default,
        ops.flash_attn_varlen_func.out,
        ops.flash_attn_varlen_func_backward.default,
        ops.flash_attn_kvcache.default,
        ops.flash_attn_kvcache.out,
        ops.kvcache_append_.default,
        ops.kvcache_scatter_.default,
        ops.linear.default,
        ops.apply_rotary.default,
        ops.flash_attn_combine.default,
        ops.get_scheduler_metadata.default,
    ]


def _serve(op: Any, request: Request, compiled: Callable[[], Any] | None = None) -> Any:
    results = serve(request, compiled)
    return results[1] if op._overloadname == "out" else results  # which returns softmax_lse alone


def serve_by_python(device: Device) -> None:
    """Registers kernels for the device's dispatch key."""
    assert device.key is not None
    for op in operators():
        kernel = _repeating_kernel(op) if device.repeats else _python_kernel(op)
        implement(op, kernel, device.key)


def _python_kernel(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return _serve(op, request_of(op, args, kwargs))

    return kernel


def _repeating_kernel(op: Any) -> Callable[..., Any]:
    """The same, which looks for an earlier call of the kind first."""
    kept: Kept[Repeated] = Kept()
    of_out, names = op._overloadname == "out", signature(op).names

    def first(key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        choice = choose(request_of(op, args, kwargs))
        served = settled(op, choice)
        note(served)
        if served is None:
            return choice.serve()
        served = served.among({name: i for i, name in enumerate((*names[: len(args)], *kwargs))})
        results = served((*args, *kwargs.values()))
        kept.keep(key, served)
        return results

    def kernel(*args: Any, **kwargs: Any) -> Any:
        arguments = (*args, *kwargs.values()) if kwargs else args
        key = key_of(arguments)
        served = kept.get(key)
        if served is None:
            results = first(key, args, kwargs)
        else:
            note(served)
            results = served(arguments)
        return results[1] if of_out else results

    return kernel


_lock = threading.Lock()
_interceptors = 0
_library: Any = None


def intercept() -> None:
    """Lets calls on devices with compiled kernels be chosen for here, until `release`. From the
    first time on they pass here: another thread may be in a kernel that was taken away."""
    global _interceptors, _library
    with _lock:
        _interceptors += 1
        if _library is None:
            _library = torch.library.Library("fa3npu", "FRAGMENT")
            for op in operators():
                kernel = _choosing_kernel(op)
                _library.impl(full_name_of(op), kernel, "BackendSelect", with_keyset=True)


def release() -> None:
    global _interceptors
    with _lock:
        _interceptors -= 1


def is_intercepting() -> bool:
    """Whether calls on devices with compiled kernels may be served by others."""
    return _interceptors > 0


def _choosing_kernel(op: Any) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        below = keyset.remove(torch._C.DispatchKey.BackendSelect)
        if _interceptors == 0:
            return op.redispatch(below, *args, **kwargs)
        compiled = partial(op.redispatch, below, *args, **kwargs)
        request = request_of(op, args, kwargs)
        device = devices.of(request.device)
        if device.key is not None or not device.backends:
            return compiled()
        return _serve(op, request, compiled)

    return kernel


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serves the calls inside with the backend of this name (such as "flash_attn_npu",
    "flash_attn_3", "cpu", "torch"), or raises: NotImplementedError with the reasons why it
    cannot, ValueError where the device of a call has none of that name. Operators that no backend
    of this name is for are chosen as usual, but a gradient of an attention that one is for. The
    environment variable FA3NPU_BACKEND, set before fa3_ops is imported, does the same for a whole
    process."""
    intercept()
    try:
        with choice.asking(name):
            yield
    finally:
        release()


def add_backend(
    device: str, kind: type[Request], backend: Backend[Any], *, first: bool = False
) -> None:
    """Adds a backend for one kind of request on the devices of a type: as the last resort, which
    serves what no other can or who asks for it, or as the first choice."""
    if kind not in KINDS:
        names = ", ".join(sorted(known.__name__ for known in KINDS))
        raise TypeError(f"kind must be one of {names}, got {kind!r}")
    found = devices.named(device)
    backends = found.backends.setdefault(kind, [])
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or name in (other.name for other in backends):
        raise ValueError(f"backend must have a name of its own, got {name!r}")
    backends.insert(0 if first else len(backends), backend)
    forget()
    if found.key is None:
        intercept()


def remove_backend(device: str, kind: type[Request], backend: Backend[Any]) -> None:
    """Undoes add_backend."""
    found = devices.named(device)
    found.backends[kind].remove(backend)
    forget()
    if found.key is None:
        release()
