"""Rows of q: those that do not count, those of no sequence, and how wide they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_ops.backends.backend import Run
from fa3_ops.backends.call import Attention
from fa3_ops.backends.lowering.keys import keys_in_use


def sequence_of_row(cu_seqlens: Tensor, packed: Tensor) -> Tensor:
    """The sequence of each row of a packed tensor, (total,) int64; rows of none get the nearest."""
    rows = torch.arange(packed.shape[0], device=packed.device, dtype=cu_seqlens.dtype)
    found = torch.bucketize(rows, cu_seqlens[1:].contiguous(), right=True)
    return found.clamp_(max=cu_seqlens.shape[0] - 2)


def has_one_row_each(call: Attention, seqlens_q: Sequence[int]) -> bool:
    """Whether every sequence has one row of q, and every row a sequence."""
    if call.cu_seqlens_q is not None and len(call.q) != call.batch_size:
        return False
    return call.seqused_q is None and len(seqlens_q) > 0 and set(seqlens_q) == {1}


def as_dense_rows(call: Attention) -> Attention:
    """Packed q of one row a sequence as a dense one; see completion.as_asked."""
    if call.cu_seqlens_q is None:
        return call
    return replace(call, q=call.q.unsqueeze(1), cu_seqlens_q=None, max_seqlen_q=None)


def split_unused_rows(call: Attention, run: Run) -> Attention:
    """seqused_q: the rows that do not count become sequences of their own, with one key each, so
    that every row still belongs to one. Their results are cleared afterwards."""
    if call.seqused_q is None:
        return call
    batch_size = call.batch_size
    if call.cu_seqlens_q is None:
        seqlen_q = call.q.shape[1]
        begins = torch.arange(batch_size + 1, dtype=torch.int32, device=call.q.device) * seqlen_q
    else:
        seqlen_q, begins = call.seqlen_q, call.cu_seqlens_q
    cuts = torch.stack((begins[:-1], begins[:-1] + call.seqused_q), dim=1).flatten()
    lengths = torch.stack((keys_in_use(call), torch.ones_like(call.seqused_q)), dim=1).flatten()
    assert call.page_table is not None
    run.note("rows past seqused_q are set apart as sequences of their own")
    return replace(
        call,
        q=call.q.flatten(0, 1) if call.cu_seqlens_q is None else call.q,
        cu_seqlens_q=torch.cat((cuts, begins[-1:])).int(),
        max_seqlen_q=seqlen_q,
        seqused_q=None,
        seqused_k=lengths.int(),
        page_table=call.page_table.repeat_interleave(2, dim=0),
    )


def cover_all_rows(call: Attention, run: Run) -> Attention:
    """Packed rows before the first sequence and behind the last become sequences of their own."""
    assert call.cu_seqlens_q is not None
    assert call.page_table is not None
    ends = call.cu_seqlens_q.new_tensor([0, call.q.shape[0]])
    run.note("rows of q outside every sequence are set apart as sequences of their own")
    return replace(
        call,
        cu_seqlens_q=torch.cat((ends[:1], call.cu_seqlens_q, ends[1:])),
        max_seqlen_q=call.q.shape[0],
        page_table=F.pad(call.page_table, (0, 0, 1, 1)),
        seqused_k=F.pad(keys_in_use(call), (1, 1), value=1),
    )


def drop_empty_sequences(call: Attention, run: Run) -> Attention:
    """Without the sequences that have no row of q. Waits for the device."""
    assert call.cu_seqlens_q is not None
    kept = call.cu_seqlens_q.diff().nonzero().flatten()
    ends = call.cu_seqlens_q[1:][kept]
    run.note("sequences without rows of q are left out")
    return replace(
        call,
        cu_seqlens_q=torch.cat((call.cu_seqlens_q[:1], ends)),
        page_table=None if call.page_table is None else call.page_table[kept],
        seqused_k=keys_in_use(call)[kept],
    )


def pad_headdim(call: Attention, run: Run, headdims: Collection[int], equal: bool) -> Attention:
    """Zeros behind the head dimensions up to ones that the kernel has, which change neither scores
    nor values; `equal` if it wants headdim_v to be headdim. Of activations only."""
    wanted, wanted_v = (
        min(width for width in headdims if width >= d) for d in (call.headdim, call.headdim_v)
    )
    if equal:
        wanted = wanted_v = max(wanted, wanted_v)
    if call.is_cache or (wanted, wanted_v) == (call.headdim, call.headdim_v):
        return call
    run.note(f"headdim is padded to {wanted}")
    return replace(
        call,
        q=F.pad(call.q, (0, wanted - call.headdim)),
        k=F.pad(call.k, (0, wanted - call.headdim)),
        v=F.pad(call.v, (0, wanted_v - call.headdim_v)),
    )
