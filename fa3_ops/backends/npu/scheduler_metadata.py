"""get_scheduler_metadata on NPU: what the kernel would compute from lengths on the host, as a
tensor on the device, so that a call that has it waits for nothing and can be captured."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fa3_ops.backends.attention import Attention
from fa3_ops.backends.npu import device
from fa3_ops.backends.npu.capabilities import capabilities, splits
from fa3_ops.backends.npu.device import Kernel
from fa3_ops.backends.npu.flash_attn_npu import FlashAttnNpu
from fa3_ops.backends.npu.lengths import Lengths
from fa3_ops.backends.npu.metadata import RAW_BYTES, fingerprint_of, signature_of


@functools.cache
def make_mask(at: torch.device) -> None:
    """The kernel makes its causal mask in the first call that needs one, and waits for it: before a
    capture, so that the captured call need not."""
    q = torch.zeros(1, 1, 1, 16, dtype=torch.float16, device=at)
    backend = FlashAttnNpu()
    call = Attention(q, q, q, causal=True)
    backend.forward(call, Lengths.of(call))


def reads(found: Kernel, page_size: int | None, headdim: int, dtype: torch.dtype) -> bool:
    """Whether a call of this kernel could have metadata."""
    can = capabilities(found)
    return (
        can.metadata
        and page_size in can.page_sizes
        and headdim in can.headdims
        and dtype in can.dtypes
    )


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    """The kernel's bytes and what they were made for. Waits for nothing but the first mask. The
    kernel makes them on a stream of its own, which no capture on hardware is known to record."""
    if device.capturing(cache_seqlens.device):
        raise RuntimeError(
            "fa3npu: get_scheduler_metadata uses a second stream and cannot be captured: call it "
            "before each replay and copy its result into the tensor that the captured call got"
        )
    if has_softcap and softcap == 0.0:
        raise RuntimeError("fa3npu: softcap must be given with has_softcap on NPU, got 0.0")
    headdim_v = headdim if headdim_v is None else headdim_v
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    pages = 0 if page_size is None else -(-max_seqlen_k // page_size)
    capacity = pages * (page_size or 0)
    seqlens_k = cache_seqlens
    if cu_seqlens_k_new is not None:
        seqlens_k = seqlens_k + cu_seqlens_k_new.diff()
    elif max_seqlen_k_new:
        seqlens_k = seqlens_k + max_seqlen_k_new
    # As the call will have them: see lengths.bound.
    seqlens_k = seqlens_k.clamp(1, max(capacity, 1))
    left, right = window_size
    left, right = max(left, -1), 0 if causal else max(right, -1)
    causal = (left, right) == (-1, 0)
    fingerprint = fingerprint_of(
        batch_size,
        max_seqlen_q,
        pages,
        num_heads_q,
        num_heads_kv,
        headdim,
        headdim_v,
        page_size,
        qkv_dtype,
        left,
        right,
        softcap,
        scale,
        max(num_splits, 1),
    )
    found = device.kernel()
    if isinstance(found, Kernel) and reads(found, page_size, headdim, qkv_dtype):
        make_mask(cache_seqlens.device)
        made: Tensor = found.module.get_scheduler_metadata(
            batch_size,
            max_seqlen_q,
            capacity,  # the bound that the call derives from its page table
            num_heads_q,
            num_heads_kv,
            headdim,
            headdim_v,
            qkv_dtype,
            seqlens_k,
            None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
            None,  # cu_seqlens_k
            None,  # cu_seqlens_k_new: counted in seqlens_k
            None,  # seqused_q
            None,  # leftpad_k
            page_size,
            0,  # max_seqlen_k_new
            causal,
            *((-1, -1) if causal else (left, right)),
            0,  # attention_chunk
            softcap,
            splits(num_splits, cu_seqlens_q is not None, found),
            None,  # pack_gqa
            0,  # sm_margin
            scale,
        )
        if made.numel() != RAW_BYTES:
            raise RuntimeError(
                f"fa3npu: flash_attn_npu {found.version} has scheduler metadata of {made.numel()} "
                f"bytes, which this version of fa3_ops does not know"
            )
    else:  # nothing on this machine reads it
        made = torch.zeros(RAW_BYTES, dtype=torch.uint8, device=cache_seqlens.device)
    signature = signature_of(fingerprint, seqlens_k, cu_seqlens_q)
    return torch.cat((made, signature.view(torch.uint8)))
