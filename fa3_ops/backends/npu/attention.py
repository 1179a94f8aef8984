"""Attention on NPU: the kernel that serves a call is chosen, and what no kernel does is added."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fa3_ops.backends.attention import Attention
from fa3_ops.backends.choice import choose
from fa3_ops.backends.npu import device
from fa3_ops.backends.npu.flash_attn_npu import FlashAttnNpu, follows_metadata
from fa3_ops.backends.npu.fused_infer_attention import FusedInferAttention
from fa3_ops.backends.npu.lengths import Lengths, with_contiguous_lengths
from fa3_ops.backends.npu.lowering import (
    dequantise_fp8,
    select_table_rows,
    without_hidden_pages,
)
from fa3_ops.backends.npu.torch_ops import TorchOps
from fa3_ops.backends.written import mark_written
from fa3_ops.checks import writable

BACKENDS: tuple[FlashAttnNpu | FusedInferAttention | TorchOps, ...] = (
    FlashAttnNpu(),
    FusedInferAttention(),
    TorchOps(),
)


def prepare(call: Attention) -> tuple[Attention, Lengths | None]:
    """The call as this moment allows it: captured or not, with metadata or lengths on the host."""
    call = with_contiguous_lengths(call)
    call.capturing = device.capturing(call.q.device)
    if call.capturing:
        return call, None
    if call.scheduler_metadata is not None:
        if follows_metadata(call):
            return call, None
        # A schedule that nobody follows changes nothing outside a capture.
        call = replace(call, scheduler_metadata=None)
    lengths = Lengths.of(call)
    call.seqlens = list(zip(lengths.seqlens_q, lengths.seqlens_k, strict=True))
    return call, lengths


def forward(call: Attention, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out, in `into` if given, and softmax_lse."""
    if into is not None:
        writable(into, "out")
        mark_written(into)
    call, lengths = prepare(call)
    if call.is_empty or (lengths is not None and not any(lengths.seqlens_q)):
        out, softmax_lse = call.empty_results()
        out.zero_()
        softmax_lse.fill_(float("-inf"))
    else:
        decoded = dequantise_fp8(without_hidden_pages(select_table_rows(call)))
        if lengths is not None:
            lengths = lengths.without_hidden_pages(call.k.shape[1])
            decoded.seqlens = list(zip(lengths.seqlens_q, lengths.seqlens_k, strict=True))
        backend = choose(BACKENDS, decoded)
        out, softmax_lse = backend.forward(decoded, lengths)
        out = out.to(call.out_dtype)
        if call.sinks is not None:
            out, softmax_lse = count_sinks(out, softmax_lse, call.sinks)
    if into is not None:
        into.copy_(out)
        out = into
    return out, softmax_lse


def count_sinks(out: Tensor, softmax_lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink takes its share of every row's weights: out times the rest, and its own exponential in
    softmax_lse. Rows that see no key stay 0 and -inf."""
    sinks = sinks.float()[:, None]
    blind = softmax_lse == float("-inf")
    above = (softmax_lse - sinks).masked_fill(blind, float("inf"))  # -inf may stand on both sides
    rest = torch.sigmoid(above).transpose(-1, -2)[..., None]
    with_sinks = torch.logaddexp(softmax_lse, sinks).masked_fill(blind, float("-inf"))
    return (out.float() * rest).to(out.dtype), with_sinks
