"""What each build of flash_attn_npu's FlashAttention-3 kernel computes right, and what each release
of CANN takes in its fused operator, as data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from fa3_ops.backends.npu import device
from fa3_ops.backends.npu.device import Kernel


@dataclass(frozen=True)
class Calling:
    """How one build wants to be called."""

    paged_only: bool = False  # takes no keys without seqused_k, and no dense cache as it is
    lists_keys: bool = False  # wants seqused_k, of which none may be 0, and rows of every sequence
    relative_cu_seqlens: bool = False  # counts rows of q from cu_seqlens_q[0]
    token_major_lse: bool = False  # (total_q, nheads) and (batch_size, seqlen_q, nheads)
    asks_for_lse: bool = False  # has an argument return_softmax_lse


@dataclass(frozen=True)
class Capabilities:
    """What one build of the kernel computes right, after the lowering."""

    name: str
    page_sizes: Collection[int]
    headdims: Collection[int]
    headdim_v_differs: bool = False
    causal_of_few_keys: bool = True  # fewer than rows of q
    window: bool = True
    window_of_few_rows: bool = True  # packed, over 1024 keys or more, which flash-decode splits
    softcap: bool = True
    max_num_splits: int = 20  # AI cores of the smallest 910B
    metadata: bool = False
    backward: bool = False
    backward_window: bool = True
    backward_deterministic_packed: bool = True
    dtypes: Collection[torch.dtype] = (torch.float16, torch.bfloat16)
    calling: Calling = Calling()


PAGES_910 = range(1, 1025)
HEADDIMS_910 = range(16, 257, 16)

ASCEND_910 = Capabilities(
    "0.4 or later on 910B/C", PAGES_910, HEADDIMS_910, metadata=True, backward=True
)
ASCEND_910_0_3 = replace(
    ASCEND_910,
    name="0.3 on 910B/C",
    causal_of_few_keys=False,
    window_of_few_rows=False,
    metadata=False,
)
ASCEND_910_BEFORE_0_3 = Capabilities(
    "before 0.3 on 910B/C",
    PAGES_910,
    HEADDIMS_910,
    causal_of_few_keys=False,
    window=False,
    softcap=False,
    max_num_splits=1,
    calling=Calling(paged_only=True, relative_cu_seqlens=True, token_major_lse=True),
)
ASCEND_950 = Capabilities(
    "on 950",
    page_sizes=(128, 256, 512, 1024),
    headdims=HEADDIMS_910,
    headdim_v_differs=True,
    max_num_splits=1,
    backward=True,
    backward_window=False,
    backward_deterministic_packed=False,
    calling=Calling(lists_keys=True, relative_cu_seqlens=True, asks_for_lse=True),
)


def capabilities(k: Kernel) -> Capabilities:
    if k.is_950:
        return ASCEND_950
    if k.version < (0, 3):
        return ASCEND_910_BEFORE_0_3
    return ASCEND_910_0_3 if k.version < (0, 4) else ASCEND_910


def splits(num_splits: int, can_split: bool, found: Kernel) -> int:
    """1 unless asked otherwise: then a row's bits do not depend on its batch."""
    return min(max(num_splits, 1), capabilities(found).max_num_splits) if can_split else 1


@dataclass(frozen=True)
class FusedLimits:
    """What a release of CANN documents for npu_fused_infer_attention_score (FIA) on Atlas A2 and
    A3: docs/*/torch_npu-npu_fused_infer_attention_score.md of op-plugin's branch for that release.
    What differs is about layout TND, in which packed q goes."""

    name: str
    dtypes: Collection[torch.dtype]
    headdims: Collection[tuple[int, int]]  # (headdim, headdim_v)
    page_sizes: range  # empty: no page table
    band: bool  # sparse_mode 4
    causal_of_few_keys: bool  # fewer than rows of q, under sparse_mode 3
    latent: bool  # qv, with any mask, in any layout
    equal_heads: Collection[int] = ()  # numbers of heads, where nheads_k has to be nheads
    # In layout TND sparse_mode 0 without a mask is reported to give a uniform average without a
    # word (vllm-ascend #13699): a band without ends stands for it, which takes this headdim_v alone
    # (CANN's prompt_flash_attention_tiling.cpp).
    band_headdim_v: int = 128
    max_packed_sequences: int = 4096

    # The same in every release, and but for the first two in every layout.
    dense_dtypes: Collection[torch.dtype] = (torch.float16, torch.bfloat16)
    dense_headdims: range = range(16, 513, 16)
    max_heads: int = 256
    max_group: int = 64
    max_token: int = 65535  # nheads_k * headdim
    max_elements: int = 2**31 - 1  # of k or v, with all pages
    max_decode_keys: int = 262144
    decode_pages: range = range(16, 513, 16)
    prefill_pages: range = range(128, 513, 128)
    # k and v of 8 bits beside one row of a wider q (antiquant), which TND does not take.
    narrow_dtypes: Collection[torch.dtype] = (torch.int8,)
    narrow_headdims: range = range(32, 513, 32)
    narrow_pages: range = range(32, 513, 32)


CANN_8_2 = FusedLimits(  # branch 7.1.0
    "CANN 8.2 or unknown",
    dtypes=(torch.bfloat16,),
    headdims={(192, 128), (192, 192)},
    page_sizes=range(0),
    band=False,
    causal_of_few_keys=False,
    latent=False,
    equal_heads=(2, 4, 8, 16, 32, 64, 128),
)
CANN_8_3 = FusedLimits(  # branch 7.2.0
    "CANN 8.3",
    dtypes=(torch.bfloat16,),
    headdims={(128, 128), (192, 128), (192, 192)},
    page_sizes=range(0),
    band=True,
    causal_of_few_keys=False,
    latent=False,
)
CANN_8_5 = replace(  # branches 7.3.0 (CANN 8.5), 26.0.0 (9.0) and 26.1.0 (9.1)
    CANN_8_3,
    name="CANN 8.5 or later",
    dtypes=(torch.float16, torch.bfloat16),
    page_sizes=range(16, 1025, 16),
    causal_of_few_keys=True,
    latent=True,
)


def fused_limits() -> FusedLimits:
    """Those of the CANN of this machine, the strictest where it does not say."""
    release = device.cann_release()
    if release is None or release < (8, 3):
        return CANN_8_2
    return CANN_8_3 if release < (8, 5) else CANN_8_5
