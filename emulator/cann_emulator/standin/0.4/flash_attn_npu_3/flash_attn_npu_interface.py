"""The Python functions of flash_attn_npu_3 for Ascend 910."""

import math
from typing import Any

import torch
from cann_emulator.standin.kernel_model.host import METADATA
from cann_emulator.standin.kernel_model.interface import (
    make_flash_attn_with_kvcache,
    make_forward,
    maybe_contiguous,
)
from cann_emulator.standin.kernel_model.tiling import BYTES
from torch import Tensor

from . import flash_attn_npu_3

_HEADDIM_BWD_ALIGN = 64


_flash_attn_forward = make_forward("flash_attn_npu_3::_flash_attn_forward", flash_attn_npu_3.fwd)


@torch.library.custom_op(
    "flash_attn_npu_3::_flash_attn_backward",
    mutates_args=("dq", "dk", "dv"),
    device_types="npu",
    schema="""(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sequed_q, Tensor? sequed_k,
    SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv,
    float? softmax_scale, bool is_causal, SymInt window_size_left, SymInt window_size_right,
    float softcap, bool deterministic, SymInt sm_margin) -> Tensor""",
)
def _flash_attn_backward(dout, q, k, v, out, softmax_lse, *rest):
    dout, q, k, v, out = [maybe_contiguous(x) for x in (dout, q, k, v, out)]
    lengths, grads, flags = rest[:6], rest[6:9], rest[9:]
    *_, softmax_d = flash_attn_npu_3.bwd(dout, q, k, v, out, softmax_lse, *grads, *lengths, *flags)
    return softmax_d


@_flash_attn_backward.register_fake
def _flash_attn_backward_fake(dout, q, k, v, out, softmax_lse, cu_seqlens_q, *_):
    """Another shape than the kernel's (batch_size, nheads, max_seqlen_q)."""
    up = lambda n: (n + 127) // 128 * 128  # noqa: E731
    shape = (q.shape[0], q.shape[2], up(q.shape[1]))
    if cu_seqlens_q is not None:
        shape = (q.shape[1], up(q.shape[0] + (cu_seqlens_q.shape[0] - 1) * 128))
    return q.new_empty(shape, dtype=torch.float32)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    """Gradients by the kernel, which wants a headdim that is a multiple of 64."""
    q, k, v, out, softmax_lse, *lengths = ctx.saved_tensors
    if len({x.shape[-1] for x in (q, k, v, out, dout)}) != 1:
        raise ValueError("q/k/v/out/dout must share the same headdim")
    headdim = q.shape[-1]
    pad = -headdim % _HEADDIM_BWD_ALIGN
    if pad:
        dout, q, k, v, out = [torch.nn.functional.pad(x, [0, pad]) for x in (dout, q, k, v, out)]
    grads = [torch.empty_like(x) for x in (q, k, v)]
    _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, *(lengths or [None] * 4), *ctx.max_seqlens, *grads,
        ctx.softmax_scale, ctx.causal, *ctx.window_size, ctx.softcap, ctx.deterministic,
        ctx.sm_margin,
    )  # fmt: skip
    return tuple(x[..., :headdim] for x in grads)


def _forward(
    ctx: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Tensor | None, ...],
    max_seqlens: tuple[int | None, int | None],
    softmax_scale: float | None,
    causal: bool,
    qv: Tensor | None,
    descales: tuple[Tensor | None, ...],
    window_size: tuple[int, int],
    attention_chunk: int,
    softcap: float,
    num_splits: int,
    pack_gqa: bool | None,
    deterministic: bool,
    sm_margin: int,
    return_softmax: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Schedule, then attention; lengths are (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)."""
    if softmax_scale is None:
        softmax_scale = (q.shape[-1] + (0 if qv is None else qv.shape[-1])) ** -0.5
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = lengths
    if cu_seqlens_q is None:
        batch_size, max_q, max_k = q.shape[0], q.shape[1], k.shape[1]
        kv_lens = torch.full((batch_size,), max_k, dtype=torch.int32, device=q.device)
    else:
        batch_size, (max_q, max_k) = cu_seqlens_q.shape[0] - 1, max_seqlens
        kv_lens = cu_seqlens_k[1:] - cu_seqlens_k[:-1] if seqused_k is None else seqused_k
    metadata = get_scheduler_metadata(
        batch_size, max_q, max_k, q.shape[-2], k.shape[-2], q.shape[-1], kv_lens,
        qkv_dtype=q.dtype, cu_seqlens_q=cu_seqlens_q, causal=causal, window_size=window_size,
        softcap=softcap, num_splits=num_splits, sm_margin=sm_margin, softmax_scale=softmax_scale,
    )  # fmt: skip
    out, softmax_lse, *_ = _flash_attn_forward(
        q, k, v, None, None, qv, None, cu_seqlens_q, cu_seqlens_k, None, seqused_q, seqused_k,
        *max_seqlens, None, None, None, None, None, None, *descales, softmax_scale,
        causal=causal, window_size_left=window_size[0], window_size_right=window_size[1],
        attention_chunk=attention_chunk, softcap=softcap, scheduler_metadata=metadata,
        num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin,
    )  # fmt: skip
    ctx.save_for_backward(q, k, v, out, softmax_lse, *lengths)
    ctx.max_seqlens, ctx.softmax_scale, ctx.causal = max_seqlens, softmax_scale, causal
    ctx.window_size, ctx.softcap = window_size, softcap
    ctx.deterministic, ctx.sm_margin = deterministic, sm_margin
    return (out, softmax_lse) if return_softmax else out


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *rest):
        return _forward(ctx, q, k, v, (None,) * 4, (None, None), *rest)

    @staticmethod
    def backward(ctx, dout, *_):
        return *_backward(ctx, dout), *[None] * 12


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, used_q, used_k, max_q, max_k, *rest):
        return _forward(ctx, q, k, v, (cu_q, cu_k, used_q, used_k), (max_q, max_k), *rest)

    @staticmethod
    def backward(ctx, dout, *_):
        return *_backward(ctx, dout), *[None] * 18


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    return FlashAttnFunc.apply(
        q, k, v, softmax_scale, causal, qv, (q_descale, k_descale, v_descale), window_size,
        attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    return FlashAttnVarlenFunc.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, qv, (q_descale, k_descale, v_descale), window_size,
        attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """The raw extension has no such function: AttributeError, as in the real package."""
    return flash_attn_npu_3.fwd_combine(out_partial, lse_partial, out, out_dtype)


def _validate_scheduler_metadata(
    scheduler_metadata, q, k_cache, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q,
    softmax_scale, causal, window_size, softcap, num_splits,
):  # fmt: skip
    """Compares what the metadata was created with; not lengths, batch, heads, headdim, dtype.
    The attribute is lost by clone() and copy_(), so metadata in stable storage does not pass."""
    params = getattr(scheduler_metadata, "_fa_scheduler_params", None)
    if params is None:
        raise RuntimeError("scheduler_metadata has no creation-argument fingerprint")
    if page_table is not None:
        page_size, max_seqlen_k = k_cache.shape[1], k_cache.shape[1] * page_table.shape[1]
    else:
        page_size, max_seqlen_k = None, k_cache.shape[1]
        if cu_seqlens_q is not None and k_cache.dim() == 3:
            max_seqlen_k = int(cache_seqlens.max().item())
    expected = {
        "causal": bool(causal),
        "window_size": tuple(window_size),
        "softcap": float(softcap),
        "softmax_scale": float(softmax_scale),
        "varlen_q": cu_seqlens_q is not None,
        "num_splits": num_splits,
        "max_seqlen_q": q.shape[1] if cu_seqlens_q is None else max_seqlen_q,
        "page_size": page_size,
        "max_seqlen_k": max_seqlen_k,
    }
    wrong = [
        f"{key}: metadata={params[key]!r} vs call={value!r}"
        for key, value in expected.items()
        if not (
            math.isclose(params[key], value, rel_tol=1e-6)
            if isinstance(value, float)
            else params[key] == value
        )
    ]
    if wrong:
        raise ValueError("scheduler_metadata arguments do not match this call: " + "; ".join(wrong))


flash_attn_with_kvcache = make_flash_attn_with_kvcache(
    _flash_attn_forward, _validate_scheduler_metadata
)


@torch.library.custom_op(
    "flash_attn_npu_3::_get_scheduler_metadata",
    mutates_args=(),
    schema="""(SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_heads_q,
    SymInt num_heads_kv, SymInt headdim, SymInt headdim_v, ScalarType qkv_dtype,
    Tensor cache_seqlens, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new,
    Tensor? seqused_q, Tensor? cache_leftpad, SymInt? page_size, SymInt max_seqlen_k_new,
    bool causal, SymInt window_size_left, SymInt window_size_right, SymInt attention_chunk,
    float softcap, SymInt num_splits, bool? pack_gqa, SymInt sm_margin,
    float? softmax_scale) -> Tensor""",
)
def _get_scheduler_metadata_op(*args):
    metadata = flash_attn_npu_3.get_scheduler_metadata(*args)
    a = dict(zip(METADATA.split(), args, strict=True))
    scale = a["headdim"] ** -0.5 if a["softmax_scale"] is None else a["softmax_scale"]
    same = ("causal", "softcap", "page_size", "max_seqlen_q", "max_seqlen_k", "num_splits")
    metadata._fa_scheduler_params = {name: a[name] for name in same} | {
        "window_size": (a["window_left"], a["window_right"]),
        "softmax_scale": scale,
        "varlen_q": a["cu_seqlens_q"] is not None,
    }
    return metadata


@_get_scheduler_metadata_op.register_fake
def _get_scheduler_metadata_fake(*args):
    return torch.empty(BYTES, dtype=torch.uint8, device=args[8].device)


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    softmax_scale=None,
):
    cache_seqlens = maybe_contiguous(cache_seqlens)
    if headdim_v is None:
        headdim_v = headdim
    return _get_scheduler_metadata_op(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v,
        qkv_dtype, cache_seqlens, cu_seqlens_q, None, cu_seqlens_k_new, None, cache_leftpad,
        page_size, max_seqlen_k_new, causal, window_size[0], window_size[1], attention_chunk,
        softcap, num_splits, pack_gqa, sm_margin, softmax_scale,
    )  # fmt: skip
