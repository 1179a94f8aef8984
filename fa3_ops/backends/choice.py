"""Which backend serves: the best one that can, or the one asked for by name.

The first of a device's backends without a reason against it serves. If that is not the first of
all, it is a fallback: it warns once, and with FA3NPU_STRICT=1 it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Attention, Gradient, Request
from fa3_ops.backends.fallback import fallback
from fa3_ops.backends.lowering.lengths import Lengths

_asked: ContextVar[str | None] = ContextVar(
    "fa3_ops_backend", default=os.environ.get("FA3NPU_BACKEND") or None
)


@contextmanager
def asking(name: str) -> Iterator[None]:
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_for() -> str | None:
    return _asked.get()


def listed(reasons: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())


def reasons_against(backend: Backend[Any], request: Request, run: Run) -> list[str]:
    """Empty if the backend can serve the request here and now."""
    if backend.reads_lengths and run.lengths is None and run.host_may_wait:
        run.lengths = Lengths.of(run.request)
    reasons = backend.not_supported_reasons(request, run)
    if run.capturing and not backend.capturable:
        reasons = [*reasons, "graph capture"]
    return reasons


def select(request: Request, run: Run) -> tuple[Backend[Any], dict[str, list[str]]]:
    """The backend that serves, and the reasons of the better ones."""
    backends = run.device.backends.get(type(request), [])
    if isinstance(request, Attention) and request.is_narrow:
        backends = [b for b in backends if b.reads_narrow]
    name = asked_for()
    if name is not None:
        asked = _by_name(name, request, run, backends)
        if asked is not None:
            return asked, {}
    reasons: dict[str, list[str]] = {}
    for backend in backends:
        why = reasons_against(backend, request, run)
        if not why:
            if reasons and request.served is not None:
                fallback(f"{request.served} by {backend.name}, because {listed(reasons)}")
            return backend, reasons
        reasons[backend.name] = why
    why_not = listed(reasons) or f"{run.device.device_type} has none for it"
    raise NotImplementedError(f"fa3_ops: no backend can serve the call: {why_not}")


def _by_name(
    name: str, request: Request, run: Run, backends: Sequence[Backend[Any]]
) -> Backend[Any] | None:
    """The backend of this name. None if it is one for other kinds of requests alone: who asks for a
    kernel of attention says nothing of how a cache is written. A gradient is a matter of the
    attention that it belongs to."""
    asked = next((b for b in backends if b.name == name), None)
    if asked is not None:
        why = reasons_against(asked, request, run)
    elif name not in run.device.names():
        known = ", ".join(run.device.names())
        raise ValueError(f"backend must be one of {known}, got {name}")
    elif isinstance(request, Gradient):
        attends = any(b.name == name for b in run.device.backends.get(Attention, []))
        why = ["it has no backward"] if attends else []
    else:
        why = []
    if why:
        raise NotImplementedError(
            f"fa3_ops: backend {name} cannot serve the call: {', '.join(why)}"
        )
    return asked
