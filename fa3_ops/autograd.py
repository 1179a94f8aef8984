"""Gradients of the pure operators.

The backward recomputes the probabilities from softmax_lse, so the forward saves q, k, v, out and
softmax_lse and nothing that grows with their product. A gradient that arrives at softmax_lse counts
too. What has no gradient is refused by name when one is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ops = torch.ops.fa3npu


def _no_gradient(what: str) -> NotImplementedError:
    return NotImplementedError(f"fa3_ops: {what} has no backward")


def _dsinks(
    sinks: Tensor, dout: Tensor, out: Tensor, softmax_lse: Tensor, dlse: Tensor | None
) -> Tensor:
    """A sink is a key without a value: its probability only takes from the others."""
    delta = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    if dlse is not None:
        delta = delta - dlse
    probability = torch.where(
        softmax_lse == float("-inf"), 0.0, torch.exp(sinks.float()[:, None] - softmax_lse)
    )
    gradient = -(probability * delta).sum(-1)
    return (gradient.sum(0) if gradient.dim() == 2 else gradient).to(sinks.dtype)


def _refuse_others(ctx: Any, op: Any, q: Tensor) -> None:
    """A gradient asked of an argument that has none is an error, not a silent None."""
    name = op._schema.name.removeprefix("fa3npu::")
    # Shorter than the schema where the last arguments have their defaults.
    for argument, needed in zip(op._schema.arguments, ctx.needs_input_grad, strict=False):
        if needed and argument.name not in ("q", "k", "v", "sinks"):
            raise _no_gradient(f"{argument.name} of {name}")
    if ctx.has_qv:
        raise _no_gradient(f"{name} with qv")
    if q.dtype == torch.float8_e4m3fn:
        raise _no_gradient(f"{name} of float8_e4m3fn")


def _setup_func(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.softmax_scale, ctx.causal, qv, *_ = inputs
    ctx.window_size, ctx.attention_chunk, ctx.softcap = inputs[9:12]
    ctx.deterministic, ctx.sm_margin, alibi_slopes, sinks = inputs[14:18]
    ctx.has_qv = qv is not None
    ctx.save_for_backward(q, k, v, *output, alibi_slopes, sinks)
    ctx.set_materialize_grads(False)


def _backward_func(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, softmax_lse, alibi_slopes, sinks = ctx.saved_tensors
    _refuse_others(ctx, ops.flash_attn_func.default, q)
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = ops.flash_attn_func_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        ctx.softmax_scale,
        ctx.causal,
        ctx.window_size,
        ctx.attention_chunk,
        ctx.softcap,
        ctx.deterministic,
        ctx.sm_margin,
        dlse,
        alibi_slopes,
    )
    dsinks = None if sinks is None else _dsinks(sinks, dout, out, softmax_lse, dlse)
    return dq, dk, dv, *(None,) * 14, dsinks


def _setup_varlen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k = inputs[:7]
    seqused_q, seqused_k, ctx.softmax_scale, ctx.causal, qv = inputs[7:12]
    ctx.window_size, ctx.attention_chunk, ctx.softcap = inputs[15:18]
    ctx.deterministic, ctx.sm_margin, alibi_slopes, sinks = inputs[20:24]
    ctx.has_qv = qv is not None
    ctx.save_for_backward(
        q,
        k,
        v,
        *output,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        alibi_slopes,
        sinks,
    )
    ctx.set_materialize_grads(False)


def _backward_varlen(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, softmax_lse, *lengths, alibi_slopes, sinks = ctx.saved_tensors
    _refuse_others(ctx, ops.flash_attn_varlen_func.default, q)
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = lengths
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = ops.flash_attn_varlen_func_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        ctx.max_seqlen_q,
        ctx.max_seqlen_k,
        seqused_q,
        seqused_k,
        ctx.softmax_scale,
        ctx.causal,
        ctx.window_size,
        ctx.attention_chunk,
        ctx.softcap,
        ctx.deterministic,
        ctx.sm_margin,
        dlse,
        alibi_slopes,
    )
    dsinks = None if sinks is None else _dsinks(sinks, dout, out, softmax_lse, dlse)
    return dq, dk, dv, *(None,) * 20, dsinks


def _refuse(name: str) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise _no_gradient(name)

    return backward


torch.library.register_autograd(
    "fa3npu::flash_attn_func", _backward_func, setup_context=_setup_func
)
torch.library.register_autograd(
    "fa3npu::flash_attn_varlen_func", _backward_varlen, setup_context=_setup_varlen
)
for _name in (
    "flash_attn_func_backward",
    "flash_attn_varlen_func_backward",
    "flash_attn_kvcache",
    "apply_rotary",
    "flash_attn_combine",
):
    torch.library.register_autograd(f"fa3npu::{_name}", _refuse(_name))
