"""torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import Workload

from .base import Call, Inputs, Peer, dense_caches, latent_caches, paged_cache, training


class Sdpa(Peer):
    def forms(self, row: Workload) -> tuple[str, ...]:
        if row.kind == "decode":
            # Folded: the query heads that share a KV head are rows of one head.
            if row.page_size:
                return ("gathered pages, folded",)
            return ("folded",) if row.qv else ("folded", "enable_gqa")
        if row.headdim != row.headdim_v:
            return ("enable_gqa", "padded v")
        if row.nheads == row.nheads_k:
            return ("plain",)
        return ("enable_gqa", "repeated k, v")

    def decode(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        q, scale = x.q, row.softmax_scale
        folded = "folded" in form

        def attend(k: Tensor, v: Tensor) -> Tensor:
            if row.window:
                k, v = k[:, -row.window :], v[:, -row.window :]
            rows = q.view(len(q), row.nheads_k, -1, q.shape[-1]) if folded else q.transpose(1, 2)
            out = F.scaled_dot_product_attention(
                rows,
                k.transpose(1, 2),
                v.transpose(1, 2),
                scale=scale,
                enable_gqa=not folded,
            )
            return out.reshape(row.batch_size, 1, row.nheads, -1)

        if row.qv:
            assert x.qv is not None
            q = torch.cat([x.qv, x.q], -1)
            return [
                lambda c=c: attend(c, c[..., : row.headdim_v])  # type: ignore[misc]
                for c in latent_caches(row, x)
            ]
        if not row.page_size:
            return [lambda k=k, v=v: attend(k, v) for k, v in dense_caches(row, x)]  # type: ignore[misc]
        k_cache, v_cache, tables = paged_cache(row, x)

        def gather(table: Tensor) -> Tensor:
            k, v = (
                cache.index_select(0, table.view(-1)).view(
                    row.batch_size, row.seqlen_k, row.nheads_k, -1
                )
                for cache in (k_cache, v_cache)
            )
            return attend(k, v)

        return [lambda table=table: gather(table) for table in tables]  # type: ignore[misc]

    def attention(self, row: Workload, form: str, mask: Tensor | None = None) -> Any:
        """(q, k, v) as (batch_size, seqlen, nheads, headdim) to the output likewise."""
        group = row.nheads // row.nheads_k

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            if form == "repeated k, v":
                k, v = (t.repeat_interleave(group, 1) for t in (k, v))
            if form == "padded v":
                v = F.pad(v, (0, row.headdim - row.headdim_v))
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            return out[..., : row.headdim_v].transpose(1, 2)

        return attend

    def prefill(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        mask = None
        if row.seqlen_q < row.seqlen_k or row.window:  # is_causal is aligned top left
            mask = seen(row)
        attend = self.attention(row, form, mask)
        return [lambda: attend(x.q, x.k, x.v)]

    def varlen(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        attend = self.attention(row, form)
        lengths = list(row.lengths)

        def call() -> Tensor:
            parts = zip(*(t.split(lengths) for t in (x.q, *x.kv)), strict=True)
            return torch.cat([attend(*(t[None] for t in part))[0] for part in parts])

        return [call]

    def train(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        return [training(x, self.attention(row, form))]


def seen(row: Workload) -> Tensor:
    """(seqlen_q, seqlen_k), true where a row sees a key; aligned bottom right."""
    i = torch.arange(row.seqlen_q)[:, None] + row.seqlen_k - row.seqlen_q
    j = torch.arange(row.seqlen_k)[None]
    return (j <= i) & (j > i - (row.window or row.seqlen_k))
