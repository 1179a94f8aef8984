"""What FlashAttention-3's and FlashAttention-4's kernels for Hopper compute right, as data, and the
reasons that follow from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from fa3_ops.backends.call import Attention, Gradient
from fa3_ops.backends.lowering.alignment import BYTES, is_aligned

HeadDims = Collection[tuple[range, range]]  # of q and k, and of v

LATENT = (range(8, 65, 8), range(8, 513, 8))
DEEPSEEK = (range(136, 193, 8), range(104, 129, 8))


@dataclass(frozen=True)
class Capabilities:
    """Of one build. A field that has the name of an argument says whether it is taken."""

    name: str
    dtypes: Collection[torch.dtype]
    # Head dimensions are whole 16 bytes: multiples of 8, of FP8 16.
    headdims: range = range(8, 257, 8)  # where headdim_v is the same
    unequal_headdims: HeadDims = (LATENT, DEEPSEEK)
    unequal_headdims_fp8: HeadDims = (DEEPSEEK,)
    qv_headdims: HeadDims = ((range(8, 65, 8), range(256, 513, 8)),)
    paged_step: int = 1  # what divides head dimensions beside a page table
    window_size: bool = True
    attention_chunk: bool = True
    softcap: bool = True
    page_table: bool = True
    lengths: bool = True  # cu_seqlens, seqused, cache_seqlens, cache_leftpad
    cache_leftpad: bool = True
    cache_batch_idx: bool = True  # of a dense cache: of a paged one, rows of the table are selected
    sinks: bool = False  # in the kernel; elsewhere they rescale its results
    max_num_splits: int = 256
    backward: bool = True
    grouped_unequal_backward: bool = True  # GQA whose headdim_v is not headdim
    max_deterministic_headdim: int = 192
    dsoftmax_lse: bool = False


FLASH_ATTN_3 = Capabilities(
    "flash_attn_3", dtypes=(torch.float16, torch.bfloat16, torch.float8_e4m3fn)
)
# What its build on PyPI, release 0.0.3, leaves out: the flags of its CONFIG.
FA3_FWD = replace(
    FLASH_ATTN_3,
    name="fa3_fwd",
    dtypes=(torch.bfloat16, torch.float8_e4m3fn),
    window_size=False,
    attention_chunk=False,
    page_table=False,
    backward=False,
)
FLASH_ATTN_4 = Capabilities(
    "flash_attn_4",
    dtypes=(torch.float16, torch.bfloat16),
    unequal_headdims=((range(192, 193), range(128, 129)),),
    unequal_headdims_fp8=(),
    qv_headdims=(),
    paged_step=16,
    attention_chunk=False,
    cache_leftpad=False,
    cache_batch_idx=False,
    sinks=True,
    max_num_splits=1,
    grouped_unequal_backward=False,
    max_deterministic_headdim=256,
    dsoftmax_lse=True,
)


def of_build(name: str, flags: Mapping[str, bool]) -> Capabilities:
    """FlashAttention-3 as it was built; `flags` are the build_flags of its CONFIG."""
    left_out = {flag.partition("_DISABLE_")[2] for flag, given in flags.items() if given}
    narrowed = {torch.float16: "FP16", torch.float8_e4m3fn: "FP8"}
    widest = next((d for d in (256, 192, 128, 96, 64) if f"HDIM{d}" not in left_out), 0)
    has_latent = left_out.isdisjoint({"HDIM64", "HDIMDIFF64"})
    has_deepseek = left_out.isdisjoint({"HDIM192", "HDIMDIFF192"})
    deepseek = (DEEPSEEK,) if has_deepseek else ()
    return replace(
        FLASH_ATTN_3,
        name=name,
        dtypes=tuple(t for t in FLASH_ATTN_3.dtypes if narrowed.get(t) not in left_out),
        headdims=range(8, widest + 1, 8),
        unequal_headdims=(LATENT, *deepseek) if has_latent else deepseek,
        unequal_headdims_fp8=deepseek,
        qv_headdims=FLASH_ATTN_3.qv_headdims if has_latent else (),
        window_size="LOCAL" not in left_out,
        attention_chunk="LOCAL" not in left_out,
        softcap="SOFTCAP" not in left_out,
        page_table="PAGEDKV" not in left_out,
        lengths="VARLEN" not in left_out,
        max_num_splits=1 if "SPLIT" in left_out else FLASH_ATTN_3.max_num_splits,
        backward="BACKWARD" not in left_out,
    )


def not_supported(call: Attention, can: Capabilities) -> list[str]:
    """Why this build does not compute the call."""
    reasons = width_reasons(call, can)
    chunked = call.attention_chunk > 0
    of_dense_cache = call.cache_batch_idx is not None and call.page_table is None
    packed_k_alone = call.cu_seqlens_k is not None and call.cu_seqlens_q is None
    misaligned = call.is_cache and not (is_aligned(call.k) and is_aligned(call.v))
    assert call.softmax_scale is not None
    for name, given in (
        ("alibi_slopes", call.alibi_slopes is not None),
        ("window_size", call.is_local and not can.window_size),
        ("attention_chunk", chunked and not can.attention_chunk),
        # Rows before the first key have a chunk of their own, which the kernel does not know.
        ("attention_chunk without a causal mask", chunked and call.window_size[1] != 0),
        ("attention_chunk with cache_start", chunked and call.cache_start is not None),
        ("softcap", call.softcap > 0 and not can.softcap),
        # The greatest score is looked for before scores are scaled.
        ("softmax_scale that is not positive", call.softmax_scale <= 0),
        ("page_table", call.page_table is not None and not can.page_table),
        ("lengths", has_lengths(call) and not can.lengths),
        ("cache_leftpad", call.cache_leftpad is not None and not can.cache_leftpad),
        ("cache_batch_idx of a dense cache", of_dense_cache and not can.cache_batch_idx),
        ("cu_seqlens_k without cu_seqlens_q", packed_k_alone),
        (f"a cache that is not aligned to {BYTES} bytes", misaligned),
    ):
        if given:
            reasons.append(name)
    return reasons


def has_lengths(call: Attention) -> bool:
    """Whether tensors say how many rows or keys there are."""
    lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k)
    return any(t is not None for t in (*lengths, call.cache_leftpad))


def width_reasons(call: Attention, can: Capabilities) -> list[str]:
    """Against dtypes and head dimensions."""
    reasons = [] if call.q.dtype in can.dtypes else [f"dtype {call.q.dtype}"]
    if call.k.dtype != call.q.dtype:
        reasons.append(f"k and v of {call.k.dtype} beside q of {call.q.dtype}")
    d, d_v = call.headdim, call.headdim_v
    unequal = can.unequal_headdims_fp8 if call.is_fp8 else can.unequal_headdims
    step = BYTES // call.q.element_size()
    if call.page_table is not None:
        step = max(step, can.paged_step)
    if d == d_v and (d not in can.headdims or d % step):
        reasons.append(f"headdim {d}")
    elif d != d_v and (not within(d, d_v, unequal) or d % step or d_v % step):
        reasons.append(f"headdim_v {d_v} beside headdim {d}")
    if call.qv is not None and (call.is_fp8 or not within(d, d_v, can.qv_headdims)):
        reasons.append("qv")
    return reasons


def within(headdim: int, headdim_v: int, pairs: HeadDims) -> bool:
    return any(headdim in of_k and headdim_v in of_v for of_k, of_v in pairs)


def no_gradient(request: Gradient, can: Capabilities) -> list[str]:
    """Why this build does not compute the gradients."""
    if not can.backward:
        return [f"no backward in {can.name}"]
    call = request.call
    d, d_v = call.headdim, call.headdim_v
    widest = max(d, d_v)
    grouped = d != d_v and call.nheads != call.nheads_k
    one_sided = (call.cu_seqlens_q is None) != (call.cu_seqlens_k is None)
    reasons = not_supported(call, can)
    for name, given in (
        (f"headdim_v {d_v} in the backward", widest > max(can.headdims)),
        (f"GQA with headdim_v {d_v}", grouped and not can.grouped_unequal_backward),
        (
            f"deterministic with headdim {widest}",
            request.deterministic and widest > can.max_deterministic_headdim,
        ),
        ("attention_chunk in the backward", call.attention_chunk > 0),
        ("cu_seqlens of one side", one_sided),
        ("a gradient of softmax_lse", request.dsoftmax_lse is not None and not can.dsoftmax_lse),
    ):
        if given:
            reasons.append(name)
    return reasons
