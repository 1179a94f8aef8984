"""What autograd has to know of the operators that write their arguments: they behave as
torch.mul(out=) and index_put_ do, except that no gradient goes through a write.

The kernels raise the versions of what they write; here is refused what PyTorch protects, and what
would need a derivative, before anything is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fa3_ops import checks
from fa3_ops.autograd import below_autograd, is_watched, name_of, refuse_forward_mode

ops = torch.ops.fa3npu
_library = torch.library.Library("fa3npu", "IMPL")


def _refuse_leaf(x: Tensor, argument: str) -> None:
    for what, leaf in (("a leaf", x), ("a view of a leaf", x._base)):
        if leaf is not None and leaf.is_leaf and leaf.requires_grad:
            raise RuntimeError(
                f"fa3_ops: {argument} is written: {what} Variable that requires grad is being used "
                f"in an in-place operation."
            )


def _refuse_derivatives(op: Any, tensors: dict[str, Tensor]) -> None:
    name = name_of(op)
    if forward_ad._current_level >= 0:
        refuse_forward_mode(name, tensors.values())
    if not torch.is_grad_enabled():
        return
    for argument in op._schema.arguments:
        if argument.alias_info is not None and argument.name in tensors and not argument.kwarg_only:
            _refuse_leaf(tensors[argument.name], argument.name)
    for argument, x in tensors.items():
        if x.requires_grad and op._overloadname == "out":
            raise RuntimeError(
                f"fa3_ops: {name}(): functions with out=... arguments don't support automatic "
                f"differentiation, but {argument} requires grad."
            )
        if x.requires_grad:
            raise NotImplementedError(
                f"fa3_ops: {name} has no backward: {argument} must not require grad where "
                f"gradients are recorded"
            )


def _tensors(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return {name: x for name, x in given.items() if isinstance(x, Tensor)}


def refuse_derivatives(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a call of a writing operator that autograd would have to follow."""
    if is_watched(*args, **kwargs):
        _refuse_derivatives(op, _tensors(op, args, kwargs))


def register(op: Any) -> None:
    name = op.name().removeprefix("fa3npu::")

    def kernel(keyset: Any, *args: Any, **out: Any) -> Any:
        refuse_derivatives(op, args, out)
        return below_autograd(op, keyset, *args, **out)

    def negated(*args: Any, **out: Any) -> Any:
        """PyTorch's own way with lazily negated tensors wants every operator that writes to return
        what it wrote."""
        tensors = _tensors(op, args, out)
        for argument in op._schema.arguments:
            if argument.alias_info is not None:
                checks.not_negated(tensors[argument.name], argument.name)
        return op(*map(_resolved, args), **out)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
    _library.impl(name, negated, "Negative")


def _resolved(x: Any) -> Any:
    return x.resolve_neg() if isinstance(x, Tensor) else x


for _op in (
    ops.kvcache_append_.default,
    ops.flash_attn_kvcache.out,
    ops.flash_attn_varlen_func.out,
):
    register(_op)
