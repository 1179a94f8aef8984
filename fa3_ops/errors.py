"""Turns the kernels' complaints about values into the ValueErrors of the public interface.

Lengths, offsets and page ids are tensors: looking at them twice, here and in the kernel, would
cost more than many a call, so the kernel looks once, before it reads or writes anything. In
compiled code the same complaint arrives as the RuntimeError that it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_MARK = re.compile(r"fa3npu: ([^\n]*)")


def as_value_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a kernel's RuntimeError about an argument's value a ValueError with the same text."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            found = _MARK.search(str(error))
            if found is None:
                raise
            raise ValueError(found.group(1)) from None

    return wrapper
