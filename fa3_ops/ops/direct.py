"""The short way from the interface to a kernel.

PyTorch's dispatcher takes some 7 microseconds to hand 30 arguments to a composite body in Python,
and as many again to ask an autograd kernel in Python, which finds that no gradient is wanted:
together as much as the shortest attention. A call that only the kernel would see takes neither way.

What tells such a call is private to PyTorch. A version that lacks a part of it gets every call the
ordinary way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fa3_ops.ops.schema import signature

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_TYPES = {
    "Tensor": _TENSORS,
    "Optional[Tensor]": _TENSORS | {type(None)},
    "int": frozenset({int}),
    "Optional[int]": frozenset({int, type(None)}),
    "float": frozenset({float, int}),
    "Optional[float]": frozenset({float, int, type(None)}),
    "bool": frozenset({bool}),
    "Optional[bool]": frozenset({bool, type(None)}),
    "List[int]": frozenset({tuple}),
}


# What a thread includes in every dispatch, outside and inside torch.inference_mode. Dispatch modes,
# fake tensors, tracers and the transforms of torch.func add a key of their own.
_BARE: frozenset[int] = frozenset()
try:
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _any_requires_grad,
        _AutoDispatchBelowAutograd,
        _dispatch_tls_local_include_set,
        _is_any_autocast_enabled,
        _is_torch_function_mode_enabled,
    )

    _outside = DispatchKeySet(DispatchKey.BackendSelect)
    _inside = _outside | DispatchKeySet(DispatchKey.ADInplaceOrView)
    _BARE = frozenset({_outside.raw_repr(), _inside.raw_repr()})
except (ImportError, AttributeError):
    pass


@functools.lru_cache
def _as_declared(op: Any, names: tuple[str, ...] | None, types: tuple[type, ...]) -> bool:
    """Whether arguments have the types of the schema: no subclass, symbol or mistake."""
    s = signature(getattr(op, "default", op))
    declared = dict(zip(s.names, s.types, strict=True))
    return all(t in _TYPES[declared[n]] for n, t in zip(names or s.names, types, strict=True))


def only_the_kernel_sees(
    op: Any, arguments: tuple[object, ...], names: tuple[str, ...] | None = None
) -> bool:
    """Whether nothing between caller and kernel traces, watches, casts or differentiates. names:
    those of the arguments, if all others are at their defaults."""
    return (
        bool(_BARE)
        and not is_compiling()
        and _dispatch_tls_local_include_set().raw_repr() in _BARE
        and not _is_torch_function_mode_enabled()
        and not _is_any_autocast_enabled()
        and _as_declared(op, names, tuple(map(type, arguments)))
        # autograd.is_watched, written out
        and forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and _any_requires_grad(*arguments))
    )


def call(
    op: Any, shortcut: Callable[..., Any], arguments: tuple[object, ...], **out: Tensor
) -> Any:
    """op(*arguments, **out), or shortcut(*arguments, **out), what it comes to in the end."""
    if not only_the_kernel_sees(op, (*arguments, *out.values()) if out else arguments):
        return op(*arguments, **out)
    return take(shortcut, arguments, **out)


def take(shortcut: Callable[..., Any], arguments: tuple[object, ...], **out: Tensor) -> Any:
    """The short way, without asking whether it may be taken."""
    if torch.is_inference_mode_enabled():  # is below autograd
        return shortcut(*arguments, **out)
    with _AutoDispatchBelowAutograd():
        return shortcut(*arguments, **out)
