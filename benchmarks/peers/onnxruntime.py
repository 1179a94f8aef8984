"""ONNX Runtime's GroupQueryAttention over a dense cache, (batch_size, nheads_k, seqlen_k,
headdim), which it appends the new keys to."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from workloads import Workload

from .base import Call, Inputs, Peer, Unsupported, dense_caches


class OnnxRuntime(Peer):
    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.ort: Any = importlib.import_module("onnxruntime")
        self.onnx: Any = importlib.import_module("onnx")
        self.np: Any = importlib.import_module("numpy")
        self.sessions: dict[tuple[Any, ...], Any] = {}

    def forms(self, row: Workload) -> tuple[str, ...]:
        if row.dtype == "bfloat16":
            raise Unsupported("ONNX Runtime: its CPU kernel takes float32 and float16")
        if row.kind in ("varlen", "train"):
            raise Unsupported(f"ONNX Runtime: has no {row.kind}")
        if row.page_size:
            raise Unsupported("ONNX Runtime: has no paged cache on CPU")
        if row.headdim != row.headdim_v:
            raise Unsupported("ONNX Runtime: needs headdim_v == headdim")
        return ("GroupQueryAttention",)

    def session(self, row: Workload) -> Any:
        key = (row.dtype, row.nheads, row.nheads_k, row.headdim, row.window)
        if key in self.sessions:
            return self.sessions[key]
        make, types = self.onnx.helper, self.onnx.TensorProto
        dtype = {"float32": types.FLOAT, "float16": types.FLOAT16}[row.dtype]
        new = ["batch_size", "new", row.nheads_k * row.headdim]
        cache = ["batch_size", row.nheads_k, "seqlen_k", row.headdim]
        rows = ["batch_size", "new", row.nheads * row.headdim]
        inputs = {
            "q": (dtype, rows),
            "k": (dtype, new),
            "v": (dtype, new),
            "k_cache": (dtype, cache),
            "v_cache": (dtype, cache),
            "last": (types.INT32, ["batch_size"]),
            "total": (types.INT32, []),
        }
        outputs = {"out": (dtype, rows), "k_after": (dtype, cache), "v_after": (dtype, cache)}
        node = make.make_node(
            "GroupQueryAttention",
            list(inputs),
            list(outputs),
            domain="com.microsoft",
            num_heads=row.nheads,
            kv_num_heads=row.nheads_k,
            scale=row.softmax_scale,
            local_window_size=row.window or -1,
        )
        graph = make.make_graph(
            [node],
            "attention",
            *(
                [make.make_tensor_value_info(name, *what) for name, what in side.items()]
                for side in (inputs, outputs)
            ),
        )
        versions = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
        model = make.make_model(graph, opset_imports=versions, ir_version=8)
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        self.sessions[key] = self.ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return self.sessions[key]

    def call(
        self, row: Workload, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Call:
        """The new rows q, k, v (batch_size, new, heads, headdim) at the end of the caches."""
        session = self.session(row)
        binding = session.io_binding()
        out = torch.empty_like(q)
        last = torch.full((row.batch_size,), row.seqlen_k - 1, dtype=torch.int32)
        total = torch.tensor(row.seqlen_k, dtype=torch.int32)
        inputs = {
            "q": q.flatten(2),
            "k": k.flatten(2).contiguous(),
            "v": v.flatten(2).contiguous(),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "last": last,
            "total": total,
        }
        outputs = {"out": out.view(*q.shape[:2], -1), "k_after": k_cache, "v_after": v_cache}
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, t in tensors.items():
                dtype = str(t.dtype).removeprefix("torch.")
                bind(name, "cpu", 0, getattr(self.np, dtype), list(t.shape), t.data_ptr())

        def call() -> Tensor:
            _ = inputs  # the binding has their addresses alone
            session.run_with_iobinding(binding)
            return out

        return call

    def decode(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        caches = [
            tuple(t.view(row.batch_size, row.nheads_k, row.seqlen_k, row.headdim) for t in pair)
            for pair in dense_caches(row, x)
        ]
        if x.k is not None and x.v is not None:
            for cache, t in zip(caches[0], (x.k, x.v), strict=True):
                cache.copy_(t.transpose(1, 2))
            k, v = x.k[:, -1:], x.v[:, -1:]
        else:
            k = v = torch.randn(row.batch_size, 1, row.nheads_k, row.headdim).to(x.q.dtype)
        return [self.call(row, x.q, k, v, *pair) for pair in caches]

    def prefill(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        k, v = x.kv
        k_cache, v_cache = (t.transpose(1, 2).contiguous() for t in (k, v))
        new = slice(row.seqlen_k - row.seqlen_q, None)
        return [self.call(row, x.q, k[:, new], v[:, new], k_cache, v_cache)]
