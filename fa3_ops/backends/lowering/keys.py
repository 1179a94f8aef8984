"""Where the keys are: from any layout to the ones that a kernel reads.

The main trick: a page table can address any keys in place. A dense cache is a paged one whose
pages are slices of it; keys that start anywhere (left padding, packed sequences used in part) are
pages of one token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_ops.backends.backend import Run
from fa3_ops.backends.call import Attention
from fa3_ops.backends.fallback import fallback


def note_copy(call: Attention, run: Run, why: str) -> None:
    """Says that keys and values are copied; of a cache that is a fallback."""
    run.note(f"copies what is read of k and v, because {why}")
    if call.is_cache:
        fallback(f"copies what is read of the cache, because {why}")


def select_table_rows(call: Attention, run: Run) -> Attention:
    """cache_batch_idx of a paged cache: the rows of the page table that it names."""
    if call.cache_batch_idx is None or call.page_table is None:
        return call
    run.note("cache_batch_idx selects rows of the page table")
    return replace(call, page_table=_selected(call), cache_batch_idx=None)


def _selected(call: Attention) -> Tensor:
    assert call.page_table is not None
    if call.cache_batch_idx is None:
        return call.page_table
    row = call.cache_batch_idx.clamp(0, call.page_table.shape[0] - 1)
    return call.page_table.index_select(0, row)


def hidden_pages(call: Attention) -> Tensor | None:
    """How many pages at the start of each sequence are none, as those before a window may be:
    (batch_size,) int32, or None where there is no window."""
    local = call.window_size[0] >= 0 or call.attention_chunk > 0
    if call.page_table is None or not local or call.page_table.shape[1] == 0:
        return None
    pages, page_size = _selected(call), call.k.shape[1]
    hidden = ((pages >= 0) & (pages < call.k.shape[0])).int().argmax(1).int()
    return torch.where(hidden * page_size < keys_in_use(call), hidden, 0)


def drops_hidden_pages(call: Attention) -> bool:
    """Whether a sequence may begin later than it does. Chunks are counted from its start, and a
    schedule was made for its length."""
    return call.attention_chunk == 0 and call.scheduler_metadata is None


def without_hidden_pages(call: Attention) -> Attention:
    """Pages before a window, which no row sees, may have any id. A kernel loads whole blocks, and a
    weight of 0 does not silence NaN: a sequence begins with its first page that is one, and where
    it cannot, that page stands for those before."""
    hidden = hidden_pages(call)
    if hidden is None:
        return call
    assert call.page_table is not None
    at = torch.arange(call.page_table.shape[1], device=hidden.device).expand_as(call.page_table)
    first = hidden[:, None]
    if not drops_hidden_pages(call):
        return replace(call, page_table=call.page_table.gather(1, at.maximum(first)))
    dropped = hidden * call.k.shape[1]
    pads = call.cache_leftpad
    return replace(
        call,
        page_table=call.page_table.gather(1, (at + first).clamp(max=at.shape[1] - 1)),
        seqused_k=keys_in_use(call) - dropped,
        cache_leftpad=None if pads is None else (pads - dropped).clamp(min=0),
    )


def needs_pages(call: Attention, counts_keys: bool) -> bool:
    """Whether dense or packed keys have to be addressed through a page table."""
    if call.cu_seqlens_k is not None:
        given = (call.seqused_k, call.seqused_q)
        return call.cu_seqlens_q is None or any(t is not None for t in given)
    return (
        (call.seqused_k is not None and not counts_keys)
        or call.seqused_q is not None
        or call.cache_batch_idx is not None
        or call.cache_leftpad is not None
        or call.cu_seqlens_q is not None
    )


def keeps_pages(call: Attention) -> bool:
    """Whether a paged cache is read where it lies as the pages that it has."""
    if call.page_table is None or call.cache_leftpad is not None:
        return False
    if call.k.is_contiguous() and call.v.is_contiguous():
        return True
    strides = token_strides(call.k)
    if strides is None or strides != token_strides(call.v) or strides[1] != 1:
        return False
    return _slice_size(call, strides[0], (call.k.shape[1],)) is not None


def as_pages(
    call: Attention,
    run: Run,
    page_sizes: Collection[int],
    force: bool = False,
    counts_keys: bool = False,
) -> Attention:
    """Keys in place behind a page table with a page size that the kernel takes; dense and packed
    ones only where they need one, or by force. counts_keys: seqused_k of dense keys needs none."""
    whole = call.k.is_contiguous() and call.v.is_contiguous()
    if call.page_table is None:
        if not call.is_cache and not whole:  # activations, such as slices of one projection
            call = replace(call, k=call.k.contiguous(), v=call.v.contiguous())
            whole = True
        if whole and not force and not needs_pages(call, counts_keys):
            return call
    elif whole and call.cache_leftpad is None and call.k.shape[1] in page_sizes:
        return call
    strides = token_strides(call.k)
    if strides is None or strides != token_strides(call.v):
        return gather_keys(call, run, "its strides are not whole tokens", page_sizes)
    if call.cu_seqlens_k is None and call.cache_leftpad is None and strides[1] == 1:
        size = _slice_size(call, strides[0], page_sizes)
        if size is not None:
            return _pages_of_slices(call, run, strides[0], size)
    if 1 not in page_sizes:
        return gather_keys(call, run, "no page size of the kernel fits it", page_sizes)
    return _pages_of_one_token(call, run, strides)


def token_strides(x: Tensor) -> list[int] | None:
    """The strides of the dimensions before (nheads_k, headdim) in tokens, or None if they are not
    whole tokens."""
    heads, width = x.shape[-2:]
    if (width > 1 and x.stride(-1) != 1) or (heads > 1 and x.stride(-2) != width):
        return None
    strides: list[int] = []
    following = 1  # what the stride of a dimension of size 1 is taken for
    for size, stride in zip(x.shape[-3::-1], x.stride()[-3::-1], strict=True):
        if size > 1 and stride % (heads * width):
            return None
        strides.insert(0, stride // (heads * width) if size > 1 else following)
        following = strides[0] * size
    return strides


def _tokens_behind(x: Tensor) -> int:
    """How many tokens the memory holds from the first one of x on."""
    elements = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return elements // prod(x.shape[-2:])


def _pool(x: Tensor, num_pages: int, page_size: int) -> Tensor:
    """The memory from the first token of x on as (num_pages, page_size, nheads_k, headdim)."""
    heads, width = x.shape[-2:]
    token = heads * width
    shape = (num_pages, page_size, heads, width)
    return x.as_strided(shape, (page_size * token, token, width, 1))


def _slice_size(call: Attention, distance: int, page_sizes: Collection[int]) -> int | None:
    """The largest page size that cuts dense entries or pages, `distance` tokens apart, without
    leaving their memory."""
    entries, rows = call.k.shape[:2]
    behind = min(_tokens_behind(call.k), _tokens_behind(call.v))
    largest = None
    for size in page_sizes:
        reach = (entries - 1) * distance + -(-rows // size) * size
        whole = call.page_table is None or rows % size == 0
        if size <= rows and distance % size == 0 and whole and reach <= behind:
            largest = size
    return largest


def _pages_of_slices(call: Attention, run: Run, distance: int, size: int) -> Attention:
    entries, rows = call.k.shape[:2]
    per_entry = -(-rows // size)
    num_pages = (entries - 1) * (distance // size) + per_entry
    slices = torch.arange(per_entry, dtype=torch.int32, device=call.k.device)
    first = entry_of_sequence(call) * (distance // size)
    run.note(f"k and v are read in place as pages of {size}")
    return replace(
        call,
        k=_pool(call.k, num_pages, size),
        v=_pool(call.v, num_pages, size),
        page_table=(first[..., None] + slices).view(call.batch_size, -1),
        seqused_k=keys_in_use(call),
        cache_batch_idx=None,
    )


def entry_of_sequence(call: Attention) -> Tensor:
    """The batch entry of a dense cache, (batch_size,), or the page table of a paged one."""
    if call.page_table is not None:
        return call.page_table.clamp(0, call.k.shape[0] - 1)
    if call.cache_batch_idx is not None:
        return call.cache_batch_idx.clamp(0, call.k.shape[0] - 1)
    return torch.arange(call.batch_size, dtype=torch.int32, device=call.k.device)


def keys_in_use(call: Attention) -> Tensor:
    """seqused_k, (batch_size,) int32, or what the layout says where it is not given. Left padding
    counts."""
    if call.seqused_k is not None:
        return call.seqused_k
    if call.cu_seqlens_k is not None:
        return call.cu_seqlens_k.diff()
    capacity = call.k.shape[1] * (1 if call.page_table is None else call.page_table.shape[1])
    return torch.full((call.batch_size,), capacity, dtype=torch.int32, device=call.k.device)


def token_table(call: Attention, strides: list[int]) -> Tensor:
    """Where key j of each sequence lies, in tokens from the first element of k: (batch_size, most
    keys) int32. Left padding is passed over; entries past a sequence's keys name some valid one."""
    device = call.k.device
    if call.cu_seqlens_k is not None:
        j = torch.arange(max(call.max_seqlen_k or 0, 1), dtype=torch.int32, device=device)
        # Packed keys are activations, contiguous by now.
        return (call.cu_seqlens_k[:-1, None] + j).clamp_(max=call.k.shape[0] - 1)
    entries = entry_of_sequence(call)
    rows = call.k.shape[1]
    per_table = 1 if call.page_table is None else entries.shape[1]
    j = torch.arange(max(rows * per_table, 1), dtype=torch.int32, device=device)
    if call.cache_leftpad is not None:
        j = (call.cache_leftpad[:, None] + j).clamp_(0, max(rows * per_table - 1, 0))
    else:
        j = j.expand(call.batch_size, -1)
    if call.page_table is None:
        return (entries[:, None] * strides[0] + j * strides[1]).int()
    pages = entries.gather(1, (j // rows).long())
    return (pages * strides[0] + (j % rows) * strides[1]).int()


def _pages_of_one_token(call: Attention, run: Run, strides: list[int]) -> Attention:
    run.note("k and v are read in place as pages of one token")
    num_pages = sum((n - 1) * stride for n, stride in zip(call.k.shape, strides, strict=False)) + 1
    return replace(
        call,
        k=_pool(call.k, num_pages, 1),
        v=_pool(call.v, num_pages, 1),
        page_table=token_table(call, strides),
        seqused_k=keys_in_use(call) - (0 if call.cache_leftpad is None else call.cache_leftpad),
        cu_seqlens_k=None,
        cache_batch_idx=None,
        cache_leftpad=None,
    )


def gather_keys(
    call: Attention, run: Run, why: str, page_sizes: Collection[int] | None = None
) -> Attention:
    """A copy of the keys and values of every sequence, dense (batch_size, most keys, ...), or in
    pages of one of page_sizes. Left padding, cache_batch_idx and the page table are spent."""
    note_copy(call, run, why)
    packed = call.cu_seqlens_k is not None
    rows = 1 if packed else call.k.shape[1]
    # Positions in units of (entry, row), so that any strides will do.
    table = token_table(call, [1] if packed else [rows, 1]).long()
    most = table.shape[1]
    size = 1 if page_sizes is None else min(page_sizes, key=lambda n: (-(-most // n) * n, -n))
    table = F.pad(table, (0, -most % size))
    if packed:
        k, v = call.k[table], call.v[table]
    else:
        k, v = (x[table // rows, table % rows] for x in (call.k, call.v))
    call = replace(
        call,
        k=k,
        v=v,
        seqused_k=keys_in_use(call) - (0 if call.cache_leftpad is None else call.cache_leftpad),
        page_table=None,
        cu_seqlens_k=None,
        cache_batch_idx=None,
        cache_leftpad=None,
    )
    if page_sizes is None:
        return call
    pages = torch.arange(table.numel() // size, dtype=torch.int32, device=k.device)
    return replace(
        call,
        k=k.reshape(-1, size, *k.shape[2:]),
        v=v.reshape(-1, size, *v.shape[2:]),
        page_table=pages.view(call.batch_size, -1),
    )


def without_far_pages(call: Attention, most_keys: int) -> Attention:
    """The page table without what is behind the longest sequence."""
    if call.page_table is None:
        return call
    return replace(call, page_table=call.page_table[:, : max(-(-most_keys // call.k.shape[1]), 1)])


def bound(call: Attention) -> Attention:
    """Page ids within the cache, lengths within the page table, and at least one key for every
    sequence: a kernel never sees an empty one, of which it makes different kinds of wrong."""
    if call.page_table is None:
        return call
    num_pages, page_size = call.k.shape[:2]
    capacity = call.page_table.shape[1] * page_size
    return replace(
        call,
        page_table=call.page_table.clamp(0, num_pages - 1).contiguous(),
        seqused_k=keys_in_use(call).clamp(1, capacity),
    )
