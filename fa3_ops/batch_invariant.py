"""Whole models whose rows do not depend on the batch that they are computed in.

    fa3_ops.batch_invariant.convert(model)           # its nn.Linear layers
    with fa3_ops.batch_invariant.BatchInvariantMode():
        model(...)                                   # all of its products with matrices

On CPU, PyTorch's own products give a row other bits in another number of rows, and so do some of
its activations at the ends of vectors. docs/design.md says what is covered and what is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fa3_ops.backends import devices
from fa3_ops.interface import linear
from fa3_ops.ops.checks import WIDE

__all__ = ["BatchInvariantMode", "Linear", "convert", "linear"]

_DTYPES = (*WIDE, torch.float64)
_DEVICES = devices.names()
_UNSTEADY = [name for name in _DEVICES if not devices.named(name).steady_sums]


class Linear(nn.Linear):
    """nn.Linear by fa3_ops.linear."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def convert(module: nn.Module) -> nn.Module:
    """Makes every nn.Linear in the module a Linear, in place: parameters, hooks and names stay.
    Classes derived from nn.Linear, which may compute something else, are left alone.

    Returns the module; an nn.Linear itself is converted too.
    """
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear
    return module


# ---- Products ----------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(input, weight, bias)


def _mm(input: Tensor, mat2: Tensor) -> Tensor:
    return linear(input, mat2.t())


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if beta == 1 and alpha == 1 and input.dim() == 1 and len(input) == mat2.shape[1]:
        return linear(mat1, mat2.t(), input)
    product = linear(mat1, mat2.t())
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else product + (input if beta == 1 else beta * input)


def _bmm(input: Tensor, mat2: Tensor) -> Tensor:
    if len(input) == 0 or len(input) != len(mat2):
        return torch.bmm(input, mat2)
    return torch.stack([linear(x, y.t()) for x, y in zip(input, mat2, strict=True)])


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    if other.dim() == 2:
        return linear(input, other.t())
    if other.dim() == 1:
        return linear(input, other[None]).squeeze(-1)
    return torch.matmul(input, other)


# ---- Activations -------------------------------------------------------------------------------
# On CPU PyTorch computes these of whole vectors in one way and of what is left over in another, but
# not exp and tanh. Of 16 bits in float32, as PyTorch does.


def _sigmoid(input: Tensor) -> Tensor:
    x = _widened(input)
    return (1 / (1 + torch.exp(-x))).to(input.dtype)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    x = _widened(input)
    y = (x / (1 + torch.exp(-x))).to(input.dtype)
    return input.copy_(y) if inplace else y


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        return F.gelu(input, approximate=approximate)
    x = _widened(input)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    return (0.5 * x * (1 + torch.tanh(inner))).to(input.dtype)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- Means -------------------------------------------------------------------------------------
# PyTorch on CUDA spreads the sum of a row over threads by the number of rows.


def _mean(
    input: Tensor,
    dim: int | list[int] | tuple[int, ...] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Over the last dimension, as norms have it, a product with ones."""
    if dim is None:
        return torch.mean(input, dtype=dtype)
    last = input.dim() - 1
    if dim not in (-1, last, [-1], (-1,), [last], (last,)) or dtype not in (None, input.dtype):
        return torch.mean(input, dim, keepdim, dtype=dtype)
    total = linear(input, input.new_ones(1, input.shape[-1]))
    mean = total / input.shape[-1]
    return mean if keepdim else mean.squeeze(-1)


_PRODUCTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.mm: _mm,
    torch.addmm: _addmm,
    torch.bmm: _bmm,
    torch.matmul: _matmul,
    Tensor.mm: _mm,
    Tensor.addmm: _addmm,
    Tensor.bmm: _bmm,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
}
_ACTIVATIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    F.silu: _silu,
    F.gelu: _gelu,
}
_MEANS: dict[Callable[..., Any], Callable[..., Tensor]] = {torch.mean: _mean, Tensor.mean: _mean}


class BatchInvariantMode(TorchFunctionMode):
    """Inside, F.linear, mm, addmm, bmm and matmul by a matrix or a vector are fa3_ops.linear, also
    under autocast, in nn.Linear, and in a function that is compiled inside or with it inside; bmm
    is one product after another. On CPU, sigmoid, silu and gelu with approximate="tanh" are
    computed so that their bits do not depend on an element's place. On CUDA, means over the last
    dimension are fa3_ops.linear with ones.

    PyTorch's own are left: calls with `out`, of tensors that are no floating-point numbers of 16 to
    64 bits or not on CPU, CUDA or NPU, matmul of batches of matrices on the right side, einsum, and
    products inside other operators. Gradients of F.linear and the others are fa3_ops.linear's.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        route = _PRODUCTS.get(func) or _ACTIVATIONS.get(func) or _MEANS.get(func)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if route is None or "out" in kwargs or not all(map(_takes, given)):
            return func(*args, **kwargs)
        if func in _ACTIVATIONS and given[0].device.type not in ("cpu", "meta"):
            return func(*args, **kwargs)
        if func in _MEANS and given[0].device.type not in _UNSTEADY:
            return func(*args, **kwargs)
        return route(*args, **kwargs)


def _takes(x: Tensor) -> bool:
    has_kernels = x.is_meta or x.device.type in _DEVICES
    return has_kernels and x.dtype in _DTYPES and x.layout is torch.strided
