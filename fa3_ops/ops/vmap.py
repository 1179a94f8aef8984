"""Rules for torch.func.vmap, which also per-sample gradients and jacrev are made of: a dense batch
takes the mapped dimension in; every other operator is called for one entry after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fa3_ops.ops.library import implement
from fa3_ops.ops.schema import name_of, signature

ops = torch.ops.fa3npu
_BATCHED = ("dout", "q", "k", "v", "out", "softmax_lse", "dsoftmax_lse")


def _folds(names: Sequence[str], in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> bool:
    """Whether all that belongs to a batch entry can be put into one larger batch: what else there
    is must be the same for every entry."""
    return all(
        name in _BATCHED or not isinstance(x, Tensor) or (dim is None and x.dim() <= 1)
        for name, dim, x in zip(names, in_dims, args, strict=False)
    )


def _fold(op: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    def fold(name: str, dim: int | None, x: Any) -> Any:
        if name not in _BATCHED or x is None:
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    results = op(*map(fold, signature(op).names, in_dims, args))
    unfolded = (x.unflatten(0, (info.batch_size, len(x) // info.batch_size)) for x in results)
    return tuple(unfolded), (0,) * len(results)


def _loop(op: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    def entry(i: int) -> Any:
        return [
            x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
            for dim, x in zip(in_dims, args, strict=True)
        ]

    results = [op(*entry(i)) for i in range(info.batch_size)]
    if results[0] is None:
        return None, None
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _linear(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """Entries that share weight and bias are rows of one x."""
    (x, *shared), (x_dim, *others) = args, in_dims
    if x_dim is None or any(dim is not None for dim in others):
        return _loop(ops.linear, info, in_dims, args)
    return ops.linear(x.movedim(x_dim, 0), *shared), 0


def _map(op: Any) -> None:
    names, written = signature(op).names, signature(op).written
    folds = name_of(op) in ("flash_attn_func", "flash_attn_func_backward")

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        for name, dim in zip(names, in_dims, strict=False):
            if name in written and dim is None:
                raise NotImplementedError(
                    f"fa3_ops: {name_of(op)} under vmap must have a batched {name}: every entry "
                    f"would write the same one"
                )
        one_batch = folds and info.batch_size > 0 and _folds(names, in_dims, args)
        return (_fold if one_batch else _loop)(op, info, in_dims, args)

    torch.library.register_vmap(op, rule)


def _refuse(op: Any) -> None:
    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"fa3_ops: {name_of(op)} with out= has no vmap")

    implement(op, kernel, "FuncTorchBatched")


def register() -> None:
    _refuse(ops.flash_attn_varlen_func.out)
    _refuse(ops.flash_attn_kvcache.out)
    torch.library.register_vmap(ops.linear.default, _linear)
    for op in (
        ops.flash_attn_func.default,
        ops.flash_attn_func_backward.default,
        ops.flash_attn_varlen_func.default,
        ops.flash_attn_varlen_func_backward.default,
        ops.flash_attn_kvcache.default,
        ops.kvcache_append_.default,
        ops.kvcache_scatter_.default,
        ops.apply_rotary.default,
        ops.flash_attn_combine.default,
        ops.get_scheduler_metadata.default,
    ):
        _map(op)
