"""What the raw extension of release 0.2.0b1 does on the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .host import (
    FORWARD,
    check,
    check_forward,
    launch_forward,
    lengths_on_host,
    make_triu_mask,
    named,
    new_tiling,
    shapes_of,
)
from .memory import cores, guarded
from .tiling import CAUSAL, NO_MASK, fill


@guarded(0)
def forward(*args: object) -> list[Tensor | None]:
    """mha_fwd of 0.2.0b1: nothing is appended, and LSE is (batch, seqlen, heads) or (T, heads)."""
    a = named(FORWARD, args)
    check_forward(a)
    check(a.softcap == 0, "NPU FlashAttention does not support softcap")
    check(a.window_left == a.window_right == -1, "NPU FlashAttention does not support window_size")
    check(a.scheduler_metadata is None, "NPU FlashAttention does not support scheduler_metadata")
    check(a.num_splits in (0, 1), "NPU FlashAttention only supports num_splits=1 or num_splits=0")
    check(a.seqused_k is not None, "seqused_k is an undefined tensor")
    mask = (CAUSAL, -1, 0) if a.causal else (NO_MASK, -1, -1)
    t = new_tiling(
        shapes_of(a), mask, math.nan if a.softmax_scale is None else a.softmax_scale, 0.0
    )
    lens = lengths_on_host(a, a.seqused_k)
    fill(t, *lens, paged_varlen=False, num_splits=1, cores=cores())
    if a.causal:
        make_triu_mask(a.q.device)
    out = torch.empty_like(a.q) if a.out is None else a.out
    lse = torch.empty(a.q.shape[:-1], dtype=torch.float32, device=a.q.device).fill_(math.inf)
    kv_lens = a.seqused_k if a.cu_seqlens_k is None else a.cu_seqlens_k
    a.k_new = a.v_new = None
    launch_forward(a, lambda: t, out, lse, kv_lens, mask[0], "0.2")
    return [out, lse, None, None]
