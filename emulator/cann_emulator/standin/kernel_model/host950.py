"""What the raw extension for Ascend 950 does on the host: its own rules and argument order."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .backward import launch_backward, named_gradients
from .host import (
    FORWARD,
    UNSUPPORTED,
    check,
    launch_forward,
    launch_metadata,
    lengths_on_host,
    make_triu_mask,
    named,
    new_lse,
    new_tiling,
    shapes_of,
    tiling_in,
)
from .memory import cores, guarded
from .tiling import BYTES, NO_MASK, fill, mask_of

METADATA = """batch_size max_seqlen_q num_heads_q num_heads_kv headdim headdim_v cache_seqlens
cu_seqlens_q cu_seqlens_k page_size num_blocks max_num_blocks_per_seq causal softmax_scale softcap
num_splits max_seqlen_k window_left window_right"""

PAGE_SIZES = (128, 256, 512, 1024)


@guarded(0)
def forward(*args: object) -> list[Tensor]:
    """mha_fwd of 0.4.2.post1 for Ascend 950, which has one argument more. seqused_q is read by
    nobody. Its own flash-decode cut is not modelled."""
    a = named(FORWARD + " return_softmax_lse", args)
    _check_forward(a)
    fixed = shapes_of(a) | dict(headdim_v=a.v.shape[-1])
    packed = a.cu_seqlens_q is not None and a.page_table is None and a.cu_seqlens_k is None
    kv_lens = a.seqused_k if a.cu_seqlens_k is None else a.cu_seqlens_k
    if a.scheduler_metadata is None:
        q_lens, lens = lengths_on_host(a, a.seqused_k)
        check(min(*q_lens, *lens) > 0, "950 backend (v3) requires positive Q and KV lengths")
        mask = mask_of(a.causal, a.window_left, a.window_right, max(lens))
        scale = a.q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
        t = new_tiling(fixed, mask, scale, a.softcap)
        fill(t, q_lens, lens, paged_varlen=False, num_splits=1, cores=cores())
        read_tiling = lambda: t  # noqa: E731
        if packed:
            kv_lens = torch.tensor([0, *lens]).cumsum(0).int()
    else:
        size = BYTES + 4 * (fixed["batch"] + 1)
        check(a.scheduler_metadata.nbytes == size, "scheduler_metadata has the wrong size")
        bound = a.k.shape[0] if packed else a.k.shape[1]
        if a.cu_seqlens_k is not None:
            bound = a.max_seqlen_k or 0
        elif a.page_table is not None:
            bound *= a.page_table.shape[1]
        mask = mask_of(a.causal, a.window_left, a.window_right, bound)
        read_tiling = tiling_in(a.scheduler_metadata)
        if packed:
            kv_lens = a.scheduler_metadata[BYTES:].view(torch.int32)
    if mask[0] != NO_MASK:
        make_triu_mask(a.q.device)
    out = a.q.new_empty((*a.q.shape[:-1], a.v.shape[-1])) if a.out is None else a.out
    lse = new_lse(a)
    launch_forward(a, read_tiling, out, lse, kv_lens, mask[0], "950")
    empty = torch.empty(0, dtype=torch.float32, device=a.q.device)
    return [out, lse if a.return_softmax_lse else empty, empty, empty.clone()]


def _check_forward(a) -> None:
    check(a.q.dtype in (torch.float16, torch.bfloat16), "only FP16 and BF16 are supported")
    check(a.q.dtype == a.k.dtype == a.v.dtype, "q, k and v must have the same dtype")
    lengths = ("page_table", "cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    for name in ("q", "k", "v", "out", *lengths):
        x = getattr(a, name)
        check(x is None or x.is_contiguous(), f"{name} must be contiguous")
        typed = x is None or name not in lengths or x.dtype == torch.int32
        check(typed, f"{name} must have dtype int32")
    for name in (*UNSUPPORTED, "k_new", "v_new", "qv", "cu_seqlens_k_new", "kv_batch_idx"):
        check(getattr(a, name) is None, f"950 backend (v3) does not support {name}")
    check(a.attention_chunk == 0, "950 backend (v3) does not support attention_chunk")
    check(not a.pack_gqa, "950 backend (v3) does not support pack_gqa")
    check(a.softcap >= 0, "softcap must be non-negative (0.0 disables softcap)")
    varlen, paged = a.cu_seqlens_q is not None, a.page_table is not None
    check(0 <= a.num_splits <= cores(), f"num_splits must be in [0, {cores()}]")
    check(a.num_splits <= 1 or (varlen and paged), "num_splits>1 requires paged KV and varlen q")
    check(a.num_splits <= 1 or a.scheduler_metadata is None, "scheduler_metadata excludes splits")
    check(not varlen or a.max_seqlen_q is not None, "cu_seqlens_q needs max_seqlen_q")
    check(a.cu_seqlens_k is None or not paged, "cu_seqlens_k excludes a page table")
    check(a.seqused_k is not None, "950 backend (v3) requires seqused_k")
    rank = 3 if varlen and not paged else 4
    check(a.q.dim() == 4 - varlen, "query has the wrong rank")
    check(a.k.dim() == a.v.dim() == rank, f"key and value must both be rank {rank}")
    batch = shapes_of(a)["batch"]
    check(a.seqused_k.shape == (batch,), "seqused_k must contain one KV length per batch")
    check(a.k.shape[-1] == a.q.shape[-1], "query and key must have the same head dimension")
    dims = (a.q.shape[-1], a.v.shape[-1])
    check(all(1 <= d <= 256 for d in dims), "head dimensions must be in [1, 256]")
    check(a.q.shape[-2] % a.k.shape[-2] == 0, "heads of key/value must divide heads of query")
    if paged:
        check(a.k.shape[1] in PAGE_SIZES, f"page_block_size must be one of {PAGE_SIZES}")
        check(a.page_table.shape[0] == batch, "page_table must have a row for each sequence")
    elif not varlen:
        check(batch == a.k.shape[0], "query and key/value batch sizes must match")


@guarded(6)
def get_scheduler_metadata(*args: object) -> Tensor:
    """The tiling, then cumulative kv lengths: its size depends on the batch."""
    a = named(METADATA, args)
    check(a.batch_size > 0, "batch size must be positive")
    check(a.num_heads_q % a.num_heads_kv == 0, "heads of key/value must divide heads of query")
    check(a.num_splits in (0, 1), "950 backend (v3) only supports num_splits=0 or 1")
    bound = (a.max_num_blocks_per_seq or 0) * a.page_size if a.page_size else a.max_seqlen_k
    mask = mask_of(a.causal, a.window_left, a.window_right, bound)
    fixed = dict(
        batch=a.batch_size, heads=a.num_heads_q, heads_k=a.num_heads_kv, headdim=a.headdim,
        headdim_v=a.headdim_v, page_size=a.page_size or 128,
        pages_per_row=a.max_num_blocks_per_seq or 0, max_q=a.max_seqlen_q,
    )  # fmt: skip

    def compute(q_lens: list[int], kv_lens: list[int]) -> np.ndarray:
        t = new_tiling(fixed, mask, a.softmax_scale, a.softcap)
        fill(t, q_lens, kv_lens, paged_varlen=False, num_splits=1, cores=cores())
        return t

    size = BYTES + 4 * (a.batch_size + 1)
    metadata = torch.empty(size, dtype=torch.uint8, device=a.cache_seqlens.device)
    return launch_metadata(a, metadata, compute, cumulative=True)


@guarded(1)
def backward(*args: object) -> list[Tensor]:
    """mha_bwd of 0.4.2.post1 for Ascend 950: storage offsets and headdim_v are honoured."""
    a = named_gradients(*args)
    check(a.window_left == a.window_right == -1, "950 v3 bwd does not support sliding windows")
    check(math.isfinite(a.softcap), "softcap must be finite and non-negative")
    check(a.dout.shape[-1] == a.out.shape[-1] == a.v.shape[-1], "dout/out must match v")
    check(not (a.varlen and a.deterministic), "950 v3 bwd: not deterministic for this shape")
    if a.varlen:
        ends = [x.cpu().tolist() for x in (a.cu_seqlens_q, a.cu_seqlens_k)]
        for x, e in zip((a.q, a.k), ends, strict=True):
            check(e[0] == 0 and e[-1] == len(x) and e == sorted(e), "950 v3 bwd: bad cu_seqlens")
    else:
        ends = [[n * i for i in range(len(a.q) + 1)] for n in (a.q.shape[1], a.k.shape[1])]
    launch_backward(a, *ends, -1, 0 if a.causal else -1, from_storage=False)
    softmax_d = torch.empty(a.softmax_lse.shape, dtype=torch.float32, device=a.q.device)
    return [a.dq, a.dk, a.dv, softmax_d]
