"""The contents of scheduler_metadata on NPU, and whether it belongs to a call.

The kernel believes its metadata: lengths, heads and dtype that have changed since give wrong
numbers. So ours carries what it was made for behind the kernel's bytes, and the call compares that
on the device: results of a call that its metadata was not made for are NaN.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from fa3_ops.backends.call import Attention

RAW_BYTES = 2384  # of flash_attn_npu 0.4.2


def empty_plan(like: Tensor, batch_size: int, packed: bool) -> Tensor:
    """An unwritten one, from cache_seqlens."""
    lengths = 1 + batch_size + (batch_size + 1 if packed else 0)
    return like.new_empty((RAW_BYTES + 4 * lengths,), dtype=torch.uint8)


def raw(metadata: Tensor) -> Tensor:
    """The part that is the kernel's."""
    return metadata[:RAW_BYTES]


def fingerprint_of(*configuration: object) -> int:
    return zlib.crc32(repr(configuration).encode()) & 0x7FFFFFFF


def signature_of(fingerprint: int, seqlens_k: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """(1 + batch_size [+ batch_size + 1],) int32."""
    parts = [seqlens_k.new_full((1,), fingerprint), seqlens_k]
    return torch.cat(parts if cu_seqlens_q is None else [*parts, cu_seqlens_q])


def stale(call: Attention) -> Tensor:
    """Whether the metadata was made for another call, as a bool on the device; call is lowered."""
    assert call.scheduler_metadata is not None
    assert call.page_table is not None
    assert call.seqused_k is not None
    fingerprint = fingerprint_of(
        call.batch_size,
        call.seqlen_q,
        call.page_table.shape[1],
        call.nheads,
        call.nheads_k,
        call.headdim,
        call.headdim_v,
        call.k.shape[1],
        call.q.dtype,
        *call.window_size,
        call.softcap,
        call.softmax_scale,
        max(call.num_splits, 1),
    )
    made_for = call.scheduler_metadata[RAW_BYTES:].view(torch.int32)
    expected = signature_of(fingerprint, call.seqused_k, call.cu_seqlens_q)
    if made_for.shape != expected.shape:
        raise RuntimeError(
            f"fa3npu: scheduler_metadata must be made for batch_size {call.batch_size} and "
            f"{'packed' if call.cu_seqlens_q is not None else 'dense'} q"
        )
    return (made_for != expected).any()
