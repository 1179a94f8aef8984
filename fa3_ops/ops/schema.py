"""The arguments of an operator by name. csrc/schemas.cpp lists them; nothing else has to."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# What the operators of a cache call otherwise.
COMMON_NAMES = {"k_cache": "k", "v_cache": "v", "cache_seqlens": "seqused_k"}


@dataclass(frozen=True)
class Signature:
    """What a schema says, read once."""

    names: tuple[str, ...]
    types: tuple[str, ...]  # "Tensor", "Optional[Tensor]", "int", "List[int]", ...
    defaults: Mapping[str, Any]
    written: tuple[str, ...]  # in place, `out` among them
    values: tuple[Any, ...]  # the defaults in order, None where there is none
    lists: tuple[int, ...]  # where lists of numbers are


@functools.cache
def signature(op: Any) -> Signature:
    """Of an overload."""
    arguments = op._schema.arguments
    return Signature(
        names=tuple(a.name for a in arguments),
        types=tuple(str(a.type) for a in arguments),
        defaults={a.name: a.default_value for a in arguments if a.has_default_value()},
        written=tuple(a.name for a in arguments if a.alias_info is not None),
        values=tuple(a.default_value for a in arguments),
        lists=tuple(i for i, a in enumerate(arguments) if str(a.type) == "List[int]"),
    )


def bind(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument by its name. Kernels get them without the last ones that have defaults."""
    s = signature(op)
    return {**s.defaults, **dict(zip(s.names, args, strict=False)), **kwargs}


def every(op: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Every argument in order, lists of numbers as tuples."""
    s = signature(op)
    given = [*args, *s.values[len(args) :]]
    for i in s.lists:
        given[i] = tuple(given[i])
    return tuple(given)


def tensors(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those arguments that are tensors."""
    given = {**dict(zip(signature(op).names, args, strict=False)), **kwargs}
    return {name: x for name, x in given.items() if isinstance(x, Tensor)}


def name_of(op: Any) -> str:
    """Such as "flash_attn_kvcache", for every overload."""
    return str(op._schema.name.removeprefix("fa3npu::"))


def full_name_of(op: Any) -> str:
    """Such as "flash_attn_kvcache.out"."""
    return str(op.name().removeprefix("fa3npu::"))
