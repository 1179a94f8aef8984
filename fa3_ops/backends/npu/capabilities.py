"""What each build of flash_attn_npu's FlashAttention-3 kernel computes right, as data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from fa3_ops.backends.npu.device import Kernel


@dataclass(frozen=True)
class Capabilities:
    """What one build of the kernel computes right, after the lowering."""

    name: str
    page_sizes: Collection[int]
    headdims: Collection[int]
    headdim_v_differs: bool = False
    causal_of_few_keys: bool = True  # fewer than rows of q
    window: bool = True
    softcap: bool = True
    paged_only: bool = False  # takes no keys without seqused_k, and no dense cache as it is
    lists_keys: bool = False  # wants seqused_k, of which none may be 0, and rows of every sequence
    max_num_splits: int = 20  # AI cores of the smallest 910B
    metadata: bool = False
    backward: bool = False
    backward_window: bool = True
    backward_deterministic_packed: bool = True
    dtypes: Collection[torch.dtype] = (torch.float16, torch.bfloat16)


PAGES_910 = range(1, 1025)
HEADDIMS_910 = range(16, 257, 16)

ASCEND_910 = Capabilities(
    "0.4 or later on 910B/C", PAGES_910, HEADDIMS_910, metadata=True, backward=True
)
ASCEND_910_0_3 = replace(ASCEND_910, name="0.3 on 910B/C", metadata=False)
ASCEND_910_BEFORE_0_3 = Capabilities(
    "before 0.3 on 910B/C",
    PAGES_910,
    HEADDIMS_910,
    causal_of_few_keys=False,
    window=False,
    softcap=False,
    paged_only=True,
    max_num_splits=1,
)
ASCEND_950 = Capabilities(
    "on 950",
    page_sizes=(128, 256, 512, 1024),
    headdims=HEADDIMS_910,
    headdim_v_differs=True,
    lists_keys=True,
    max_num_splits=1,
    backward=True,
    backward_window=False,
    backward_deterministic_packed=False,
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
