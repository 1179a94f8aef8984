"""Garbage calls of every raw operator, one for each seed; fuzz.py makes them.

A call is a sample of fa3_ops.testing with up to three arguments replaced: other shapes, strides,
dtypes, devices, values, or memory shared with another argument.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa3_ops.testing import sample_calls

Call = dict[str, Any]
Random = random.Random
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.bool, torch.complex64),
)
INTS = (0, 1, 2, 3, 7, -1, -2, 2**31 - 1, -(2**31), 2**31, 2**62, 2**63 - 1, -(2**63))
LENGTHS = (0, 1, 2, 3, 5, 8, 9, 17, 32, -1, -2, 2**31 - 1, -(2**31))
FLOATS = (0.0, -0.0, 1.0, -1.0, 30.0, 1e30, -1e30, 5e-324, math.inf, -math.inf, math.nan)
STRANGE = (None, 1, -1, 2.5, True, "text", [1, 2], [], torch.float16)

# ---- Memory ------------------------------------------------------------------------------------


def readable(x: object) -> bool:
    """A tensor whose memory can be looked at."""
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.layout is torch.strided


def memory(x: Tensor) -> Tensor:
    """All bytes of the storage behind x."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def view_of(storage: Tensor, x: Tensor) -> Tensor:
    """What x would be in another storage."""
    fresh = torch.empty(0, dtype=x.dtype)
    return fresh.set_(storage.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def copied(x: Any) -> Any:
    """A tensor of the same strides with memory of its own."""
    return view_of(memory(x).clone(), x) if isinstance(x, Tensor) else x


# ---- Mutations of a tensor ---------------------------------------------------------------------


def resized(x: Tensor, dim: int, size: int) -> Tensor:
    """Its rows repeated."""
    if x.shape[dim] == 0:
        return x.new_zeros([*x.shape[:dim], size, *x.shape[dim + 1 :]])
    return x.transpose(0, dim)[torch.arange(size) % x.shape[dim]].transpose(0, dim).contiguous()


def another_size(rng: Random, x: Tensor, call: Call) -> Any:
    dim = rng.randrange(x.dim())
    return resized(x, dim, rng.choice((0, 1, 2, 3, 4, 9, 16, 33, 64, x.shape[dim] + 1)))


def another_rank(rng: Random, x: Tensor, call: Call) -> Any:
    shape = rng.choice(([1, *x.shape], [*x.shape, 1], [-1], x.shape[1:]))
    return x.reshape(shape) if shape != x.shape[1:] else x[0]


def other_strides(rng: Random, x: Tensor, call: Call) -> Any:
    dim, other = rng.randrange(x.dim()), rng.randrange(x.dim())
    form = rng.randrange(6)
    if form == 0:  # laid out in another order
        return x.transpose(dim, other).contiguous().transpose(dim, other)
    if form == 1:  # every second element
        return torch.stack((x, x), dim + 1).select(dim + 1, 0)
    if form == 2:  # with room behind
        return resized(x, dim, x.shape[dim] + 3).narrow(dim, 1, x.shape[dim])
    if form == 3:  # one for all
        return x.narrow(dim, 0, 1).expand(x.shape)
    if form == 4:  # elements that overlap
        strides = [s if i != dim else rng.choice((0, 1, 2)) for i, s in enumerate(x.stride())]
        return x.as_strided(x.shape, strides)
    return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)  # not aligned


def another_dtype(rng: Random, x: Tensor, call: Call) -> Any:
    return x.to(rng.choice(DTYPES))


def elsewhere(rng: Random, x: Tensor, call: Call) -> Any:
    kinds: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.requires_grad_(),
        lambda x: (x * 1).requires_grad_() * 1,
        torch.nn.Parameter,
    )
    return rng.choice(kinds)(x)


def other_values(rng: Random, x: Tensor, call: Call) -> Any:
    flat = x.flatten()
    for _ in range(rng.randrange(1, 4)):
        value = rng.choice(FLOATS if x.is_floating_point() else LENGTHS)
        flat[rng.randrange(x.numel())] = value
    return flat.view(x.shape)


def shared(rng: Random, x: Tensor, call: Call) -> Any:
    """Memory of another argument."""
    other = rng.choice([y for y in call.values() if readable(y) and y.dtype is x.dtype])
    if rng.random() < 0.3:
        return other
    room = memory(other).numel() // x.element_size() - x.numel()
    whole = torch.empty(0, dtype=x.dtype).set_(other.untyped_storage())
    strides = torch.empty(x.shape, device="meta").stride()
    return whole.as_strided(x.shape, strides, rng.randint(0, room))


OF_TENSORS = (
    *(another_size, another_rank, other_strides, other_strides, another_dtype, elsewhere),
    *(other_values, other_values, shared),
)

# ---- Mutations of a call -----------------------------------------------------------------------


def all_of_one_size(rng: Random, call: Call) -> None:
    """Everything of one size gets another: headdim, heads, batch or rows."""
    tensors = {name: x for name, x in call.items() if readable(x)}
    old, new = rng.choice([n for x in tensors.values() for n in x.shape]), rng.randrange(0, 40)
    for name, x in tensors.items():
        for dim in range(x.dim()):
            if x.shape[dim] == old:
                call[name] = resized(call[name], dim, new)


def all_of_another_dtype(rng: Random, call: Call) -> None:
    dtype = rng.choice(DTYPES)
    for name, x in call.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            call[name] = x.to(dtype)


def all_on_meta(rng: Random, call: Call) -> None:
    for name, x in call.items():
        if isinstance(x, Tensor):
            sizes = [rng.choice(INTS) if rng.random() < 0.02 else n for n in x.shape]
            call[name] = torch.empty(sizes, dtype=x.dtype, device="meta")


def all_with_gradients(rng: Random, call: Call) -> None:
    for x in call.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()


def endless_cache(rng: Random, call: Call) -> None:
    """Caches of more rows than there is memory: one row for all."""
    dim, size = rng.randrange(3), rng.choice((2**31, 2**40, 2**50))
    for name in ("k_cache", "v_cache"):
        x = call[name].narrow(dim, 0, 1)
        call[name] = x.expand(*(size if i == dim else n for i, n in enumerate(x.shape)))


OF_CALLS = (all_of_one_size, all_of_one_size, all_of_another_dtype, all_on_meta, all_with_gradients)


def another_scalar(rng: Random, value: object, kind: str) -> Any:
    if kind == "bool":
        return not value
    if kind == "float":
        return rng.choice(FLOATS)
    if kind == "ScalarType":
        return rng.choice(DTYPES)
    if kind == "List[int]":
        return [rng.choice(INTS) for _ in range(rng.choice((0, 1, 2, 2, 2, 2, 3)))]
    return rng.choice(INTS)


class Calls:
    """Calls of the operators, one for each seed."""

    def __init__(self) -> None:
        self.by_operator: dict[Any, list[Call]] = {}
        self.by_name: dict[str, list[Any]] = {}
        for sample in sample_calls():
            op = sample.operator
            call = {a.name: a.default_value for a in op._schema.arguments}
            call |= dict(zip(call, sample.args, strict=False)) | sample.kwargs
            call = {k: x.detach() if isinstance(x, Tensor) else x for k, x in call.items()}
            self.by_operator.setdefault(op, []).append(call)
            for name, value in call.items():
                self.by_name.setdefault(name, []).append(value)

    def make(self, seed: int) -> tuple[Any, Call, list[str]]:
        """The operator, its arguments, and what was done to them."""
        rng = Random(seed)
        op = rng.choice(list(self.by_operator))
        call = {name: copied(x) for name, x in rng.choice(self.by_operator[op]).items()}
        done: list[str] = []
        if (
            "k_cache" in call
            and isinstance(call.get("cache_seqlens"), Tensor)
            and rng.random() < 0.01
        ):
            endless_cache(rng, call)
            return op, call, ["endless_cache"]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
            done.append(self.mutate(rng, op, call))
        return op, call, done

    def mutate(self, rng: Random, op: Any, call: Call) -> str:
        argument = rng.choice(op._schema.arguments)
        name, value = argument.name, call[argument.name]
        draw = rng.random()
        try:
            if draw < 0.25:
                mutation = rng.choice(OF_CALLS)
                mutation(rng, call)
                return mutation.__name__
            if draw < 0.3:
                call[name] = rng.choice(STRANGE)
                return f"{name}: strange"
            if draw < 0.4:
                call[name] = copied(rng.choice(self.by_name[name]))
                return f"{name}: of another call"
            if isinstance(value, Tensor):
                change = rng.choice(OF_TENSORS)
                call[name] = change(rng, value, call)
                return f"{name}: {change.__name__}"
            kind = re.sub(r"Optional\[(.*)\]", r"\1", str(argument.real_type))
            if kind != "Tensor":
                call[name] = another_scalar(rng, value, kind)
                return f"{name}: another scalar"
        except (RuntimeError, IndexError, ValueError, TypeError):
            pass  # this tensor cannot be changed so
        return "nothing"
