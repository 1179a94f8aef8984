"""What a comparison works on: the sequences of a setting, and their expected bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fa3_ops

Pair = tuple[Tensor, Tensor]  # what is wanted, what came

# Around 512 and 1024 kernels change tiles, chunks and splits.
SEQLENS = (513, 1, 1300, 65)
NHEADS, NHEADS_K = 4, 2
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Setting:
    """What all calls of a comparison have in common."""

    device: str
    dtype: torch.dtype
    headdim: int
    feature: str = "causal"
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    seqlens: tuple[int, ...] = SEQLENS

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, headdim {self.headdim}, {self.feature}"


def settings(device: str, dtypes: Sequence[torch.dtype] | None = None) -> list[Setting]:
    """Every dtype with two head dims and every mask; float32 only where a kernel has it."""
    if dtypes is None:
        dtypes = [x for x in DTYPES.values() if device != "npu" or x != torch.float32]
    sinks = device != "npu"  # where torch operators count them, outside the contract
    last = "softcap and sinks" if sinks else "softcap"
    return [
        setting
        for dtype in dtypes
        for setting in (
            Setting(device, dtype, 64),
            Setting(device, dtype, 64, "window", window_size=(300, 0)),
            Setting(device, dtype, 128, last, softcap=5.0, sinks=sinks),
        )
    ]


class Case:
    """The sequences of a setting, and the bits that every way of computing them has to give."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.seqlens = setting.seqlens
        self.batch_size = len(self.seqlens)
        self.served: set[str] = set()  # the backends of the comparison that runs
        self.expected_by: set[str] = set()  # those of the expected bits
        generator = torch.Generator().manual_seed(0)

        def rand(*shape: int, dtype: torch.dtype = setting.dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(setting.device)

        d = setting.headdim
        self.q = [rand(n, NHEADS, d) for n in self.seqlens]
        self.k = [rand(n, NHEADS_K, d) for n in self.seqlens]
        self.v = [rand(n, NHEADS_K, d) for n in self.seqlens]
        self.dout = [rand(n, NHEADS, d) for n in self.seqlens]
        self.options: dict[str, Any] = {
            "causal": True,
            "window_size": setting.window_size,
            "softcap": setting.softcap,
        }
        if setting.sinks:
            self.options["sinks"] = rand(NHEADS, dtype=torch.float32)

    def ints(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.setting.device)

    def cumulative(self, lengths: Sequence[int]) -> Tensor:
        return self.ints(sum(lengths[:b]) for b in range(len(lengths) + 1))

    def new(self, *shape: int) -> Tensor:
        """Memory that holds something: what lies past a sequence's end must not matter."""
        return torch.full(shape, 3.0, dtype=self.setting.dtype, device=self.setting.device)

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """function(...), noting the backend that serves it."""
        self.served.add(fa3_ops.explain(function, *arguments, **keywords).backend)
        return function(*arguments, **keywords)

    @cached_property
    def expected(self) -> list[tuple[Tensor, Tensor]]:
        """out (seqlen, nheads, headdim) and softmax_lse (nheads, seqlen) of each sequence alone."""
        self.served.clear()
        results = [self.alone(b) for b in range(self.batch_size)]
        self.expected_by = set(self.served)
        return [(out[0], softmax_lse[0]) for out, softmax_lse in results]

    def alone(self, b: int) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.call(
            fa3_ops.flash_attn_func,
            *(x[b][None] for x in (self.q, self.k, self.v)),
            **self.options,
            return_attn_probs=True,
        )
        return result

    def same(self, b: int, out: Tensor, softmax_lse: Tensor, begin: int = 0) -> Iterator[Pair]:
        """Rows `begin` and on of sequence b, as expected and as they came."""
        rows = slice(begin, begin + out.shape[0])
        wanted_out, wanted_lse = self.expected[b]
        yield wanted_out[rows], out
        yield wanted_lse[:, rows], softmax_lse

    def same_packed(
        self,
        out: Tensor,
        softmax_lse: Tensor,
        sequences: Sequence[int],
        begins: Sequence[int] | None = None,
        ends: Sequence[int] | None = None,
    ) -> Iterator[Pair]:
        """Rows [begins[i], ends[i]) of each sequence, packed."""
        at = 0
        for i, b in enumerate(sequences):
            begin = begins[i] if begins else 0
            rows = slice(at, at + (ends[i] if ends else self.seqlens[b]) - begin)
            yield from self.same(b, out[rows], softmax_lse[:, rows], begin)
            at = rows.stop

    def varlen(self, sequences: Sequence[int], slack: int = 0, **keywords: Any) -> Iterator[Pair]:
        """flash_attn_varlen_func of these sequences, with max_seqlen larger by slack."""
        lengths = [self.seqlens[b] for b in sequences]
        cu_seqlens = self.cumulative(lengths)
        out, softmax_lse = self.call(
            fa3_ops.flash_attn_varlen_func,
            *(torch.cat([x[b] for b in sequences]) for x in (self.q, self.k, self.v)),
            cu_seqlens,
            cu_seqlens,
            max(lengths) + slack,
            max(lengths) + slack,
            **self.options,
            **keywords,
            return_attn_probs=True,
        )
        yield from self.same_packed(out, softmax_lse, sequences)

    def padded(self, tensors: Sequence[Tensor]) -> Tensor:
        """(batch_size, longest, ...)."""
        batch = self.new(self.batch_size, max(self.seqlens), *tensors[0].shape[1:])
        for b, x in enumerate(tensors):
            batch[b, : len(x)] = x
        return batch

    def paged(self, page_size: int, order: str = "shuffled", spare: int = 0) -> Paged:
        """Pages for every sequence and `spare` tokens more of each, in this order of page ids."""
        pages = max(-(-(n + spare) // page_size) for n in self.seqlens)
        count = pages * self.batch_size
        if order == "shuffled":
            ids = torch.randperm(count, generator=torch.Generator().manual_seed(page_size))
        else:
            ids = torch.arange(count)
        if order == "reversed":
            ids = ids.flip(0)
        shape = (count, page_size, NHEADS_K, self.setting.headdim)
        table = self.ints(ids.tolist()).view(self.batch_size, pages)
        return Paged(self.new(*shape), self.new(*shape), table)


@dataclass
class Paged:
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        return self.k_cache, self.v_cache

    def fill(self, b: int, k: Tensor, v: Tensor) -> None:
        """Writes the keys and values of sequence b from its start."""
        page_size = self.k_cache.shape[1]
        for page, begin in enumerate(range(0, len(k), page_size)):
            rows = slice(begin, begin + page_size)
            entry = int(self.page_table[b, page])
            self.k_cache[entry, : len(k[rows])] = k[rows]
            self.v_cache[entry, : len(v[rows])] = v[rows]

    def filled(self, case: Case) -> Paged:
        for b in range(case.batch_size):
            self.fill(b, case.k[b], case.v[b])
        return self
