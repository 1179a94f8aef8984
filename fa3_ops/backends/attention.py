"""One attention call as plain data, whichever operator it came through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Attention:
    """What flash_attn_func, flash_attn_varlen_func and flash_attn_kvcache have in common.

    q is (batch_size, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with cu_seqlens_q.
    k and v are (batch_size_k, seqlen_k, nheads_k, ...), (total_k, nheads_k, ...) with cu_seqlens_k,
    or (num_pages, page_size, nheads_k, ...) with page_table. The meaning of every field is that of
    the operators' argument of the same name, seqused_k being also cache_seqlens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    qv: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    page_table: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    softmax_scale: float | None = None
    causal: bool = False  # from here on: causal and no window beside it
    window_size: Sequence[int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    scheduler_metadata: Tensor | None = None
    num_splits: int = 1
    is_cache: bool = False  # k and v live on; a copy of them is never free
    capturing: bool = False  # a device graph is being recorded: no host may wait for the device
    # (rows of q, keys) of every sequence, where the host has read them.
    seqlens: Sequence[tuple[int, int]] | None = None
    notes: list[str] = field(default_factory=list)  # what the lowering did, for explain()

    def __post_init__(self) -> None:
        if self.softmax_scale is None:
            width = self.headdim + (0 if self.qv is None else self.headdim_v)
            self.softmax_scale = width**-0.5
        left, right = self.window_size
        self.window_size = (max(left, -1), 0 if self.causal else max(right, -1))
        self.causal = self.window_size == (-1, 0)

    @property
    def batch_size(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else int(self.cu_seqlens_q.shape[0]) - 1

    @property
    def seqlen_q(self) -> int:
        """Rows of q of every sequence, or the most that one has."""
        return self.q.shape[1] if self.cu_seqlens_q is None else int(self.max_seqlen_q or 0)

    @property
    def is_empty(self) -> bool:
        """Nothing to attend with or to."""
        return 0 in (self.batch_size, self.seqlen_q, self.q.numel(), self.k.numel())

    @property
    def nheads(self) -> int:
        return self.q.shape[-2]

    @property
    def nheads_k(self) -> int:
        return self.k.shape[-2]

    @property
    def headdim(self) -> int:
        return self.q.shape[-1]

    @property
    def headdim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def is_local(self) -> bool:
        """A window that is not the causal mask."""
        return not self.causal and max(self.window_size) >= 0

    @property
    def is_fp8(self) -> bool:
        return self.q.dtype == torch.float8_e4m3fn

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_fp8 else self.q.dtype

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """out and softmax_lse, unwritten, as the operators return them."""
        *batch, rows, nheads, _ = self.q.shape
        out = self.q.new_empty((*batch, rows, nheads, self.headdim_v), dtype=self.out_dtype)
        return out, self.q.new_empty((*batch, nheads, rows), dtype=torch.float32)
