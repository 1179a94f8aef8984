"""OpenVINO's PagedAttention: float32 in and out, the cache in the row's dtype and in pages of
32 keys, whatever page size the row has. It appends the new keys to the cache itself."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from workloads import Workload

from .base import Call, Inputs, Peer, Unsupported, page_tables, part


class Request:
    """An OpenVINO inference request that keeps the tensors it reads alive."""

    def __init__(self, ov: Any, request: Any) -> None:
        self.ov, self.request = ov, request
        self.tensors: dict[str, Any] = {}

    def set(self, name: str, tensor: Any) -> None:
        """An ov.Tensor, or an array to copy into one."""
        if not isinstance(tensor, self.ov.Tensor):
            tensor = self.ov.Tensor(tensor)
        self.tensors[name] = tensor
        self.request.set_tensor(name, tensor)

    def infer(self) -> Tensor:
        self.request.infer()
        self.tensors["out"] = self.request.get_output_tensor(0)
        return torch.from_numpy(self.tensors["out"].data)


class OpenVino(Peer):
    PAGE = 32

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.ov: Any = importlib.import_module("openvino")
        self.opset: Any = importlib.import_module("openvino.opset13")
        self.np: Any = importlib.import_module("numpy")
        self.core = self.ov.Core()
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def forms(self, row: Workload) -> tuple[str, ...]:
        if row.kind == "train":
            raise Unsupported("OpenVINO: has no backward")
        if row.headdim != row.headdim_v:
            raise Unsupported("OpenVINO: not tried with headdim_v != headdim")
        # Arithmetic in float16 is offered and, in some versions, wrong: then float32 is timed.
        return {
            "bfloat16": ("arithmetic in bf16",),
            "float16": ("arithmetic in f16", "arithmetic in f32"),
            "float32": ("arithmetic in f32",),
        }[row.dtype]

    def model(self, row: Workload) -> Any:
        """q, k, v (total, nheads * headdim) through one PagedAttention."""
        ov, np = self.ov, self.np
        parameters = []

        def parameter(name: str, shape: list[int], dtype: Any) -> Any:
            node = self.opset.parameter(ov.PartialShape(shape), dtype)
            node.set_friendly_name(name)
            node.output(0).set_names({name})
            parameters.append(node)
            return node

        def constant(value: Any, dtype: str) -> Any:
            return self.opset.constant(np.array(value, dtype=dtype))

        f32, i32, dynamic = ov.Type.f32, ov.Type.i32, ov.Type.dynamic
        cache = [-1, row.nheads_k, -1, row.headdim]
        none_i, none_f, zero = constant([], "int32"), constant([], "float32"), constant(0, "int32")
        inputs = [
            parameter("q", [-1, row.nheads * row.headdim], f32),
            parameter("k", [-1, row.nheads_k * row.headdim], f32),
            parameter("v", [-1, row.nheads_k * row.headdim], f32),
            parameter("key_cache.0", cache, dynamic),
            parameter("value_cache.0", cache, dynamic),
            parameter("past_lens", [-1], i32),
            parameter("subsequence_begins", [-1], i32),
            parameter("block_indices", [-1], i32),
            parameter("block_indices_begins", [-1], i32),
            constant(row.softmax_scale, "float32"),
            constant(row.window, "int32"),  # sliding_window
            none_f,  # alibi_slopes
            parameter("max_context_len", [], i32),
            none_i,  # score_aggregation_window
            *(none_i, none_i, none_f),  # rotated_block_indices, rotation_deltas, its table
            *(none_f, zero, zero),  # xattention: threshold, block size, stride
            none_f,  # sinks
            *(zero, none_i, none_i, none_i),  # adaptive_rkv
            *(none_i, constant([], "uint8"), none_i),  # token_type_ids, qq_bias and its begins
        ]
        node = ov.op._PagedAttentionExtension([x.output(0) for x in inputs])
        for name, value in (("num_k_heads", row.nheads_k), ("num_v_heads", row.nheads_k)):
            node.get_rt_info()[name] = value
        for name in ("k_head_size", "v_head_size"):
            node.get_rt_info()[name] = row.headdim
        return ov.Model([self.opset.result(node.output(0))], parameters, "attention")

    def request(self, row: Workload, form: str) -> Request:
        """A model is compiled once for each of its constants."""
        key = (form, row.dtype, row.nheads, row.nheads_k, row.headdim, row.window)
        if key not in self.compiled:
            names = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
            dtype = getattr(self.ov.Type, names[row.dtype])
            options = {
                "INFERENCE_NUM_THREADS": self.threads,
                "NUM_STREAMS": 1,
                "INFERENCE_PRECISION_HINT": getattr(self.ov.Type, form.split()[-1]),
                "KV_CACHE_PRECISION": dtype,
                "ENABLE_CPU_PINNING": False,
            }
            compiled = self.core.compile_model(self.model(row), "CPU", options)
            cache = compiled.input("key_cache.0")
            size = cache.partial_shape[2]
            if cache.element_type != dtype or size.get_length() != self.PAGE:
                raise Unsupported(f"OpenVINO: its cache is {cache.element_type}, pages of {size}")
            self.compiled[key] = compiled
        return Request(self.ov, self.compiled[key].create_infer_request())

    def cache(self, row: Workload, memory: Tensor, pages: int, start: int = 0) -> Any:
        """Shared with the memory, (pages, nheads_k, 32, headdim)."""
        shape = (pages, row.nheads_k, self.PAGE, row.headdim)
        t = part(row, memory, start, *shape)
        if row.dtype == "bfloat16":
            words = t.view(torch.int16).numpy().view("uint16")
            return self.ov.Tensor(words, self.ov.Shape(shape), self.ov.Type.bf16)
        return self.ov.Tensor(t.numpy(), shared_memory=True)

    def feed(
        self, request: Request, q: Tensor, k: Tensor, v: Tensor, past: list[int], table: Tensor
    ) -> None:
        """The new rows of each sequence, q, k and v (batch_size, new, heads, headdim)."""
        np = self.np
        new = q.shape[1]
        values = {
            "q": q.flatten(0, 1).flatten(1).float().numpy(),
            "k": k.flatten(0, 1).flatten(1).float().numpy(),
            "v": v.flatten(0, 1).flatten(1).float().numpy(),
            "past_lens": np.array(past, "int32"),
            "subsequence_begins": np.arange(len(q) + 1, dtype="int32") * new,
            "block_indices": table.flatten().numpy(),
            "block_indices_begins": np.arange(len(q) + 1, dtype="int32") * table.shape[1],
            "max_context_len": np.array(past[0] + new, "int32"),
        }
        for name, value in values.items():
            request.set(name, value)

    def decode(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        assert x.memory is not None
        request = self.request(row, form)
        tables = page_tables(row, x.memory, self.PAGE)
        pages = len(tables) * tables[0].numel()
        half = pages * self.PAGE * row.key_bytes // 2
        request.set("key_cache.0", self.cache(row, x.memory, pages))
        request.set("value_cache.0", self.cache(row, x.memory, pages, half))
        k, v = (
            torch.randn(row.batch_size, row.seqlen_k, row.nheads_k, row.headdim) if t is None else t
            for t in (x.k, x.v)
        )
        last = row.seqlen_k - 1
        if x.k is not None:  # it writes its own cache
            q = torch.zeros(row.batch_size, last, row.nheads, row.headdim)
            self.feed(request, q, k[:, :last], v[:, :last], [0] * row.batch_size, tables[0])
            request.infer()
        past = [last] * row.batch_size
        self.feed(request, x.q, k[:, last:], v[:, last:], past, tables[0])
        indices = [self.ov.Tensor(table.flatten().numpy()) for table in tables]

        def call(table: Any) -> Tensor:
            request.set("block_indices", table)
            return request.infer().view(row.batch_size, 1, row.nheads, row.headdim)

        return [lambda table=table: call(table) for table in indices]  # type: ignore[misc]

    def packed(self, row: Workload, form: str, x: Inputs, lengths_k: list[int]) -> Call:
        """Sequences whose queries are their last rows. The keys before them are in the cache."""
        np = self.np
        request = self.request(row, form)
        pages = [-(-length // self.PAGE) for length in lengths_k]
        memory = torch.zeros(sum(pages) * self.PAGE * row.key_bytes, dtype=torch.uint8)
        request.set("key_cache.0", self.cache(row, memory, sum(pages)))
        half = memory.numel() // 2
        request.set("value_cache.0", self.cache(row, memory, sum(pages), half))
        table = torch.arange(sum(pages), dtype=torch.int32)[None]
        past = 0 if row.lengths else row.seqlen_k - row.seqlen_q
        q, k, v = (t if t.dim() == 4 else t[None] for t in (x.q, *x.kv))
        if past:
            zeros = torch.zeros(1, past, row.nheads, row.headdim)
            self.feed(request, zeros, k[:, :past], v[:, :past], [0], table)
            request.infer()
        self.feed(request, q, k[:, past:], v[:, past:], [past], table)
        if row.lengths:
            begins = {
                "past_lens": [0] * len(row.lengths),
                "subsequence_begins": [0, *np.cumsum(lengths_k)],
                "block_indices_begins": [0, *np.cumsum(pages)],
            }
            for name, value in begins.items():
                request.set(name, np.array(value, "int32"))
            request.set("max_context_len", np.array(max(lengths_k), "int32"))
        return lambda: request.infer().view(x.q.shape)

    def prefill(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        return [self.packed(row, form, x, [row.seqlen_k])]

    def varlen(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        return [self.packed(row, form, x, list(row.lengths))]
