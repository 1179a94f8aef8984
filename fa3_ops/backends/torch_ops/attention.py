"""Attention and its gradients in plain torch operators: slow, complete, and free of host waits, so
that a graph can record them. The last resort on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Attention, Gradient
from fa3_ops.backends.lowering.completion import count_sinks
from fa3_ops.backends.lowering.dequantise import dequantise
from fa3_ops.backends.lowering.keys import (
    gather_keys,
    keys_in_use,
    select_table_rows,
    without_hidden_pages,
)
from fa3_ops.backends.lowering.rows import sequence_of_row

MASKED = -1e30  # instead of -inf, which makes NaN of a row that sees no key
NO_KEY = float("-inf")


class TorchAttention(Backend[Attention]):
    name = "torch"

    def not_supported_reasons(self, request: Attention, run: Run) -> list[str]:
        return ["dtype torch.float64"] if request.q.dtype == torch.float64 else []

    def lower(self, request: Attention, run: Run) -> Attention:
        call = without_hidden_pages(select_table_rows(request, run))
        return dense_keys(dequantise(call, run, torch.float32), run)

    def launch(self, request: Attention, lowered: Attention, run: Run) -> tuple[Tensor, Tensor]:
        rows = PaddedRows(lowered)
        s = Scores.of(lowered, rows)
        lse = torch.logsumexp(s.scores, -1)
        weights = torch.exp(s.scores - lse[..., None]).masked_fill(~s.seen, 0.0)
        out = torch.matmul(weights, s.values)
        blind = ~s.seen.any(-1)
        lse = lse.masked_fill(blind, NO_KEY)
        out = rows.unpad(out.transpose(1, 2), 0.0)
        softmax_lse = rows.unpad(lse.transpose(1, 2), NO_KEY).transpose(-1, -2)
        if lowered.sinks is not None:
            out, softmax_lse = count_sinks(out, softmax_lse, lowered.sinks)
        return out.to(lowered.q.dtype).contiguous(), softmax_lse.contiguous()


class TorchGradient(Backend[Gradient]):
    name = "torch"

    def lower(self, request: Gradient, run: Run) -> Attention:
        return dense_keys(request.call, run)

    def launch(
        self, request: Gradient, lowered: Attention, run: Run
    ) -> tuple[Tensor, Tensor, Tensor]:
        call, dout, dlse = request.call, request.dout, request.dsoftmax_lse
        rows = PaddedRows(call)
        s = Scores.of(lowered, rows)
        lse = rows.pad(request.softmax_lse.transpose(-1, -2)).transpose(1, 2)
        unused = torch.arange(rows.most, device=dout.device) >= rows.seqlens[:, None]
        silent = unused[:, None] | (lse == NO_KEY)
        lse = lse.masked_fill(silent, 0.0)[..., None]
        weights = torch.exp(s.scores - lse).masked_fill(~s.seen | silent[..., None], 0.0)
        dout_rows = rows.pad(dout).float().transpose(1, 2)
        dout_rows = dout_rows.masked_fill(silent[..., None], 0.0)
        delta = (dout_rows * rows.pad(request.out).float().transpose(1, 2)).sum(-1)
        if dlse is not None:
            delta = delta - rows.pad(dlse.transpose(-1, -2)).transpose(1, 2)
        dscores = torch.matmul(dout_rows, s.values.transpose(-1, -2)) - delta[..., None]
        assert call.softmax_scale is not None
        dscores = weights * dscores * s.slope
        dscores = dscores.masked_fill(weights == 0.0, 0.0) * call.softmax_scale
        dq = rows.unpad(torch.matmul(dscores, s.keys).transpose(1, 2), 0.0)
        dk = per_key(call, torch.matmul(dscores.transpose(-1, -2), s.q))
        dv = per_key(call, torch.matmul(weights.transpose(-1, -2), dout_rows))
        return (
            dq.to(call.q.dtype).contiguous(),
            dk.to(call.k.dtype).contiguous(),
            dv.to(call.v.dtype).contiguous(),
        )


class PaddedRows:
    """Rows of q and of what is like q as (batch_size, most rows, ...), and back."""

    def __init__(self, call: Attention) -> None:
        self.cu_seqlens = call.cu_seqlens_q
        device = call.q.device
        self.most = call.seqlen_q
        row = torch.arange(self.most, device=device)
        if call.seqused_q is not None:
            self.seqlens = call.seqused_q
        elif self.cu_seqlens is not None:
            self.seqlens = self.cu_seqlens.diff()
        else:
            self.seqlens = torch.full(
                (call.batch_size,), self.most, dtype=torch.int32, device=device
            )
        if self.cu_seqlens is None:
            self.unused = row >= self.seqlens[:, None]
            return
        total = call.q.shape[0]
        self.source = (self.cu_seqlens[:-1, None] + row).clamp(0, total - 1)
        self.sequence = sequence_of_row(self.cu_seqlens, call.q)
        self.row = torch.arange(total, device=device) - self.cu_seqlens[self.sequence]
        self.unused = (self.row < 0) | (self.row >= self.seqlens[self.sequence])

    def pad(self, x: Tensor) -> Tensor:
        """Rows past a sequence's end repeat some row."""
        return x if self.cu_seqlens is None else x[self.source]

    def unpad(self, x: Tensor, unused: float) -> Tensor:
        """x (batch_size, most rows, nheads[, width]) in q's layout; rows that do not count get
        `unused`."""
        if self.cu_seqlens is not None:
            x = x[self.sequence, self.row.clamp(0, max(self.most - 1, 0))]
        mask = self.unused.view(*self.unused.shape, *(1,) * (x.dim() - self.unused.dim()))
        return x.masked_fill(mask, unused)


@dataclass
class Scores:
    """One call with all its scores in memory, float32."""

    scores: Tensor  # (batch_size, nheads, most rows, most keys): scaled, capped, biased, masked
    seen: Tensor  # bool, broadcasts to scores
    q: Tensor  # (batch_size, nheads, most rows, headdim)
    keys: Tensor  # (batch_size, nheads, most keys, headdim)
    values: Tensor  # 0 past a sequence's keys: a weight of 0 does not silence NaN
    slope: Tensor | float  # of the softcap, where the gradient needs it

    @staticmethod
    def of(call: Attention, rows: PaddedRows) -> Scores:
        """Of a call with dense keys."""
        seqlens_k = keys_in_use(call)
        at = torch.arange(rows.most, device=call.q.device) + (seqlens_k - rows.seqlens)[:, None]
        at = at[..., None]  # where each row of q stands among its keys
        key = torch.arange(call.k.shape[1], device=call.q.device)
        seen = visible(call, at, key, seqlens_k)
        used = seen.any(1)[:, None, :, None]  # what no row sees may be anything
        q = rows.pad(call.q).float().transpose(1, 2)
        keys = per_head(call.k, call.nheads).masked_fill(~used, 0.0)
        values = per_head(call.v, call.nheads).masked_fill(~used, 0.0)

        scores = torch.matmul(q, keys.transpose(-1, -2))
        if call.qv is not None:
            qv = rows.pad(call.qv).float().transpose(1, 2)
            scores = scores + torch.matmul(qv, values.transpose(-1, -2))
        assert call.softmax_scale is not None
        scores = scores * call.softmax_scale
        slope: Tensor | float = 1.0
        if call.softcap > 0:
            capped = torch.tanh(scores / call.softcap)
            slope = 1.0 - capped * capped
            scores = call.softcap * capped
        if call.alibi_slopes is not None:
            slopes = call.alibi_slopes.expand(call.batch_size, -1)[..., None, None]
            scores = scores - slopes * (at - key).abs()[:, None]
        seen = seen[:, None]
        return Scores(scores.masked_fill(~seen, MASKED), seen, q, keys, values, slope)


def dense_keys(call: Attention, run: Run) -> Attention:
    """Keys and values as (batch_size, most keys, nheads_k, ...), seqused_k of them in use."""
    call = replace(call, is_cache=False)
    elsewhere = (call.page_table, call.cu_seqlens_k, call.cache_batch_idx, call.cache_leftpad)
    if all(t is None for t in elsewhere):
        return call
    return gather_keys(call, run, "plain torch operators read them dense")


def per_head(x: Tensor, nheads: int) -> Tensor:
    """(batch_size, rows, nheads_k, width) as (batch_size, nheads, rows, width) float32."""
    return x.float().repeat_interleave(nheads // x.shape[2], dim=2).transpose(1, 2)


def visible(call: Attention, at: Tensor, key: Tensor, seqlens_k: Tensor) -> Tensor:
    """(batch_size, most rows, most keys): whether a row of q, standing at `at`, sees a key."""
    seen = key < seqlens_k[:, None, None]
    left, right = call.window_size
    if left >= 0:
        seen = seen & (key >= at - left)
    if right >= 0:
        seen = seen & (key <= at + right)
    if call.attention_chunk > 0:
        start = 0 if call.cache_start is None else call.cache_start[:, None, None]
        first = at - (at + start).remainder(call.attention_chunk)
        seen = seen & (first <= key) & (key < first + call.attention_chunk)
    return seen


def per_key(call: Attention, x: Tensor) -> Tensor:
    """Gradients (batch_size, nheads, most keys, width) in k's layout, summed over the query heads
    that share a key head; 0 for keys that do not count."""
    x = x.unflatten(1, (call.nheads_k, -1)).sum(2).transpose(1, 2)
    if call.cu_seqlens_k is None:
        return x
    sequence = sequence_of_row(call.cu_seqlens_k, call.k)
    row = torch.arange(call.k.shape[0], device=x.device) - call.cu_seqlens_k[sequence]
    outside = (row < 0) | (row >= keys_in_use(call)[sequence])
    x = x[sequence, row.clamp(0, max(x.shape[1] - 1, 0))]
    return x.masked_fill(outside[:, None, None], 0.0)
