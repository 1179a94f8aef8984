"""What the Python functions of the releases share: the same signatures and layers of dispatch (a
custom operator that declares no mutation, maybe_contiguous on every argument)."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def make_forward(name: str, fwd: Callable[..., Any]) -> Any:
    """The custom operator over a raw fwd."""

    @torch.library.custom_op(name, mutates_args=(), device_types="npu")
    def _flash_attn_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
        qv: Tensor | None = None,
        out_: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cu_seqlens_k_new: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        page_table: Tensor | None = None,
        kv_batch_idx: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        seqlens_rotary: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Tensor | None = None,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, k_new, v_new = [maybe_contiguous(x) for x in (q, k, k_new, v_new)]
        v = v.contiguous() if v.stride(-1) != 1 and v.stride(-3) != 1 else v
        cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new = [
            maybe_contiguous(x) for x in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new)
        ]
        seqused_q, seqused_k = [maybe_contiguous(x) for x in (seqused_q, seqused_k)]
        page_table, kv_batch_idx, leftpad_k = [
            maybe_contiguous(x) for x in (page_table, kv_batch_idx, leftpad_k)
        ]
        rotary_cos, rotary_sin = [maybe_contiguous(x) for x in (rotary_cos, rotary_sin)]
        seqlens_rotary = maybe_contiguous(seqlens_rotary)
        out, softmax_lse, out_accum, softmax_lse_accum = fwd(
            q, k, v, k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new,
            seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k,
            rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale,
            causal, window_size_left, window_size_right, attention_chunk, softcap,
            rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin,
        )  # fmt: skip
        if out_accum is None:
            out_accum = torch.tensor([], device=out.device)
        if softmax_lse_accum is None:
            softmax_lse_accum = torch.tensor([], device=out.device)
        return out, softmax_lse, out_accum, softmax_lse_accum

    signature = inspect.signature(_flash_attn_forward._init_fn)

    @_flash_attn_forward.register_fake
    def _flash_attn_forward_fake(
        *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        a = bound.arguments
        q, v, cu_seqlens_q, num_splits = a["q"], a["v"], a["cu_seqlens_q"], a["num_splits"]
        *batch, rows, num_heads, _ = q.shape
        if cu_seqlens_q is not None and a["max_seqlen_q"] is None:
            raise ValueError("max_seqlen_q must be provided if cu_seqlens_q is provided")
        if a["out_"] is not None:
            raise TypeError("Tracing with pre-allocated output tensor is not supported.")
        if num_splits <= 0:
            raise ValueError(f"tracing with num_splits <= 0 not supported. Got {num_splits=}")
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        softmax_lse = q.new_empty((*batch, num_heads, rows), dtype=torch.float32)
        if num_splits > 1:
            out_accum = (num_splits, *batch, num_heads, rows, v.shape[-1])
            lse_accum = (num_splits, *batch, num_heads, rows)
        else:
            out_accum = lse_accum = (0,)
        accums = [q.new_empty(shape, dtype=torch.float32) for shape in (out_accum, lse_accum)]
        return out, softmax_lse, *accums

    return _flash_attn_forward


def make_flash_attn_with_kvcache(
    _flash_attn_forward: Any, validate: Callable[..., None]
) -> Callable[..., Any]:
    """flash_attn_with_kvcache over the custom operator; validate(...) judges the metadata."""

    def flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        qv=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        page_table=None,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        max_seqlen_q=None,
        rotary_seqlens=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        rotary_interleaved=True,
        scheduler_metadata=None,
        num_splits=0,
        pack_gqa=None,
        sm_margin=0,
        return_softmax_lse=False,
    ):
        assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
        assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
        if softmax_scale is None:
            softmax_scale = (q.shape[-1] + (qv.shape[-1] if qv is not None else 0)) ** (-0.5)
        if scheduler_metadata is not None:
            validate(
                scheduler_metadata, q, k_cache, cache_seqlens, page_table, cu_seqlens_q,
                max_seqlen_q, softmax_scale, causal, window_size, softcap, num_splits,
            )  # fmt: skip
        if isinstance(cache_seqlens, int):
            cache_seqlens = torch.full(
                (q.shape[0],), cache_seqlens, dtype=torch.int32, device=k_cache.device
            )
            cache_seqlens = maybe_contiguous(cache_seqlens)
        out, softmax_lse, *rest = _flash_attn_forward(
            q, k_cache, v_cache, k, v, qv, None, cu_seqlens_q, None, cu_seqlens_k_new, None,
            cache_seqlens, max_seqlen_q, None, page_table, cache_batch_idx, cache_leftpad,
            rotary_cos, rotary_sin, rotary_seqlens, q_descale, k_descale, v_descale, softmax_scale,
            causal=causal, window_size_left=window_size[0], window_size_right=window_size[1],
            attention_chunk=attention_chunk, softcap=softcap, rotary_interleaved=rotary_interleaved,
            scheduler_metadata=scheduler_metadata, num_splits=num_splits, pack_gqa=pack_gqa,
            sm_margin=sm_margin,
        )  # fmt: skip
        return (out, softmax_lse, *rest) if return_softmax_lse else out

    return flash_attn_with_kvcache
