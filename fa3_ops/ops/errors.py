"""Errors that speak of the caller's arguments.

Lengths, offsets and page ids are tensors: looking at them twice, here and in the kernel, would
cost more than many a call, so the kernel looks once, before it reads or writes anything, and its
complaint becomes a ValueError here. Nor is the type of an argument looked at before something went
wrong with it: then the annotations of the public function say which one it was. In compiled code
errors arrive as what they are.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_MARK = re.compile(r"fa3npu: ([^\n]*)")

# Other names of an argument: what a message calls it, and what the caller may have called it.
_NAMES = (
    ("sinks", "s_aux"),
    ("sinks", "learnable_sink"),
    ("page_table", "block_table"),
    *((name, "qkv") for name in ("q", "k", "v")),
    *((name, "kv") for name in ("k", "v")),
    *((name, "cu_seqlens") for name in ("cu_seqlens_q", "cu_seqlens_k")),
    *((name, "max_seqlen") for name in ("max_seqlen_q", "max_seqlen_k")),
    # Paged keys of flash_attn_varlen_func, packed keys with lengths
    *(("k_cache", "k"), ("v_cache", "v")),
    *((name, "seqused_k") for name in ("cache_seqlens", "cu_seqlens_k")),
    ("cu_seqlens_k", "cache_seqlens"),
    *((name, "cu_seqlens_k") for name in ("cache_seqlens", "seqused_k")),
)
_KINDS = {
    Tensor: "a tensor",
    bool: "True or False",
    int: "an int",
    float: "a number",
    torch.dtype: "a torch.dtype",
    types.NoneType: "None",
}


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


def names_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """as_value_errors of a public function. An argument of a wrong type is a TypeError that names
    it, whatever that led to, and a message uses the names that the caller used."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if torch.compiler.is_compiling():
                raise
            better = _explained(error, function, args, kwargs)
            if better is None:
                raise
            raise better from None

    return wrapper


def _explained(
    error: Exception, function: Callable[..., Any], args: Any, kwargs: Any
) -> Exception | None:
    """The error that names the caller's argument, or None if there is nothing to add to `error`."""
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # not a call of this function
        return None
    hints = typing.get_type_hints(function)
    for name, value in given.items():
        if wrong := _wrong_kind(name, value, hints[name]):
            return wrong
    kernel = _MARK.search(str(error)) if isinstance(error, RuntimeError) else None
    if kernel is None and not isinstance(error, ValueError | TypeError):
        return None
    text = kernel.group(1) if kernel else str(error)
    if re.split(r"\W", text, maxsplit=1)[0] not in given:
        for name, alias in _NAMES:
            if given.get(alias) is not None and given.get(name) is None:
                text = re.sub(rf"\b{name}\b", alias, text)
    if kernel is None:
        return None if text == str(error) else type(error)(text)
    return ValueError(text)


def renamed(error: Exception, **names: str) -> Exception:
    """The same error about arguments of other names."""
    return type(error)(re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), str(error)))


def check_kind(value: object, hint: Any, name: str) -> None:
    """Of an argument that no operator gets."""
    if wrong := _wrong_kind(name, value, hint):
        raise wrong


def check_kinds(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """check_kind of every argument of a function."""
    for name, hint in typing.get_type_hints(function).items():
        if name in arguments:
            check_kind(arguments[name], hint, name)


def _wrong_kind(name: str, value: Any, hint: Any) -> Exception | None:
    """The error, if the annotation does not allow the value. What an operator takes for an int, a
    float or a bool, such as a NumPy number, is allowed."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    if kinds == (types.NoneType,) or object in kinds:
        return None
    if any(typing.get_origin(kind) is Sequence for kind in kinds):
        if _fits(value, Sequence):
            return None
        return TypeError(f"{name} must be (left, right), ints or None, got {value!r}")
    if not any(_fits(value, kind) for kind in kinds):
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        got = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
        return TypeError(f"{name} must be {wanted}, got {got}")
    if type(value) is int and int in kinds:
        bits = 31 if Tensor in kinds else 63  # beside a tensor it becomes one, of int32
        if not -(2**bits) <= value < 2**bits:
            return ValueError(f"{name} must be less than 2**{bits}, got {value}")
    return None


def _fits(value: Any, kind: Any) -> bool:
    if kind in (int, float, bool) and isinstance(
        value, torch.SymInt | torch.SymFloat | torch.SymBool
    ):
        return True
    convert = {int: operator.index, float: _number, bool: _flag, Sequence: _sides}.get(kind)
    if convert is None:
        return isinstance(value, kind)
    try:
        convert(value)
    except Exception:
        return False
    return True


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:
    return value is not None and bool(_number(value))


def _sides(window_size: Any) -> list[int | None]:
    given = () if window_size is None else window_size
    sides = [None if side is None else operator.index(side) for side in given]
    if any(side is not None and abs(side) >= 2**63 for side in sides):
        raise OverflowError
    return sides
