"""Our operators, through their Python interface."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from workloads import Workload

from .base import Call, Inputs, Peer, cu_seqlens, dense_caches, paged_cache, training, window_size


class Ours(Peer):
    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.api: Any = importlib.import_module("fa3_ops")
        self.capability: str = torch.ops.fa3npu.cpu_capability()

    def decode(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        seqlens: int | Tensor = row.seqlen_k
        if not row.int_seqlens:
            seqlens = torch.full((row.batch_size,), row.seqlen_k, dtype=torch.int32)

        def call(k_cache: Tensor, v_cache: Tensor, page_table: Tensor | None) -> Call:
            return lambda: self.api.flash_attn_with_kvcache(
                x.q,
                k_cache,
                v_cache,
                qv=x.qv,
                cache_seqlens=seqlens,
                page_table=page_table,
                causal=True,
                window_size=window_size(row),
            )

        if row.page_size:
            k_cache, v_cache, tables = paged_cache(row, x)
            return [call(k_cache, v_cache, table) for table in tables]
        return [call(k_cache, v_cache, None) for k_cache, v_cache in dense_caches(row, x)]

    def prefill(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        window = window_size(row)
        return [lambda: self.api.flash_attn_func(x.q, x.k, x.v, causal=True, window_size=window)]

    def varlen(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        cu, most = cu_seqlens(row), max(row.lengths)
        return [
            lambda: self.api.flash_attn_varlen_func(x.q, x.k, x.v, cu, cu, most, most, causal=True)
        ]

    def train(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        return [training(x, lambda q, k, v: self.api.flash_attn_func(q, k, v, causal=True))]
