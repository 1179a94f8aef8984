"""flash_attn_npu's FlashAttention-3 kernel for Ascend 910B/C and 950.

The kernel takes much more than it computes: docs/npu.md lists what it accepts and gets wrong. Here
it is handed only what it computes right.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Attention
from fa3_ops.backends.choice import asked_for
from fa3_ops.backends.lowering import keys, rows
from fa3_ops.backends.lowering.completion import as_asked, blind_rows, clear
from fa3_ops.backends.lowering.lengths import Lengths
from fa3_ops.backends.npu import device, scheduler_metadata
from fa3_ops.backends.npu.capabilities import Capabilities, capabilities, splits
from fa3_ops.backends.npu.device import Kernel


def not_supported(call: Attention, seqlens: list[tuple[int, int]], can: Capabilities) -> list[str]:
    """Why this build does not compute the call, even lowered; over these (rows of q, keys) of every
    sequence where the host knows them."""
    reasons = width_reasons(call, can)
    for name, given in (
        ("qv", call.qv is not None),
        ("alibi_slopes", call.alibi_slopes is not None),
        ("attention_chunk", call.attention_chunk > 0),
    ):
        if given:
            reasons.append(name)
    reasons += mask_reasons(call, seqlens, can)
    if call.softcap > 0 and not can.softcap:
        reasons.append("softcap")
    return reasons


def width_reasons(call: Attention, can: Capabilities) -> list[str]:
    """Against dtype and head dimensions. Those of activations are padded; a cache would have to be
    copied."""
    reasons = [] if call.q.dtype in can.dtypes else [f"dtype {call.q.dtype}"]
    d, d_v = call.headdim, call.headdim_v
    if max(d, d_v) > max(can.headdims) or (call.is_cache and not {d, d_v} <= set(can.headdims)):
        reasons.append(f"headdim {d if d not in can.headdims else d_v}")
    elif d != d_v and call.is_cache and not can.headdim_v_differs:
        reasons.append(f"headdim_v {d_v} beside headdim {d}")
    return reasons


def mask_reasons(call: Attention, seqlens: list[tuple[int, int]], can: Capabilities) -> list[str]:
    """Against the mask."""
    reasons = []
    longest_k = max((k for q, k in seqlens if q > 0), default=0)
    if call.is_local:
        if not can.window:
            reasons.append("window_size")
        if seqlens and cuts_window(call, longest_k):
            reasons.append("window_size with more rows of q than keys")
        if not can.window_of_few_rows and may_flash_decode(call, seqlens):
            reasons.append("window_size over 1024 keys or more of few packed rows of q")
    left, right = call.window_size
    counts_as_causal = right == 0 and not 0 <= left < longest_k
    if counts_as_causal and not can.causal_of_few_keys and any(0 < k < q for q, k in seqlens):
        reasons.append("causal with more rows of q than keys")
    return reasons


def may_flash_decode(call: Attention, seqlens: list[tuple[int, int]]) -> bool:
    """Whether the kernel may split the keys: at most 16 packed rows of q, 1024 keys in pages, which
    any keys may become."""
    packed = call.cu_seqlens_q is not None or call.seqused_q is not None
    most_q, most_k = (max(x) for x in zip(*(seqlens or [(0, 0)]), strict=True))
    return packed and most_q <= 16 and most_k >= 1024


def cuts_window(call: Attention, longest_k: int) -> bool:
    """Whether the kernel computes another window: a right side that is infinite or past the longest
    k becomes the longest k, or infinite without a left side. More rows than keys notice it."""
    right = call.window_size[1]
    return call.seqlen_q > longest_k + 1 and not 0 <= right < longest_k


def metadata_reasons(call: Attention, can: Capabilities) -> list[str]:
    """Why the kernel would wait for the host even with scheduler_metadata, or compute something
    else."""
    reasons = [] if can.metadata else ["scheduler_metadata"]
    if call.page_table is None or call.k.shape[1] not in can.page_sizes:
        reasons.append("scheduler_metadata without pages of a size that the kernel has")
    for name, given in (
        ("seqused_q", call.seqused_q is not None),
        ("cache_leftpad", call.cache_leftpad is not None),
        # There may be as few keys when it runs.
        ("window_size", call.is_local and cuts_window(call, 1)),
    ):
        if given:
            reasons.append(f"{name} with scheduler_metadata")
    return reasons


def capture_reasons(call: Attention, can: Capabilities) -> list[str]:
    """Why a graph cannot record the call."""
    if call.scheduler_metadata is None:
        return ["graph capture without scheduler_metadata"]
    return metadata_reasons(call, can)


def follows_metadata(call: Attention) -> bool:
    """Whether this kernel serves a call that is not captured, and as what its metadata was made
    for, without a copy of the cache."""
    found = device.kernel()
    others = asked_for() not in (None, FlashAttnNpu.name)
    if isinstance(found, str) or others or call.is_narrow:
        return False
    can = capabilities(found)
    reasons = not_supported(call, [], can) + metadata_reasons(call, can)
    return not reasons and keys.keeps_pages(call)


class FlashAttnNpu(Backend[Attention]):
    name = "flash_attn_npu"
    reads_lengths = True
    reads_narrow = False

    def not_supported_reasons(self, request: Attention, run: Run) -> list[str]:
        found = device.kernel()
        if isinstance(found, str):
            return [found]
        can = capabilities(found)
        reasons = not_supported(request, run.lengths.pairs if run.lengths else [], can)
        return reasons + capture_reasons(request, can) if run.capturing else reasons

    def is_bitwise(self, request: Attention, run: Run) -> bool:
        """Of splits, of cache_start and of sinks, which plain torch operators count, docs/npu.md
        tells."""
        asked = run.request
        plain = isinstance(asked, Attention) and asked.sinks is asked.cache_start is None
        return plain and request.num_splits <= 1 and not device.found_kernel().is_950

    def lower(self, request: Attention, run: Run) -> Attention:
        return lower(request, run, capabilities(device.found_kernel()))

    def launch(self, request: Attention, lowered: Attention, run: Run) -> tuple[Tensor, Tensor]:
        lengths = run.lengths
        if lengths is not None and not any(lengths.seqlens_q):
            return request.empty_results()
        out, softmax_lse = as_asked(request, *launch(lowered, device.found_kernel(), lengths))
        if lengths is None or not lengths.plain:
            clear(out, softmax_lse, blind_rows(request))
        if lowered.scheduler_metadata is not None:
            stale = scheduler_metadata.stale(lowered)
            out.masked_fill_(stale, float("nan"))
            softmax_lse.masked_fill_(stale, float("nan"))
        return out, softmax_lse


def lower(call: Attention, run: Run, can: Capabilities) -> Attention:
    """The steps that this kernel needs, and bounds for what no host has seen."""
    lengths = run.lengths
    call = rows.pad_headdim(call, run, can.headdims, equal=not can.headdim_v_differs)
    all_have_rows = lengths is not None and all(lengths.seqlens_q) and call.seqused_q is None
    drops = can.calling.lists_keys and not all_have_rows
    empty = call.cu_seqlens_k is not None and not (lengths and lengths.plain)
    # Metadata is made for one page size, and for as many of them as the page table has.
    sizes = can.page_sizes if call.scheduler_metadata is None else (call.k.shape[1],)
    call = keys.as_pages(call, run, sizes, force=can.calling.paged_only or empty or drops)
    call = rows.split_unused_rows(call, run)
    if drops and call.cu_seqlens_q is not None:
        call = rows.drop_empty_sequences(call, run)
    if can.calling.lists_keys:
        call = replace(call, seqused_k=keys.keys_in_use(call))
    return replace(keys.bound(call), q=call.q.contiguous())


def launch(call: Attention, found: Kernel, lengths: Lengths | None) -> tuple[Tensor, Tensor]:
    """The raw kernel; its LSE is (batch_size, nheads, seqlen_q) or (nheads, total_q)."""
    calling = capabilities(found).calling
    q, cu_seqlens_q = call.q, call.cu_seqlens_q
    out = torch.empty((*q.shape[:-1], call.headdim_v), dtype=q.dtype, device=q.device)
    into = out
    first = lengths.cu_seqlens_q[0] if lengths is not None and lengths.cu_seqlens_q else 0
    if calling.relative_cu_seqlens and first > 0 and cu_seqlens_q is not None:
        q, into, cu_seqlens_q = q[first:], out[first:], cu_seqlens_q - first
    left, right = (-1, -1) if call.causal else call.window_size
    can_split = call.page_table is not None and cu_seqlens_q is not None
    result: list[Any] = found.module.fwd(
        q,
        call.k,
        call.v,
        None,  # k_new
        None,  # v_new
        None,  # qv
        into,
        cu_seqlens_q,
        call.cu_seqlens_k,
        None,  # cu_seqlens_k_new
        None,  # seqused_q
        call.seqused_k,
        call.max_seqlen_q if cu_seqlens_q is not None else None,
        call.max_seqlen_k,
        call.page_table,
        None,  # kv_batch_idx
        None,  # leftpad_k
        None,  # rotary_cos
        None,  # rotary_sin
        None,  # seqlens_rotary
        None,  # q_descale
        None,  # k_descale
        None,  # v_descale
        call.softmax_scale,
        call.causal,
        left,
        right,
        0,  # attention_chunk
        call.softcap,
        True,  # rotary_interleaved
        None
        if call.scheduler_metadata is None
        else scheduler_metadata.raw(call.scheduler_metadata),
        splits(call.num_splits, can_split, found),
        None,  # pack_gqa
        0,  # sm_margin
        *((True,) if calling.asks_for_lse else ()),  # return_softmax_lse
    )
    softmax_lse: Tensor = result[1]
    if calling.token_major_lse:
        softmax_lse = softmax_lse.transpose(-1, -2).contiguous()
    elif cu_seqlens_q is not None and not (lengths is not None and lengths.plain):
        softmax_lse = by_total_q(softmax_lse, cu_seqlens_q)
    if into is not out:
        before = softmax_lse.new_zeros((*softmax_lse.shape[:-1], len(out) - len(into)))
        softmax_lse = torch.cat((before, softmax_lse), dim=-1)
    return out, softmax_lse


def by_total_q(softmax_lse: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """The kernel lays the heads of packed q cu_seqlens_q[-1] rows apart, in a tensor where they are
    total_q rows apart: the same only if no row is behind the last sequence."""
    nheads, total_q = softmax_lse.shape
    head = torch.arange(nheads, dtype=torch.int32, device=softmax_lse.device)[:, None]
    row = torch.arange(total_q, dtype=torch.int32, device=softmax_lse.device)
    at = (head * cu_seqlens_q[-1] + row).clamp_(max=nheads * total_q - 1)
    return softmax_lse.flatten()[at]
