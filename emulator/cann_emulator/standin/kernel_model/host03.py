"""What the raw extension of release 0.3.0 for Ascend 910 does on the host."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .host import (
    FORWARD,
    METADATA,
    check,
    check_forward,
    check_splits,
    launch_forward,
    lengths_on_host,
    named,
    new_lse,
    new_tiling,
    shapes_of,
    tiling_in,
)
from .memory import Memory, cores, guarded, host, is_capturing
from .tiling import BYTES, CAUSAL, NO_MASK, ceil_div, fill, mask_of

MASK_BYTES = 2048 * 2048  # in front of the tiling, if causal
# As later, with whether there is a softcap for its value, and no scale.
METADATA_0_3 = METADATA.replace("softcap", "has_softcap").replace("softmax_scale", "")


@guarded(0)
def forward(*args: object) -> list[Tensor | None]:
    """mha_fwd of 0.3.0. Nothing is appended, and nobody reads qv, seqused_q and kv_batch_idx."""
    a = named(FORWARD, args)
    check_forward(a)
    check(0 <= a.num_splits <= cores(), f"num_splits must be in [0, {cores()}], 0 for auto")
    a.k_new = a.v_new = None
    paged_varlen = a.page_table is not None and a.cu_seqlens_q is not None
    fixed = shapes_of(a)
    seqlens_k = a.seqused_k
    if seqlens_k is None and a.cu_seqlens_k is not None:
        seqlens_k = a.cu_seqlens_k.diff()
    elif seqlens_k is None:
        sizes = (fixed["batch"],)
        seqlens_k = torch.full(sizes, a.k.shape[1], dtype=torch.int32, device=a.k.device)

    if a.scheduler_metadata is None:
        q_lens, kv_lens = lengths_on_host(a, seqlens_k)
        check_splits(a.num_splits, paged_varlen)
        mask = mask_of(a.causal, a.window_left, a.window_right, max(kv_lens))
        scale = math.nan if a.softmax_scale is None else a.softmax_scale
        t = new_tiling(fixed, mask, scale, a.softcap)
        splits = dict(paged_varlen=paged_varlen, num_splits=a.num_splits, cores=cores())
        fill(t, q_lens, kv_lens, **splits, cuts_windows=True)
        if mask[0] != NO_MASK and a.q.device.type != "cpu":  # made anew, and copied from the host
            torch.npu.current_stream().synchronize()
        read_tiling = lambda: t  # noqa: E731
    else:  # windows are lost
        mask = (CAUSAL if a.causal else NO_MASK, -1, -1)
        offset = MASK_BYTES if a.causal else 0
        check(a.scheduler_metadata.nbytes >= offset + BYTES, "scheduler_metadata is too small")
        read_tiling = tiling_in(a.scheduler_metadata[offset:])
    out = torch.empty_like(a.q) if a.out is None else a.out
    lse = new_lse(a)
    if a.cu_seqlens_k is not None:
        seqlens_k = a.cu_seqlens_k
    elif a.page_table is None and a.cu_seqlens_q is not None:
        seqlens_k = torch.tensor([0, *seqlens_k.tolist()]).cumsum(0).int()
    launch_forward(a, read_tiling, out, lse, seqlens_k, mask[0], "0.3")
    return [out, lse, None, None]


@guarded(8)
def get_scheduler_metadata(*args: object) -> Tensor:
    """The mask if causal, then the tiling; computed on a stream that waits for no other, and waited
    for. It knows no window, and the scale is always headdim ** -0.5."""
    a = named(METADATA_0_3, args)
    paged_varlen = a.page_size is not None and a.cu_seqlens_q is not None
    check_splits(a.num_splits, paged_varlen)
    metadata_device = a.cache_seqlens.device
    check(not is_capturing(metadata_device), "scheduler metadata cannot be made in a capture")
    size = a.page_size or 128
    fixed = dict(
        batch=a.batch_size, heads=a.num_heads_q, heads_k=a.num_heads_kv, headdim=a.headdim,
        headdim_v=a.headdim_v, page_size=size,
        pages_per_row=ceil_div(a.max_seqlen_k, size) if a.page_size else 0, max_q=a.max_seqlen_q,
    )  # fmt: skip
    ends = torch.arange(a.batch_size + 1)
    kv_lens = Memory(a.cache_seqlens)[ends[:-1]].tolist()
    q_lens = [a.max_seqlen_q] * a.batch_size
    if a.cu_seqlens_q is not None:
        q_lens = Memory(a.cu_seqlens_q)[ends].diff().tolist()
    mask = (CAUSAL, -1, 0) if a.causal else (NO_MASK, -1, -1)
    t = new_tiling(fixed, mask, a.headdim**-0.5, 0.0)
    fill(t, q_lens, kv_lens, paged_varlen=paged_varlen, num_splits=a.num_splits, cores=cores())
    offset = MASK_BYTES if a.causal else 0
    metadata = torch.empty(offset + BYTES, dtype=torch.uint8, device=metadata_device)
    host(metadata)[offset:] = torch.from_numpy(t.reshape(1).view(np.uint8))
    return metadata
