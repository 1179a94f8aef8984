"""The attention function that transformers calls in each layer, with a mask of masks.py."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import fa3_ops
from fa3_ops.integrations.transformers.masks import (
    Intervals,
    is_intervals,
    is_offsets,
    packed_offsets,
)

Scores: TypeAlias = dict[str, Any]  # what a layer makes of its scores, by our functions' names


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query is (batch_size, nheads, seqlen_q, headdim), key and value (batch_size, nheads_k,
    seqlen_k, ...); the result (batch_size, seqlen_q, nheads, headdim_v), and no weights.

    Raises NotImplementedError for what the operators do not have, by its name.
    """
    refuse(attention_mask, dropout, **others)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    left = _left(module, sliding_window, causal)
    scores: Scores = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": (left, 0 if causal else left),
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    if attention_mask is not None and is_intervals(attention_mask):
        return _padded(q, k, v, Intervals(*attention_mask[:, :, 0, 0].unbind(1)), scores), None
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        lengths = int(max_length_q or q.shape[1]), int(max_length_k or k.shape[1])
        offsets = cu_seq_lens_q.int(), cu_seq_lens_k.int()
        if sliding_window is not None and position_ids is not None and q.shape[1] != k.shape[1]:
            return _rolling(q, k, v, position_ids, *offsets, *lengths, scores), None
        return _packed(q, k, v, *offsets, *lengths, scores), None
    if attention_mask is None and causal:
        attention_mask = packed_positions(q, k, position_ids)
    if attention_mask is not None:
        offsets = attention_mask.flatten(), attention_mask.flatten()
        return _packed(q, k, v, *offsets, q.shape[1], k.shape[1], scores), None
    return tensor(fa3_ops.flash_attn_func(q, k, v, **scores)), None


def _left(module: torch.nn.Module, sliding_window: int | None, causal: bool) -> int:
    """How far back a row sees. A layer says how many keys a causal window has, the row's own among
    them; of a window to both sides only the configuration, which masks are made of, is to be
    trusted: it counts the keys on each side."""
    if sliding_window is None:
        return -1
    config: Any = getattr(module, "config", None)
    return sliding_window - 1 if causal else getattr(config, "sliding_window", sliding_window - 1)


def _padded(q: Tensor, k: Tensor, v: Tensor, mask: Intervals, scores: Scores) -> Tensor:
    """Sequences with padding around them. No row is moved; those that do not count give 0."""
    learns = [x for x in (q, k, v, scores["sinks"]) if x is not None and x.requires_grad]
    if torch.is_grad_enabled() and learns:
        places = torch.arange(k.shape[0] + 1, dtype=torch.int32, device=k.device) * k.shape[1]
        out = fa3_ops.flash_attn_varlen_func(
            q,
            k.flatten(0, 1),
            v.flatten(0, 1),
            cu_seqlens_q=None,
            cu_seqlens_k=places + F.pad(mask.k_first, (0, 1)),
            max_seqlen_q=None,
            max_seqlen_k=k.shape[1],
            seqused_q=mask.q_rows,
            seqused_k=mask.k_stop - mask.k_first,
            **scores,
        )
    else:
        out = fa3_ops.flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=mask.k_stop,
            cache_leftpad=mask.k_first,
            cache_start=mask.k_start,
            seqused_q=mask.q_rows,
            **scores,
        )
    return tensor(out)


def tensor(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Our functions' result, which is a tensor where softmax_lse is not asked for."""
    return cast("Tensor", out)


def packed_positions(q: Tensor, k: Tensor, position_ids: Tensor | None) -> Tensor | None:
    """The offsets of sequences packed into one row, for models such as gpt-oss that make their
    masks without position_ids: a sequence begins at each position 0."""
    if position_ids is None or q.shape[:2] != k.shape[:2] or position_ids.shape != (1, q.shape[1]):
        return None
    if q.shape[0] != 1 or q.shape[1] == 1:
        return None
    starts = F.pad(position_ids[:, 1:] == 0, (1, 0), value=True)
    return packed_offsets(starts)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scores: Scores,
) -> Tensor:
    """Sequences one behind the other through the rows of the batch."""
    out = fa3_ops.flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        **scores,
    )
    return tensor(out).view(*q.shape[:-1], -1)


def _rolling(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scores: Scores,
) -> Tensor:
    """Packed sequences of continuous batching, of whose keys a sliding window may have dropped the
    first: as a cache with pages of one key, which can say where its first key stands."""
    lengths = cu_seqlens_k.diff()
    last = position_ids.flatten()[(cu_seqlens_q[1:] - 1).clamp(min=0)]
    columns = torch.arange(max_seqlen_k, dtype=torch.int32, device=k.device)
    out = fa3_ops.flash_attn_with_kvcache(
        q.flatten(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        page_table=(cu_seqlens_k[:-1, None] + columns).clamp(max=k.shape[1] - 1),
        cache_seqlens=lengths,
        cache_start=(last.int() + 1 - lengths).clamp(min=0),
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        **scores,
    )
    return tensor(out).view(*q.shape[:-1], -1)


def refuse(attention_mask: Tensor | None, dropout: float, **others: Any) -> None:
    """What would otherwise be left out without a word."""
    if dropout:
        raise NotImplementedError(
            f"fa3npu: attention dropout must be 0 in training, got {dropout}: set it in the "
            "model's configuration"
        )
    for name in ("position_bias", "relative_position_bias", "attention_similarity"):
        if others.get(name) is not None:
            raise NotImplementedError(f"fa3npu: {name}, a bias added to the scores")
    if others.get("block_table") is not None:
        raise NotImplementedError(
            "fa3npu: block_table: set max_blocks_per_request=0 in the ContinuousBatchingConfig"
        )
    if others.get("output_attentions"):
        raise NotImplementedError("fa3npu: output_attentions: the weights are never in memory")
    if attention_mask is not None and not (
        is_intervals(attention_mask) or is_offsets(attention_mask)
    ):
        raise NotImplementedError(
            "fa3npu: attention_mask must be None or (batch_size, positions), got a mask of shape "
            f"{tuple(attention_mask.shape)}, which may be no interval"
        )
    size = _sequence_parallel_size()
    if size > 1:
        raise NotImplementedError(
            f"fa3npu: sequence parallelism over {size} ranks, which this attention would bypass: "
            "set it to 1"
        )


@torch.compiler.assume_constant_result
def _sequence_parallel_size() -> int:
    """Over how many ranks veRL (Ulysses) or accelerate split a sequence. Both do it around
    transformers' own attention functions, where we are not asked."""
    size = 1
    ulysses = sys.modules.get("verl.utils.ulysses")
    if ulysses is not None:
        size = max(size, ulysses.get_ulysses_sequence_parallel_world_size())
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None:
        parallelism = accelerate.AcceleratorState._shared_state.get("parallelism_config")
        for dimension in ("cp_size", "sp_size"):
            size = max(size, getattr(parallelism, dimension, None) or 1)
    return size
