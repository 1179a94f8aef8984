"""llama.cpp's attention: `ggml_flash_attn_ext` of ggml, which the package ggml-python compiles for
the machine. float32 in and out; the caches lie as ours do."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from workloads import Workload

from .base import Call, Inputs, Peer, Unsupported, dense_caches, latent_caches

SMALL = 1 << 20  # bytes for one graph and what describes its tensors; their data are torch's


class LlamaCpp(Peer):
    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.ggml: Any = importlib.import_module("ggml")
        self.types = {
            torch.float32: self.ggml.GGML_TYPE_F32,
            torch.float16: self.ggml.GGML_TYPE_F16,
            torch.bfloat16: self.ggml.GGML_TYPE_BF16,
        }

    def forms(self, row: Workload) -> tuple[str, ...]:
        if row.kind in ("varlen", "train"):
            raise Unsupported(f"llama.cpp: has no {row.kind}")
        if row.page_size:
            raise Unsupported("llama.cpp: has no paged cache")
        # A model in bfloat16 has a cache in float16, unless it is told otherwise.
        return ("cache in bf16", "cache in f16") if row.dtype == "bfloat16" else ("",)

    def tensor(self, context: Any, t: Tensor) -> Any:
        """Over the memory of t, (batch_size, rows, heads, headdim), with its strides."""
        sizes = (t.shape[3], t.shape[1], t.shape[2], t.shape[0])
        tensor = self.ggml.ggml_new_tensor_4d(context, self.types[t.dtype], *sizes)
        strides = (t.stride(3), t.stride(1), t.stride(2), t.stride(0))
        tensor.contents.nb[:] = [stride * t.element_size() for stride in strides]
        tensor.contents.data = t.data_ptr()
        return tensor

    def attention(
        self, row: Workload, q: Tensor, caches: list[tuple[Tensor, Tensor]], mask: Tensor | None
    ) -> list[Call]:
        """One graph, given the addresses of one cache after another."""
        ggml = self.ggml
        context = ggml.ggml_init(ggml.ggml_init_params(SMALL, None, True))
        q = q.float()
        out = torch.empty(*q.shape[:3], row.headdim_v)
        operands = [self.tensor(context, t) for t in (q, *caches[0])]
        masked = None if mask is None else self.tensor(context, mask[None, :, None])
        result = ggml.ggml_flash_attn_ext(context, *operands, masked, row.softmax_scale, 0.0, 0.0)
        result.contents.data = out.data_ptr()
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, result)
        plan = ggml.ggml_graph_plan(graph, self.threads, None)
        work = (ctypes.c_uint8 * plan.work_size)()
        plan.work_data = ctypes.cast(work, ctypes.POINTER(ctypes.c_uint8))
        k, v = (operand.contents for operand in operands[1:])
        pointer = ctypes.byref(plan)

        def call(k_cache: int, v_cache: int) -> Tensor:
            _ = work, q, caches, mask  # the graph has their addresses alone
            k.data, v.data = k_cache, v_cache
            if ggml.ggml_graph_compute(graph, pointer):
                raise RuntimeError("ggml_graph_compute failed")
            return out

        addresses = [tuple(t.data_ptr() for t in pair) for pair in caches]
        return [lambda pair=pair: call(*pair) for pair in addresses]  # type: ignore[misc]

    def decode(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        cached = replace(row, dtype="float16") if form == "cache in f16" else row
        q = x.q
        if row.qv:
            assert x.qv is not None
            q = torch.cat([x.qv, q], -1)
            caches = [(t, t[..., : row.headdim_v]) for t in latent_caches(cached, x)]
        else:
            caches = dense_caches(cached, x)
        if row.window:
            caches = [(k[:, -row.window :], v[:, -row.window :]) for k, v in caches]
        return self.attention(row, q, caches, None)

    def prefill(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        dtype = torch.float16 if form == "cache in f16" else x.q.dtype
        k, v = (t.to(dtype) for t in x.kv)
        last = torch.arange(row.seqlen_k - row.seqlen_q, row.seqlen_k)[:, None]
        keys = torch.arange(row.seqlen_k)
        hidden = keys > last
        if row.window:
            hidden |= keys <= last - row.window
        mask = torch.zeros(hidden.shape, dtype=torch.float16).masked_fill_(hidden, float("-inf"))
        return self.attention(row, x.q, [(k, v)], mask)
