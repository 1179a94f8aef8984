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

from fa3_ops.ops import checks
from fa3_ops.ops.autograd import below_autograd, is_watched, refuse_forward_mode
from fa3_ops.ops.library import implement
from fa3_ops.ops.schema import name_of, signature, tensors

ops = torch.ops.fa3npu


def _refuse_leaf(x: Tensor, argument: str) -> None:
    for what, leaf in (("a leaf", x), ("a view of a leaf", x._base)):
        if leaf is not None and leaf.is_leaf and leaf.requires_grad:
            raise RuntimeError(
                f"fa3_ops: {argument} is written: {what} Variable that requires grad is being used "
                f"in an in-place operation."
            )


def _refuse_derivatives(op: Any, given: dict[str, Tensor]) -> None:
    name = name_of(op)
    if forward_ad._current_level >= 0:
        refuse_forward_mode(name, given.values())
    if not torch.is_grad_enabled():
        return
    for argument in signature(op).written:
        if argument in given and argument != "out":
            _refuse_leaf(given[argument], argument)
    for argument, x in given.items():
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


def refuse_derivatives(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a call of a writing operator that autograd would have to follow."""
    if is_watched(*args, **kwargs):
        _refuse_derivatives(op, tensors(op, args, kwargs))


def _watch(op: Any) -> None:
    def kernel(keyset: Any, *args: Any, **out: Any) -> Any:
        refuse_derivatives(op, args, out)
        return below_autograd(op, keyset, *args, **out)

    def negated(*args: Any, **out: Any) -> Any:
        """PyTorch's own way with lazily negated tensors wants every operator that writes to return
        what it wrote."""
        given = tensors(op, args, out)
        for argument in signature(op).written:
            checks.not_negated(given[argument], argument)
        return op(*map(_resolved, args), **out)

    implement(op, kernel, "Autograd", with_keyset=True)
    implement(op, negated, "Negative")


def _resolved(x: Any) -> Any:
    return x.resolve_neg() if isinstance(x, Tensor) else x


def register() -> None:
    for op in (
        ops.kvcache_append_.default,
        ops.kvcache_scatter_.default,
        ops.flash_attn_kvcache.out,
        ops.flash_attn_varlen_func.out,
    ):
        _watch(op)
