"""get_scheduler_metadata on NPU: what the kernel would compute from lengths on the host, as a
tensor on the device, so that a call that has it waits for nothing and can be captured."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Attention, Plan, sides_of
from fa3_ops.backends.lowering.lengths import Lengths
from fa3_ops.backends.npu import device
from fa3_ops.backends.npu.capabilities import capabilities, splits
from fa3_ops.backends.npu.device import Kernel
from fa3_ops.backends.npu.flash_attn_npu import launch
from fa3_ops.backends.npu.scheduler_metadata import RAW_BYTES, fingerprint_of, signature_of


def reads(found: Kernel, page_size: int | None, headdim: int, dtype: torch.dtype) -> bool:
    """Whether a call of this kernel could have metadata."""
    can = capabilities(found)
    return (
        can.metadata
        and page_size in can.page_sizes
        and headdim in can.headdims
        and dtype in can.dtypes
    )


class FlashAttnNpuPlan(Backend[Plan]):
    """The kernel's bytes and what they were made for. Waits for nothing but the first mask. The
    kernel makes them on a stream of its own, which no capture on hardware is known to record."""

    name = "flash_attn_npu"

    def lower(self, request: Plan, run: Run) -> Plan:
        if run.capturing:
            raise RuntimeError(
                "fa3npu: get_scheduler_metadata uses a second stream and cannot be captured: call "
                "it before each replay and copy its result into the tensor that the captured call "
                "got"
            )
        if request.has_softcap and request.softcap == 0.0:
            raise RuntimeError("fa3npu: softcap must be given with has_softcap on NPU, got 0.0")
        return without_padding(request)

    def launch(self, request: Plan, lowered: Plan, run: Run) -> Tensor:
        most, request = request.cache_seqlens.shape[0], lowered
        found = device.kernel()
        page_size, seqlens_k = request.page_size, seqlens_of_call(request)
        if isinstance(found, Kernel) and reads(
            found, page_size, request.headdim, request.qkv_dtype
        ):
            made = made_by(found, request, seqlens_k)
        else:  # nothing on this machine reads it
            made = torch.zeros(RAW_BYTES, dtype=torch.uint8, device=seqlens_k.device)
        fingerprint = fingerprint_of(
            request.cu_seqlens_q is not None,
            request.max_seqlen_q,
            num_pages(request),
            request.num_heads_q,
            request.num_heads_kv,
            request.headdim,
            headdim_v(request),
            page_size,
            request.qkv_dtype,
            *sides_of(request.window_size, request.causal),
            request.softcap,
            softmax_scale(request),
            max(request.num_splits, 1),
        )
        signature = signature_of(fingerprint, seqlens_k, request.cu_seqlens_q, most)
        return torch.cat((made, signature.view(torch.uint8)))


def without_padding(request: Plan) -> Plan:
    """With the lengths and offsets of the batch alone."""
    offsets = {name: getattr(request, name) for name in ("cu_seqlens_q", "cu_seqlens_k_new")}
    return replace(
        request,
        cache_seqlens=request.cache_seqlens[: request.batch_size],
        **{
            n: t[: request.batch_size + 1].contiguous() for n, t in offsets.items() if t is not None
        },
    )


def headdim_v(request: Plan) -> int:
    return request.headdim if request.headdim_v is None else request.headdim_v


def softmax_scale(request: Plan) -> float:
    return request.headdim**-0.5 if request.softmax_scale is None else request.softmax_scale


def num_pages(request: Plan) -> int:
    """Of each sequence."""
    return 0 if request.page_size is None else -(-request.max_seqlen_k // request.page_size)


def capacity(request: Plan) -> int:
    """The bound that the call derives from its page table."""
    return num_pages(request) * (request.page_size or 0)


def seqlens_of_call(request: Plan) -> Tensor:
    """After the append, and as lowering.keys.bound will have them."""
    seqlens_k = request.cache_seqlens
    if request.cu_seqlens_k_new is not None:
        seqlens_k = seqlens_k + request.cu_seqlens_k_new.diff()
    elif request.max_seqlen_k_new:
        seqlens_k = seqlens_k + request.max_seqlen_k_new
    return seqlens_k.clamp(1, max(capacity(request), 1))


def made_by(found: Kernel, request: Plan, seqlens_k: Tensor) -> Tensor:
    make_mask(seqlens_k.device)
    left, right = sides_of(request.window_size, request.causal)
    causal = (left, right) == (-1, 0)
    made: Tensor = found.module.get_scheduler_metadata(
        request.batch_size,
        request.max_seqlen_q,
        capacity(request),
        request.num_heads_q,
        request.num_heads_kv,
        request.headdim,
        headdim_v(request),
        request.qkv_dtype,
        seqlens_k,
        request.cu_seqlens_q,
        None,  # cu_seqlens_k
        None,  # cu_seqlens_k_new: counted in seqlens_k
        None,  # seqused_q
        None,  # leftpad_k
        request.page_size,
        0,  # max_seqlen_k_new
        causal,
        *((-1, -1) if causal else (left, right)),
        0,  # attention_chunk
        request.softcap,
        splits(request.num_splits, request.cu_seqlens_q is not None, found),
        None,  # pack_gqa
        0,  # sm_margin
        softmax_scale(request),
    )
    if made.numel() != RAW_BYTES:
        raise RuntimeError(
            f"fa3npu: flash_attn_npu {found.version} has scheduler metadata of {made.numel()} "
            f"bytes, which this version of fa3_ops does not know"
        )
    return made


@functools.cache
def make_mask(at: torch.device) -> None:
    """The kernel makes its causal mask in the first call that needs one, and waits for it: before a
    capture, so that the captured call need not."""
    q = torch.zeros(1, 1, 1, 16, dtype=torch.float16, device=at)
    call = Attention(q, q, q, causal=True)
    launch(call, device.found_kernel(), Lengths.of(call))
