"""The contents of scheduler_metadata on NPU, and whether it belongs to a call.

The kernel believes its metadata: lengths, heads and dtype that have changed since give wrong
numbers. So ours carries what it was made for behind the kernel's bytes, and the call compares that
on the device: results of a call that its metadata was not made for are NaN.

That signature is int32: a fingerprint of the configuration, a length for each sequence of the
largest batch, the offsets of all, and -1 for what is not there.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from torch import Tensor

from fa3_ops.backends.call import Attention
from fa3_ops.backends.lowering.keys import keys_in_use

RAW_BYTES = 2384  # of flash_attn_npu 0.4.2
NONE = -1


def size_for(most: int) -> int:
    """In bytes, for batches of up to so many sequences."""
    return RAW_BYTES + 4 * (1 + most + most + 1)


def empty_plan(cache_seqlens: Tensor) -> Tensor:
    """An unwritten one."""
    return cache_seqlens.new_empty((size_for(cache_seqlens.shape[0]),), dtype=torch.uint8)


def raw(metadata: Tensor) -> Tensor:
    """The part that is the kernel's."""
    return metadata[:RAW_BYTES]


def fingerprint_of(*configuration: object) -> int:
    return zlib.crc32(repr(configuration).encode()) & 0x7FFFFFFF


def signature_of(
    fingerprint: int, seqlens_k: Tensor, cu_seqlens_q: Tensor | None, most: int
) -> Tensor:
    """Of a batch, with room for the largest."""
    offsets = seqlens_k[:0] if cu_seqlens_q is None else cu_seqlens_q
    none = seqlens_k.new_full((most + 1,), NONE)
    return torch.cat(
        (
            seqlens_k.new_full((1,), fingerprint),
            *(seqlens_k, none[len(seqlens_k) + 1 :]),
            *(offsets, none[len(offsets) :]),
        )
    )


def signature(metadata: Tensor) -> Tensor:
    """The one in it."""
    return metadata[RAW_BYTES:].view(torch.int32)


def without_padding(call: Attention) -> Attention:
    """Sequences behind those that the metadata was made for have neither keys nor packed rows,
    whatever their lengths say. How many that are, only the device knows."""
    n, metadata = call.batch_size, call.scheduler_metadata
    assert metadata is not None
    if metadata.dtype != torch.uint8 or metadata.shape != (size_for(n),):
        raise RuntimeError(
            f"fa3npu: scheduler_metadata must be made from {n} cache_seqlens, torch.uint8 of shape "
            f"({size_for(n)},), got {metadata.dtype} of shape {tuple(metadata.shape)}"
        )
    counts = signature(metadata) != NONE
    call = replace(call, seqused_k=keys_in_use(call) * counts[1 : 1 + n])
    if call.cu_seqlens_q is None:
        return call
    has_offset = counts[1 + n :]
    end = (call.cu_seqlens_q * has_offset).amax()
    return replace(call, cu_seqlens_q=torch.where(has_offset, call.cu_seqlens_q, end))


def stale(call: Attention) -> Tensor:
    """Whether the metadata was made for another call, as a bool on the device; call is lowered."""
    assert call.scheduler_metadata is not None
    assert call.page_table is not None
    assert call.seqused_k is not None
    fingerprint = fingerprint_of(
        call.cu_seqlens_q is not None,
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
    made_for = signature(call.scheduler_metadata)
    found = signature_of(fingerprint, call.seqused_k, call.cu_seqlens_q, call.batch_size)
    return ((made_for != found) & (made_for != NONE)).any()
