"""FlashAttention-4's Python interface over fa3_ops.interface, which says what the arguments mean.

Names, order, defaults and return tuples are those of `flash_attn/cute/interface.py` in the
flash-attention repository. What differs:

- Attention always returns (out, lse); lse is None without return_lse=True, also where an input
  requires a gradient (there it comes along then). lse is -inf where a row sees no key, sink or not.
- num_splits, pack_gqa, deterministic, scheduler_metadata, disable_scheduler_metadata,
  seqlen_k_per_split and min_seqlen_k are schedules: they never change a number.
- score_mod, mask_mod, their aux_tensors and aux_scalars, block sparsity and gather_kv_indices are
  refused.
- get_scheduler_metadata checks its arguments and makes nothing that is read.
- Head dims from 1 to 512, any page size, float32 and float64, and CPU tensors are served too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fa3_ops import interface
from fa3_ops.interface import Window
from fa3_ops.ops import checks
from fa3_ops.ops.errors import check_kind, check_kinds, names_arguments


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is not supported by fa3_ops.v4, got {type(value).__name__}")


def _window(window_size: Window, causal: bool) -> tuple[int | None, int | None]:
    """None means no limit, and so does a negative sum; another negative side moves the window away
    from the diagonal, which no operator here can."""
    sides = (None, None) if window_size is None else tuple(window_size)
    if len(sides) != 2:
        raise ValueError(f"window_size must be (left, right), got {sides}")
    left, right = sides
    if causal:
        right = 0
    if left is not None and right is not None and left + right < 0:
        return None, None
    for side in (left, right):
        if side is not None and side < 0:
            raise ValueError(
                "window_size must hold None or numbers from 0 on, because a window that does not "
                f"touch the diagonal is not served, got {sides}"
            )
    return left, right


class SchedulerMetadata(NamedTuple):
    """The fields of FlashAttention-4's, of which only the number of splits is there. Nothing in
    fa3_ops reads it."""

    num_m_blocks_ptr: None
    num_splits_dynamic_ptr: Tensor
    virtual_batch_idx_ptr: None = None
    num_nheads_in_l2_ptr: None = None
    tile_count_semaphore: None = None
    cu_total_m_blocks: None = None
    cu_total_splits_m_blocks: None = None
    blocks_to_batch_idx: None = None


def _check_schedule(
    min_seqlen_k: int | None,
    seqlen_k_per_split: int | None,
    scheduler_metadata: object,
    disable_scheduler_metadata: bool,
) -> None:
    """No operator gets these arguments, to check them."""
    if min_seqlen_k is not None or seqlen_k_per_split is not None:
        check_kind(min_seqlen_k, int | None, "min_seqlen_k")
        check_kind(seqlen_k_per_split, int | None, "seqlen_k_per_split")
    if scheduler_metadata is not None and not isinstance(scheduler_metadata, (tuple, Tensor)):
        raise TypeError(
            "scheduler_metadata must be what get_scheduler_metadata returns, "
            f"got {type(scheduler_metadata).__name__}"
        )
    if type(disable_scheduler_metadata) is not bool:
        check_kind(disable_scheduler_metadata, bool, "disable_scheduler_metadata")


def _queries(q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """k and v as one and the same tensor, 512 wide, are MLA's latent cache: the scores are then
    those of qv alone, or of q where there is no qv."""
    if k is v and v.shape[-1] == 512:
        if qv is None:
            return q, None
        checks.shape(qv, (*q.shape[:-1], 512), "qv")
        checks.dtype(qv, q.dtype, "qv", " like q")
        checks.same_device(q, {"qv": qv})
        return qv, None
    return q, qv


def _result(
    result: Tensor | tuple[Tensor, Tensor], k: Tensor, v: Tensor, qv: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """With MLA the heads are lse's last dimension."""
    if isinstance(result, Tensor):
        return result, None
    out, lse = result
    mla = qv is not None or (k is v and v.shape[-1] == 512)
    return out, lse.transpose(-1, -2) if mla else lse


@names_arguments
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float | None = 0.0,
    num_splits: int | None = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: None = None,
    score_mod_bwd: None = None,
    mask_mod: None = None,
    aux_tensors: None = None,
    aux_scalars: None = None,
    block_sparse_tensors: None = None,
    block_sparse_tensors_bwd: None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """interface.flash_attn_func; with qv, lse is (batch_size, seqlen_q, nheads)."""
    _refuse(
        gather_kv_indices=gather_kv_indices,
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
        block_sparse_tensors=block_sparse_tensors,
        block_sparse_tensors_bwd=block_sparse_tensors_bwd,
    )
    used_q, used_qv = _queries(q, k, v, qv)
    result = interface.flash_attn_func(
        used_q,
        k,
        v,
        softmax_scale,
        causal,
        used_qv,
        window_size=_window(window_size, causal),
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        return_attn_probs=return_lse,
        sinks=learnable_sink,
    )
    return _result(result, k, v, qv)


@names_arguments
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float | None = 0.0,
    num_splits: int | None = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: None = None,
    score_mod_bwd: None = None,
    mask_mod: None = None,
    block_sparse_tensors: None = None,
    aux_tensors: None = None,
    aux_scalars: None = None,
    return_lse: bool = False,
    scheduler_metadata: object = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """interface.flash_attn_varlen_func; max_seqlen_q and max_seqlen_k may be left out, and with qv,
    lse is (total_q, nheads) or (batch_size, seqlen_q, nheads)."""
    _refuse(
        gather_kv_indices=gather_kv_indices,
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        block_sparse_tensors=block_sparse_tensors,
        aux_tensors=aux_tensors,
        aux_scalars=aux_scalars,
    )
    if isinstance(scheduler_metadata, Tensor):
        checks.same_device(q, {"scheduler_metadata": scheduler_metadata})
    _check_schedule(
        min_seqlen_k, seqlen_k_per_split, scheduler_metadata, disable_scheduler_metadata
    )
    # Upper bounds: no sequence is longer than all together.
    if max_seqlen_q is None and cu_seqlens_q is not None:
        max_seqlen_q = q.shape[0]
    if max_seqlen_k is None and cu_seqlens_k is not None:
        max_seqlen_k = k.shape[0]
    used_q, used_qv = _queries(q, k, v, qv)
    result = interface.flash_attn_varlen_func(
        used_q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        softmax_scale,
        causal,
        used_qv,
        window_size=_window(window_size, causal),
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        return_attn_probs=return_lse,
        page_table=page_table,
        sinks=learnable_sink,
    )
    return _result(result, k, v, qv)


@names_arguments
def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: None = None,
    virtual_batch_idx: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """interface.flash_attn_combine; out_partial may be float16 or bfloat16, and its dtype is out's
    default. cu_seqlens says how the rows of a 4-dimensional out_partial belong together, which no
    number depends on, virtual_batch_idx in which order batches are merged. seqused is refused."""
    _refuse(seqused=seqused)
    check_kind(return_lse, bool, "return_lse")
    checks.lengths(virtual_batch_idx, "batch_size", "virtual_batch_idx")
    others = {"cu_seqlens": cu_seqlens, "virtual_batch_idx": virtual_batch_idx, "out": out}
    checks.same_device(out_partial, others, "out_partial")
    if cu_seqlens is not None:
        checks.lengths(cu_seqlens, "batch_size + 1", "cu_seqlens")
        rows = ("num_splits", "total_q", "nheads", "headdim")
        checks.shape(out_partial, rows, "out_partial", " with cu_seqlens")
    if out is not None:
        check_kind(out_dtype, torch.dtype | None, "out_dtype")
        out_dtype = None
    elif out_dtype is None:
        out_dtype = out_partial.dtype
    if out_partial.dtype in (torch.float16, torch.bfloat16):
        out_partial = out_partial.float()
    merged, lse = interface.flash_attn_combine(out_partial, lse_partial, out, out_dtype)
    return merged, lse if return_lse else None


@names_arguments
def get_scheduler_metadata(
    max_seqlen_q: int,
    max_seqlen_k: int,
    nheads: int,
    nheads_kv: int,
    headdim: int,
    num_splits: int,
    headdim_v: int | None = None,
    pack_gqa: int | None = None,
    causal: bool = False,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqlen_k_new: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqlen_k_per_split: int | None = None,
    _arch: int | None = None,
) -> SchedulerMetadata:
    """What flash_attn_varlen_func takes as scheduler_metadata. A schedule never changes a number,
    and the operators plan by themselves: only what it is made from is checked."""
    check_kinds(get_scheduler_metadata, locals())
    offsets = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    lengths = {"seqused_q": seqused_q, "seqused_k": seqused_k}
    sizes = [t.numel() - 1 for t in offsets.values() if t is not None]
    sizes += [t.numel() for t in lengths.values() if t is not None]
    if not sizes:
        raise ValueError(f"one of {', '.join([*offsets, *lengths])} must be given, got None")
    offsets["cu_seqlens_k_new"], lengths["leftpad_k"] = cu_seqlens_k_new, leftpad_k
    given = {name: t for name, t in (offsets | lengths).items() if t is not None}
    name, first = next(iter(given.items()))
    checks.same_device(first, given, name)
    for name, t in offsets.items():
        checks.lengths(t, sizes[0] + 1, name)
    for name, t in lengths.items():
        checks.lengths(t, sizes[0], name)
    return SchedulerMetadata(None, first.new_full((sizes[0],), max(num_splits, 1)))
