"""Slower ways are taken loudly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class FallbackWarning(UserWarning):
    """A call was served by a slower way than the best one of its device."""


_warned: set[str] = set()
_explaining: ContextVar[bool] = ContextVar("fa3_ops_explaining", default=False)


@contextmanager
def explaining() -> Iterator[None]:
    """Inside, nothing is served, and so nothing falls back."""
    token = _explaining.set(True)
    try:
        yield
    finally:
        _explaining.reset(token)


def fallback(message: str) -> None:
    """Warns once per message, or raises with FA3NPU_STRICT=1."""
    if _explaining.get():
        return
    if os.environ.get("FA3NPU_STRICT") == "1":
        raise NotImplementedError(f"fa3_ops: {message} (FA3NPU_STRICT=1)")
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fa3_ops: {message}", FallbackWarning, stacklevel=2)
