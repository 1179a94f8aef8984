"""What the lowering took from a request, put back into its results; rows that see no key."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_ops.backends.call import Attention
from fa3_ops.backends.lowering.keys import keys_in_use
from fa3_ops.backends.lowering.rows import sequence_of_row
from fa3_ops.backends.written import mark_written
from fa3_ops.ops.checks import writable


def complete(
    asked: Attention, served: Attention, out: Tensor, softmax_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The results of `asked` from those of `served`, which is what a backend got of it."""
    if asked.sinks is not None and served.sinks is None:
        out, softmax_lse = count_sinks(out, softmax_lse, asked.sinks)
    out = out.to(asked.out_dtype)
    if asked.out is not None and out is not asked.out:
        writable(asked.out, "out")
        mark_written(asked.out)
        out = asked.out.copy_(out)
    return out, softmax_lse


def as_asked(call: Attention, out: Tensor, softmax_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Results of the lowered call in the shape of the original one."""
    if call.cu_seqlens_q is None and softmax_lse.dim() == 2:  # packed by split_unused_rows
        batch_size, seqlen_q = call.q.shape[:2]
        out = out.view(batch_size, seqlen_q, *out.shape[1:])
        softmax_lse = softmax_lse.view(-1, batch_size, seqlen_q).transpose(0, 1)
    elif call.cu_seqlens_q is not None and softmax_lse.dim() == 3:  # dense by as_dense_rows
        out, softmax_lse = out.squeeze(1), softmax_lse.squeeze(-1).T
    if out.shape[-1] != call.headdim_v:
        out = out[..., : call.headdim_v]
    return out.contiguous(), softmax_lse.contiguous()


def count_sinks(out: Tensor, softmax_lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink takes its share of every row's weights: out times the rest, and its own exponential in
    softmax_lse. Rows that see no key stay 0 and -inf."""
    sinks = sinks.float()[:, None]
    blind = softmax_lse == float("-inf")
    above = (softmax_lse - sinks).masked_fill(blind, float("inf"))  # -inf may stand on both sides
    rest = torch.sigmoid(above).transpose(-1, -2)[..., None]
    with_sinks = torch.logaddexp(softmax_lse, sinks).masked_fill(blind, float("-inf"))
    return (out.float() * rest).to(out.dtype), with_sinks


def blind_rows(call: Attention) -> Tensor:
    """True for the rows of q that see no key or belong to no sequence: (batch_size, seqlen_q), or
    (total_q,) for packed q. From lengths on the device, without waiting for it."""
    seqlens_k = keys_in_use(call)
    if call.cache_leftpad is not None:
        seqlens_k = seqlens_k - call.cache_leftpad
    right = call.window_size[1]
    if call.cu_seqlens_q is None:
        row = torch.arange(call.q.shape[1], dtype=torch.int32, device=call.q.device)
        seqlens_q = call.q.shape[1] if call.seqused_q is None else call.seqused_q[:, None]
        seqlens_k = seqlens_k[:, None]
        row = row.expand(call.batch_size, -1)
    else:
        cu_seqlens = call.cu_seqlens_q
        sequence = sequence_of_row(cu_seqlens, call.q)
        at = torch.arange(call.q.shape[0], dtype=torch.int32, device=call.q.device)
        row = at - cu_seqlens[sequence]
        used = cu_seqlens.diff() if call.seqused_q is None else call.seqused_q
        seqlens_q, seqlens_k = used[sequence], seqlens_k[sequence]
    blind = (row < 0) | (row >= seqlens_q) | (seqlens_k <= 0)
    if right >= 0:
        blind = blind | (row + seqlens_k - seqlens_q + right < 0)
    return blind


def clear(out: Tensor, softmax_lse: Tensor, blind: Tensor) -> None:
    """0 and -inf where blind, whatever the kernel left there."""
    out.masked_fill_(blind[..., None, None], 0)
    softmax_lse.masked_fill_(blind.unsqueeze(-2), float("-inf"))
