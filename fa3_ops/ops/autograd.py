"""Gradients of the operators that have one; the others refuse by name.

The backward recomputes the probabilities from softmax_lse, so the forward saves its tensors, out
and softmax_lse and nothing that grows with their product. A gradient that arrives at softmax_lse
counts too.

A compiler traces the backward together with the forward, whether or not anybody will ask for it. So
what has no gradient is refused by an operator, `no_gradient`, which raises when it runs.

These are kernels for PyTorch's Autograd key and not torch.library.register_autograd's, which know
neither forward mode nor torch.func.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from fa3_ops.backends.choice import asked_for
from fa3_ops.backends.dispatch import use_backend
from fa3_ops.ops.checks import NARROW
from fa3_ops.ops.library import implement
from fa3_ops.ops.schema import bind, name_of, signature

ops = torch.ops.fa3npu


def requires_grad(*arguments: object, **keywords: object) -> bool:
    """Whether a call with these arguments is recorded for a backward."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments, **keywords)


def is_watched(*arguments: object, **keywords: object) -> bool:
    """Whether somebody may differentiate a call with these arguments, in either mode."""
    return forward_ad._current_level >= 0 or requires_grad(*arguments, **keywords)


def refuse_forward_mode(name: str, arguments: Iterable[object]) -> None:
    for x in arguments:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"fa3_ops: {name} has no forward-mode derivative")


def below_autograd(op: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)


class Recorded(torch.autograd.function._SingleLevelFunction):
    """A node of autograd's graph, for one level of torch.func's transforms: what reaches the
    Autograd key are the tensors of that level, and a torch.autograd.Function would start the
    transform once more."""

    name: str
    apply: Any
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @classmethod
    def record(cls, run: Any, *args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return cls.apply(run, *args)
        grad_mode = torch.is_grad_enabled()

        def run_for_outer_levels(*args: Any) -> Any:
            """A Function's forward runs without either mode; the levels around this one have
            theirs."""
            with torch.set_grad_enabled(grad_mode), forward_ad._set_fwd_grad_enabled(True):
                return run(*args)

        with enable_single_level_autograd_function():
            return cls.apply(run_for_outer_levels, *args)

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise NotImplementedError(f"fa3_ops: {cls.name} has no forward-mode derivative")


def record(op: Any, node: type[Recorded]) -> None:
    """Makes the node's class the operator's kernel for autograd."""
    node.name = name_of(op)

    def kernel(keyset: Any, *args: Any) -> Any:
        if not is_watched(*args):
            return below_autograd(op, keyset, *args)
        return node.record(partial(below_autograd, op, keyset), *args)

    implement(op, kernel, "Autograd", with_keyset=True)


# ---- No gradient -------------------------------------------------------------------------------


def _raise(gradient: Tensor, size: Sequence[int], dtype: torch.dtype, of: str) -> NoReturn:
    raise NotImplementedError(f"fa3_ops: {of} has no backward")


def _likes(inputs: Iterable[object]) -> list[tuple[torch.Size, torch.dtype] | None]:
    """What a refused gradient looks like, without keeping its tensor alive."""
    return [(x.shape, x.dtype) if isinstance(x, Tensor) else None for x in inputs]


def _refused(ctx: Any, gradient: Tensor, of: str) -> tuple[Tensor | None, ...]:
    """Refusals of what is needed; the first input is no tensor."""
    refused: list[Tensor | None] = [None]
    for i, like in enumerate(ctx.inputs):
        needed = ctx.needs_input_grad[i + 1]
        refused.append(ops.no_gradient(gradient, *like, of) if needed else None)
    return tuple(refused)


def without_gradient(of: str) -> type[Recorded]:
    """A node whose backward refuses."""

    class NoGradient(Recorded):
        @staticmethod
        def forward(ctx: Any, run: Any, *args: Any) -> Any:
            ctx.inputs = _likes(args)
            return run(*args)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            return _refused(ctx, gradients[0], of)

    return NoGradient


class Unconnected(torch.autograd.Function):
    """q, as if `others` had gone into it: whoever asks for their gradient through what is made of q
    hears that there is none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(of: str, q: Tensor, *others: Tensor | None) -> Tensor:
        return q.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.of, *tensors = inputs
        ctx.inputs = _likes(tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _refused(ctx, gradient, ctx.of)


def severed(of: str, q: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors without their history, and q with a refusal in its place."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"fa3_ops: {of} has no backward")
    q = Unconnected.apply(of, q, *others)  # type: ignore[no-untyped-call]
    return q, *(None if x is None else x.detach() for x in others)


# ---- Attention ---------------------------------------------------------------------------------


def _dsinks(
    sinks: Tensor, dout: Tensor, out: Tensor, softmax_lse: Tensor, dlse: Tensor | None
) -> Tensor:
    """A sink is a key without a value: its probability only takes from the others."""
    delta = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    if dlse is not None:
        delta = delta - dlse
    probability = torch.exp(sinks.float()[:, None] - softmax_lse)
    probability = torch.where(softmax_lse == float("-inf"), 0.0, probability)
    probability = torch.where(softmax_lse == float("inf"), 1.0, probability)
    gradient = -(probability * delta).sum(-1)
    return (gradient.sum(0) if gradient.dim() == 2 else gradient).to(sinks.dtype)


def asked_again(name: str | None) -> AbstractContextManager[None]:
    """The backend that the attention was asked for with serves its gradient, unless another is
    asked for by now. PyTorch runs a device's backward in a thread that knows of neither."""
    return nullcontext() if name is None or asked_for() is not None else use_backend(name)


def differentiable(op: Any, backward_op: Any) -> type[Recorded]:
    """The node of an attention operator: what its backward operator takes is saved by name."""
    name, names = name_of(op), signature(op).names
    types = dict(zip(names, signature(op).types, strict=True))
    shared = [n for n in signature(backward_op).names if n in names]
    tensors = [n for n in names if n in (*shared, "sinks") and "Tensor" in types[n]]

    class Gradient(Recorded):
        @staticmethod
        def forward(ctx: Any, run: Any, *args: Any) -> tuple[Tensor, Tensor]:
            output: tuple[Tensor, Tensor] = run(*args)
            given = bind(op, args, {})
            ctx.inputs = _likes(args)
            ctx.asked = asked_for()
            ctx.settings = {n: given[n] for n in shared if n not in tensors}
            ctx.no_gradient = None
            if given["qv"] is not None:
                ctx.no_gradient = f"{name} with qv"
            elif given["k"].dtype in NARROW:
                ctx.no_gradient = f"{name} of {given['k'].dtype}".replace("torch.", "")
            ctx.save_for_backward(*(given[n] for n in tensors), *output)
            ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
            *saved, out, softmax_lse = ctx.saved_tensors
            given = dict(zip(tensors, saved, strict=True))
            sinks = given.pop("sinks")
            some = dlse if dout is None else dout
            gradients: dict[str, Tensor] = {}
            if ctx.no_gradient is None:
                dout = torch.zeros_like(out) if dout is None else dout
                with asked_again(ctx.asked):
                    dq, dk, dv = backward_op(
                        dout=dout,
                        out=out,
                        softmax_lse=softmax_lse,
                        dsoftmax_lse=dlse,
                        **given,
                        **ctx.settings,
                    )
                gradients = {"q": dq, "k": dk, "v": dv}
                if sinks is not None:
                    gradients["sinks"] = _dsinks(sinks, dout, out, softmax_lse, dlse)
            needed = [n for n, need in zip(names, ctx.needs_input_grad[1:], strict=False) if need]
            other = next((n for n in needed if n not in ("q", "k", "v", "sinks")), None)
            of = ctx.no_gradient if other is None else f"{other} of {name}"
            result: list[Tensor | None] = [None]
            for n, like in zip(names, ctx.inputs, strict=False):
                gradient = gradients.get(n)
                if gradient is None and n in needed:
                    gradient = ops.no_gradient(some, *like, of)
                result.append(gradient)
            return tuple(result)

    return Gradient


# ---- linear ------------------------------------------------------------------------------------


class LinearGradient(Recorded):
    """Its gradients are the operator's own results, so that a row of x's depends on its row alone,
    and that they have gradients in turn."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, weight: Tensor, *bias: Tensor | None) -> Tensor:
        out: Tensor = run(x, weight, *bias)
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight, *needs_bias = ctx.needs_input_grad
        rows = dout.reshape(-1, dout.shape[-1])
        dx = ops.linear(dout, weight.t()) if needs_x else None
        dweight = ops.linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None
        return None, dx, dweight, *(rows.sum(0) if needed else None for needed in needs_bias)


def register() -> None:
    implement(ops.no_gradient.default, _raise, "CompositeExplicitAutograd")
    for op, backward_op in (
        (ops.flash_attn_func.default, ops.flash_attn_func_backward.default),
        (ops.flash_attn_varlen_func.default, ops.flash_attn_varlen_func_backward.default),
    ):
        record(op, differentiable(op, backward_op))
    record(ops.linear.default, LinearGradient)
    for op in (
        ops.flash_attn_func_backward.default,
        ops.flash_attn_varlen_func_backward.default,
        ops.flash_attn_kvcache.default,
        ops.apply_rotary.default,
        ops.flash_attn_combine.default,
    ):
        record(op, without_gradient(name_of(op)))
