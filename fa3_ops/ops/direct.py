"""The short way from the interface to a kernel.

PyTorch's dispatcher takes some 7 microseconds to hand 30 arguments to a composite body in Python,
and as many again to ask an autograd kernel in Python, which finds that no gradient is wanted:
together as much as the shortest attention. A call that only the kernel would see takes neither way.
Nor is it checked in Python, if its kernel refuses all that would be refused there, as those on CPU
do: only once it has, the checks find the words.

What tells such a call is private to PyTorch. A version that lacks a part of it gets every call the
ordinary way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fa3_ops.backends import dispatch
from fa3_ops.ops.schema import every, signature

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


# What the kernels on CPU take of any dtype, or do not read.
_UNCHECKED = frozenset({"alibi_slopes", "sinks", "scheduler_metadata"})
# Without the second of these the first is refused, by no kernel.
_NEEDED = {"cu_seqlens_q": "max_seqlen_q", "cu_seqlens_k": "max_seqlen_k"}
_is_cpu = attrgetter("is_cpu")


class Kind(NamedTuple):
    """What the types of a call's arguments say about it."""

    run: Callable[..., Any]  # the overload without the function in Python that PyTorch puts around
    tensors: Callable[[tuple[object, ...]], tuple[Tensor, ...]]
    checked: bool  # the kernel on CPU checks all but num_splits
    num_splits: int | None  # where it is, None in operators of no attention
    window_size: int  # where it is
    settings: Callable[[tuple[object, ...]], tuple[object, ...]]  # it and what follows, but those
    defaults: tuple[object, ...]  # of the settings


@functools.lru_cache
def _kind(op: Any, types: tuple[type, ...]) -> Kind | None:
    """None if a type is not that of the schema: a subclass, a symbol or a mistake."""
    overload = getattr(op, "default", op)
    s = signature(overload)
    if any(t not in _TYPES[declared] for t, declared in zip(types, s.types, strict=True)):
        return None
    given = {name for name, t in zip(s.names, types, strict=True) if t is not type(None)}
    attends = "num_splits" in s.names
    first = s.names.index("window_size") if attends else 0
    others = [i for i in range(first, len(types)) if s.names[i] not in ("num_splits", "out")]
    settings = itemgetter(*others)
    return Kind(
        run=getattr(overload, "_op", overload),
        tensors=itemgetter(*(i for i, t in enumerate(types) if t in _TENSORS)),
        checked=not given & _UNCHECKED and all(_NEEDED.get(n, n) in given for n in given),
        num_splits=s.names.index("num_splits") if attends else None,
        settings=settings,
        window_size=first,
        defaults=settings(every(overload, types[:first])),
    )


def plain(
    op: Any, arguments: tuple[object, ...], out: Tensor | None = None
) -> tuple[Kind, tuple[Tensor, ...]] | None:
    """The kind and the tensors of a call that nothing between caller and kernel traces, watches,
    casts or differentiates."""
    if (
        not _BARE
        or is_compiling()
        or _dispatch_tls_local_include_set().raw_repr() not in _BARE
        or _is_torch_function_mode_enabled()
        or _is_any_autocast_enabled()
        or forward_ad._current_level >= 0  # autograd.is_watched, written out
    ):
        return None
    if out is not None:
        arguments = (*arguments, out)
    kind = _kind(op, tuple(map(type, arguments)))
    if kind is None:
        return None
    tensors = kind.tensors(arguments)
    return None if torch.is_grad_enabled() and _any_requires_grad(*tensors) else (kind, tensors)


def unchecked(
    kind: Kind, tensors: tuple[Tensor, ...], arguments: tuple[Any, ...], out: Tensor | None = None
) -> Any:
    """The results, or NotImplemented where the kernel does not check all, or refuses something."""
    if not kind.checked or dispatch.is_intercepting() or not all(map(_is_cpu, tensors)):
        return NotImplemented
    if kind.num_splits is not None:
        if not -1 <= arguments[kind.num_splits] < 2**63:
            return NotImplemented
        # PyTorch fills in defaults faster than it converts what is given.
        if kind.settings(arguments) == kind.defaults:
            arguments = arguments[: kind.window_size]
    try:
        return take(kind.run, arguments, out)
    except (RuntimeError, ValueError, TypeError):
        return NotImplemented


def call(
    op: Any,
    check: Callable[[], object],
    arguments: tuple[object, ...],
    out: Tensor | None = None,
) -> Any:
    """op(*arguments), or op(*arguments, out=out), after check()."""
    found = plain(op, arguments, out)
    if found is None:
        check()
        return op(*arguments) if out is None else op(*arguments, out=out)
    results = unchecked(*found, arguments, out)
    if results is NotImplemented:
        check()
        results = take(found[0].run, arguments, out)
    return results


def take(
    shortcut: Callable[..., Any], arguments: tuple[object, ...], out: Tensor | None = None
) -> Any:
    """The short way, without asking whether it may be taken."""
    if out is not None:
        shortcut = partial(shortcut, out=out)
    if torch.is_inference_mode_enabled():  # is below autograd
        return shortcut(*arguments)
    with _AutoDispatchBelowAutograd():
        return shortcut(*arguments)
