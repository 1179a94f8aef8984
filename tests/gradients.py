"""What the gradient of attention is promised, on any device: shared by the tests of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sample_inputs import ints
from torch import Tensor

import fa3_ops
from fa3_ops import reference

Masks = dict[str, Any]
# Rows without keys, keys that nobody sees, and both: (seqlen_q, seqlen_k, masks).
UNSEEN: list[tuple[int, int, Masks]] = [
    (100, 30, {"causal": True}),
    (20, 200, {"window_size": (10, 0)}),
    (150, 40, {"attention_chunk": 64, "window_size": (50, 20)}),
]


def dense(**call: Any) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = fa3_ops.flash_attn_func(**call, return_attn_probs=True)
    return results


def varlen(**call: Any) -> tuple[Tensor, Tensor]:
    bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
    results: tuple[Tensor, Tensor] = fa3_ops.flash_attn_varlen_func(
        **bounds | call, return_attn_probs=True
    )
    return results


@dataclass
class Problem:
    """One sequence, and the gradients of its results."""

    q: Tensor  # (seqlen_q, nheads, headdim)
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor  # (seqlen_q, nheads, 1), unlike dsoftmax_lse

    @staticmethod
    def random(
        lengths: tuple[int, int],
        dtype: torch.dtype,
        device: str = "cpu",
        heads: tuple[int, int] = (2, 1),
        headdims: tuple[int, int] = (24, 16),
    ) -> Problem:
        (m, n), (h, hk), (d, dv) = lengths, heads, headdims
        shapes = (m, h, d), (n, hk, d), (n, hk, dv), (m, h, dv)
        tensors = (torch.randn(shape).to(device, dtype) for shape in shapes)
        return Problem(*tensors, torch.randn(m, h, 1).to(device))

    def parts(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.dout, self.dlse

    def gradients(self, **options: Any) -> tuple[Tensor, ...]:
        """dq, dk and dv, alone."""
        return tuple(x[0] for x in batched([self], **options))


def solve(parts: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """dq, dk and dv of q, k, v, dout and dlse, dense or packed."""
    leaves = [x.detach().requires_grad_() for x in parts[:3]]
    function = varlen if "cu_seqlens_q" in options else dense
    outputs = function(**dict(zip("qkv", leaves, strict=True)), **options)
    doubled = parts[3], parts[4][..., 0].transpose(-1, -2)
    return torch.autograd.grad(outputs, leaves, doubled)


def batched(problems: Sequence[Problem], **options: Any) -> tuple[Tensor, ...]:
    """Of problems of one length."""
    together = zip(*(p.parts() for p in problems), strict=True)
    return solve([torch.stack(parts) for parts in together], **options)


def nan_like(problem: Problem) -> Problem:
    return Problem(*(torch.full_like(x, math.nan) for x in problem.parts()))


def assert_same_in_a_batch(problem: Problem, **options: Any) -> None:
    """As alone, beside a sequence of NaN."""
    together = batched([nan_like(problem), problem], **options)
    for got, want in zip(together, problem.gradients(**options), strict=True):
        assert torch.equal(got[1], want)


def assert_same_when_packed(problems: Sequence[Problem], **options: Any) -> None:
    """As alone; before, between and behind the sequences there is NaN, which has gradients of 0."""
    starts: dict[int, list[int]] = {}  # by the number of a part
    packed = []
    for i, parts in enumerate(zip(*(p.parts() for p in problems), strict=True)):
        starts[i] = [1]
        for x in parts:
            starts[i].append(starts[i][-1] + len(x) + 3)
        whole = parts[0].new_full((starts[i][-1] + 2, *parts[0].shape[1:]), math.nan)
        for start, x in zip(starts[i], parts, strict=False):
            whole[start : start + len(x)] = x
        packed.append(whole)
    device = packed[0].device
    together = solve(
        packed,
        cu_seqlens_q=ints(*starts[0]).to(device),
        cu_seqlens_k=ints(*starts[1]).to(device),
        seqused_q=ints(*(len(p.q) for p in problems)).to(device),
        seqused_k=ints(*(len(p.k) for p in problems)).to(device),
        max_seqlen_q=max(len(p.q) for p in problems) + 3,
        max_seqlen_k=max(len(p.k) for p in problems) + 3,
        **options,
    )
    alone = [p.gradients(**options) for p in problems]
    for i, got in enumerate(together):
        for start, wants in zip(starts[i], alone, strict=False):
            rows = slice(start, start + len(wants[i]))
            assert torch.equal(got[rows], wants[i])
            got[rows] = 0
        assert not got.any()


def assert_unseen_is_not_read(problem: Problem, **masks: Any) -> None:
    """Rows that see no key and keys that no row sees may be NaN, and have gradients of 0."""
    full = {"causal": False, "window_size": (-1, -1), "attention_chunk": 0} | masks
    seen = reference.mask(len(problem.q), len(problem.k), **full).to(problem.q.device)
    blind, unseen = ~seen.any(1), ~seen.any(0)
    assert blind.any() or unseen.any()
    clean = problem.gradients(**masks)
    for x, where in zip(problem.parts(), (blind, unseen, unseen, blind, blind), strict=True):
        x[where] = math.nan
    for got, want, where in zip(
        problem.gradients(**masks), clean, (blind, unseen, unseen), strict=True
    ):
        assert torch.equal(got, want)
        assert not got[where].any()
