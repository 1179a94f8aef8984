"""FlexAttention, compiled for the shapes of each row."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from workloads import Workload

from .base import Call, Inputs, Peer, Unsupported, dense_caches, training


class Flex(Peer):
    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.module: Any = importlib.import_module("torch.nn.attention.flex_attention")

    def forms(self, row: Workload) -> tuple[str, ...]:
        if row.page_size or row.qv or row.kind == "varlen":
            raise Unsupported("FlexAttention: timed on dense decode and causal prefill alone")
        return ("compiled",)

    def compiled(self) -> Any:
        torch._dynamo.reset()  # or it gives up compiling after a few shapes
        return torch.compile(self.module.flex_attention, dynamic=False)

    def decode(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        flex, q = self.compiled(), x.q.transpose(1, 2)

        def call(k: Tensor, v: Tensor) -> Tensor:
            if row.window:
                k, v = k[:, -row.window :], v[:, -row.window :]
            out: Tensor = flex(q, k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)
            return out.transpose(1, 2)

        return [lambda k=k, v=v: call(k, v) for k, v in dense_caches(row, x)]  # type: ignore[misc]

    def attention(self, row: Workload) -> Any:
        flex, first, window = self.compiled(), row.seqlen_k - row.seqlen_q, row.window

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            below = j <= i + first
            return below & (j > i + first - window) if window else below

        mask = self.module.create_block_mask(
            sees, None, None, row.seqlen_q, row.seqlen_k, device="cpu"
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=row.nheads != row.nheads_k)
            return out.transpose(1, 2)

        return attend

    def prefill(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        attend = self.attention(row)
        return [lambda: attend(x.q, x.k, x.v)]

    def train(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        return [training(x, self.attention(row))]
