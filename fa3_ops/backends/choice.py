"""The choice of a backend: automatic, by name, strict."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

from fa3_ops.backends.attention import Attention


class Backend(Protocol):
    name: str

    def not_supported_reasons(self, call: Attention) -> list[str]:
        """Why this backend cannot serve the call; empty if it can. Looks at shapes and
        dtypes, and at lengths where the host has read them."""


BackendT = TypeVar("BackendT", bound=Backend)


class FallbackWarning(UserWarning):
    """A call was served by a slower way than the best one of its device."""


_asked: ContextVar[str | None] = ContextVar("fa3_ops_backend", default=None)
_warned: set[str] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serves the calls inside with the backend of this name ("flash_attn_npu",
    "fused_infer_attention", "torch"), or raises NotImplementedError with the reasons. The
    environment variable FA3NPU_BACKEND does the same for a whole process."""
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_for() -> str | None:
    return _asked.get() or os.environ.get("FA3NPU_BACKEND")


def fallback(message: str) -> None:
    """Warns once per message, or raises with FA3NPU_STRICT=1."""
    if os.environ.get("FA3NPU_STRICT") == "1":
        raise NotImplementedError(f"fa3_ops: {message} (FA3NPU_STRICT=1)")
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fa3_ops: {message}", FallbackWarning, stacklevel=2)


def listed(reasons: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())


def refusals(backends: Sequence[Backend], call: Attention) -> dict[str, list[str]]:
    """The reasons of the backends before the first that can serve the call."""
    reasons: dict[str, list[str]] = {}
    for backend in backends:
        why = backend.not_supported_reasons(call)
        if not why:
            break
        reasons[backend.name] = why
    return reasons


def choose(backends: Sequence[BackendT], call: Attention) -> BackendT:
    """The first backend that can serve the call, or the one asked for by name."""
    name = asked_for()
    if name is not None:
        backend = next((b for b in backends if b.name == name), None)
        if backend is None:
            known = ", ".join(b.name for b in backends)
            raise ValueError(f"backend must be one of {known}, got {name}")
        if why := backend.not_supported_reasons(call):
            raise NotImplementedError(
                f"fa3_ops: backend {name} cannot serve the call: {', '.join(why)}"
            )
        return backend
    reasons = refusals(backends, call)
    if len(reasons) == len(backends):
        raise NotImplementedError(f"fa3_ops: no backend can serve the call: {listed(reasons)}")
    backend = backends[len(reasons)]
    if reasons:
        fallback(f"served by {backend.name}, because {listed(reasons)}")
    return backend
