"""Calls like an earlier one.

Of a call on a device everything is decided by its numbers and by the shapes, strides, dtypes and
alignment of its tensors: whether it is right, which backend serves it, how it is lowered, which
compiled kernels are started on which grids. Lengths are on the device and decide nothing here. So a
second call of the same kind brings its tensors and starts the kernels: a step of a decode is over
sooner than the host could decide all that anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, Generic, TypeVar

from torch import Tensor

from fa3_ops.backends.call import Attention, Request, arguments_of
from fa3_ops.backends.choice import asked_for
from fa3_ops.backends.devices import is_current, on
from fa3_ops.backends.lowering.alignment import BYTES
from fa3_ops.backends.lowering.completion import complete
from fa3_ops.backends.run import Choice

MOST = 1024  # kinds of calls that are kept, some kilobytes each

T = TypeVar("T")


class Kept(Generic[T]):
    """What was found out for calls, by their keys. All is forgotten when it becomes too much."""

    def __init__(self) -> None:
        self.found: dict[Any, T] = {}
        self.get = self.found.get

    def keep(self, key: Any, value: T) -> None:
        if len(self.found) >= MOST:
            self.found.clear()
        self.found[key] = value


_generation = 0  # is part of every key: what is still being decided must not outlive it either


def forget() -> None:
    """Of all operators: another backend may serve now."""
    global _generation
    _generation += 1


PLAIN = frozenset({type(None), bool, int, float, tuple})


def key_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Equal for calls of an operator that differ in nothing but where their tensors lie. A kernel
    that was compiled for what starts at whole 16 bytes reads anything else wrongly."""
    return (
        asked_for(),
        _generation,
        *[
            a
            if type(a) in PLAIN
            else (a.shape, a.stride(), a.dtype, a.data_ptr() % BYTES, a.get_device(), a.is_neg())
            if isinstance(a, Tensor)
            else tuple(a)
            if type(a) is list
            else a
            for a in arguments
        ],
    )


class Repeated:
    """One operator's calls of one kind."""

    def __init__(
        self, launch: Callable[[Any], Any], request: Request, names: Mapping[str, str]
    ) -> None:
        """names: of the operator's arguments, by the request's fields that are tensors."""
        self.launch, self.names = launch, names
        self.kind, self.device = type(request), request.device
        self.numbers = {n: x for n, x in vars(request).items() if not isinstance(x, Tensor)}
        self.fields: tuple[tuple[str, int], ...] = ()

    def among(self, places: Mapping[str, int]) -> Repeated:
        """For arguments of which those of these names are there."""
        found = copy(self)
        found.fields = tuple((field, places[name]) for field, name in self.names.items())
        return found

    def __call__(self, arguments: Sequence[Any]) -> Any:
        request = object.__new__(self.kind)
        values = request.__dict__
        values.update(self.numbers)
        for name, i in self.fields:
            values[name] = arguments[i]
        if is_current(self.device):
            results = self.launch(request)
        else:
            with on(self.device):
                results = self.launch(request)
        if isinstance(request, Attention) and request.out is not None:
            return complete(request, request, *results)
        return results


def settled(op: Any, choice: Choice) -> Repeated | None:
    """For calls of op like the one of which this is the choice; None where other things decide, or
    somebody wants to be told of the choice."""
    request, backend = choice.asked, choice.backend
    if choice.refusals or not request is choice.prepared is choice.lowered:
        return None
    if backend.reads_lengths or not backend.capturable:
        return None
    launch = backend.settle(request)
    if launch is None:
        return None
    fields = arguments_of(type(request), op)  # type: ignore[arg-type]
    return Repeated(
        launch, request, {f: n for f, n in fields if isinstance(vars(request)[f], Tensor)}
    )


_noting = threading.local()


@contextmanager
def noting() -> Iterator[list[Repeated | None]]:
    """How the operators inside were served, in order."""
    around, _noting.seen = getattr(_noting, "seen", None), []
    try:
        yield _noting.seen
    finally:
        _noting.seen = around


def note(served: Repeated | None) -> None:
    seen = getattr(_noting, "seen", None)
    if seen is not None:
        seen.append(served)
