"""The bitwise contract of docs/design.md, run on a device: `python -m fa3_ops consistency`.

A row's out and softmax_lse depend on its own q and its own keys and values alone. Every comparison
computes rows in another way than the training forward of their sequence alone, and asks for the
same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fa3_ops
from fa3_ops.backends.explain import Step

Pair = tuple[Tensor, Tensor]  # what is wanted, what came

# Around 512 and 1024 kernels change tiles, chunks and splits.
SEQLENS = (513, 1, 1300, 65)
NHEADS, NHEADS_K = 4, 2
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# The backends that promise the contract. The others are measured all the same.
PROMISED = ("cpu", "flash_attn_npu")


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
        wanted = ("float32", "float16", "bfloat16") if device == "cpu" else ("float16", "bfloat16")
        dtypes = [DTYPES[name] for name in wanted]
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
        explanation = fa3_ops.explain(function, *arguments, **keywords)
        self.served.add(attention_step(explanation.steps).backend)
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


def attention_step(steps: Sequence[Step]) -> Step:
    return next(step for step in reversed(steps) if "attn" in step.operator)


@dataclass
class Paged:
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor

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


# ---- The comparisons ---------------------------------------------------------------------------


def repeated(case: Case) -> Iterator[Pair]:
    for b in range(case.batch_size):
        out, softmax_lse = case.alone(b)
        yield from case.same(b, out[0], softmax_lse[0])


def any_batch(case: Case) -> Iterator[Pair]:
    everyone = list(range(case.batch_size))
    for sequences in ([0], everyone, everyone[::-1], [1, 0, 0]):
        yield from case.varlen(sequences)


def dense_batch(case: Case) -> Iterator[Pair]:
    """Equal lengths as one dense batch, and unequal ones as a padded batch."""
    n = min(case.seqlens[0], case.seqlens[-1])
    long, short = (0, -1) if case.seqlens[0] >= case.seqlens[-1] else (-1, 0)
    q, k, v = (torch.stack((x[long][:n], x[short][:n])) for x in (case.q, case.k, case.v))
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_func, q, k, v, **case.options, return_attn_probs=True
    )
    for row, b in enumerate((long, short)):
        yield from case.same(b, out[row], softmax_lse[row])
    seqlens = case.ints(case.seqlens)
    q, k, v = (case.padded(x) for x in (case.q, case.k, case.v))
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_varlen_func,
        *(q, k, v, None, None, None, None, seqlens, seqlens),
        **case.options,
        return_attn_probs=True,
    )
    for b, n in enumerate(case.seqlens):
        yield from case.same(b, out[b, :n], softmax_lse[b, :, :n])


def longer_maximum(case: Case) -> Iterator[Pair]:
    yield from case.varlen(range(case.batch_size), slack=1000)


def advance(
    case: Case, cache: Paged, begins: Sequence[int], ends: Sequence[int], **keywords: Any
) -> Iterator[Pair]:
    """Appends rows [begins[b], ends[b]) of every sequence and attends with them."""
    steps = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
    q, k, v = (
        torch.cat([x[step] for x, step in zip(xs, steps, strict=True)])
        for xs in (case.q, case.k, case.v)
    )
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    cu_seqlens = case.cumulative(lengths)
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_with_kvcache,
        *(q, cache.k_cache, cache.v_cache, k, v),
        cache_seqlens=case.ints(begins),
        page_table=cache.page_table,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k_new=cu_seqlens,
        max_seqlen_q=max(lengths),
        **case.options,
        **keywords,
        return_softmax_lse=True,
    )
    yield from case.same_packed(out, softmax_lse, range(case.batch_size), begins, ends)


def whole_prefill(case: Case) -> Iterator[Pair]:
    yield from advance(case, case.paged(128), [0] * case.batch_size, case.seqlens)


def chunked_prefill(case: Case) -> Iterator[Pair]:
    cache = case.paged(16)
    begins = [0] * case.batch_size
    for cut in (7, 505, 519, 1023, 1031, max(case.seqlens)):
        ends = [min(max(cut, begin), n) for begin, n in zip(begins, case.seqlens, strict=True)]
        yield from advance(case, cache, begins, ends)
        begins = ends


def cached_prefix(case: Case) -> Iterator[Pair]:
    """A second request for the longest sequence shares the pages of its first tokens with the first
    request, and appends and attends with the rest alone."""
    longest = max(range(case.batch_size), key=lambda b: case.seqlens[b])
    page_size = 128
    cache = case.paged(page_size).filled(case)
    extra = case.paged(page_size)
    pool = [torch.cat((a, b)) for a, b in zip(caches(cache), caches(extra), strict=True)]
    for shared in (512, 1024, 1152):
        shared = min(shared, case.seqlens[longest] // page_size * page_size)
        first = shared // page_size
        table = cache.page_table[longest].clone()
        table[first:] = extra.page_table[longest, first:] + cache.k_cache.shape[0]
        q, k, v = (x[longest][None, shared:] for x in (case.q, case.k, case.v))
        if q.shape[1] == 0:
            continue
        out, softmax_lse = case.call(
            fa3_ops.flash_attn_with_kvcache,
            *(q, *pool, k, v),
            cache_seqlens=case.ints([shared]),
            page_table=table[None],
            **case.options,
            return_softmax_lse=True,
        )
        yield from case.same(longest, out[0], softmax_lse[0], shared)


def caches(cache: Paged) -> tuple[Tensor, Tensor]:
    return cache.k_cache, cache.v_cache


def decode_starts(case: Case, steps: int) -> dict[int, int]:
    """Where to decode each sequence that is long enough: across 512 or 1024, or at its end."""
    starts = {}
    for b, n in enumerate(case.seqlens):
        if n >= steps:
            crossed = max((edge for edge in (512, 1024) if edge < n), default=n)
            starts[b] = max(min(crossed - 2, n - steps), 0)
    return starts


def decode(case: Case) -> Iterator[Pair]:
    """One token at a time, appended: in a paged cache, in a dense one, and alone."""
    steps = 4
    starts = decode_starts(case, steps)
    sequences = list(starts)
    paged = case.paged(16).filled(case)
    dense = [case.padded(x) for x in (case.k, case.v)]
    table = paged.page_table[sequences]
    for step in range(steps):
        at = [starts[b] + step for b in sequences]
        q, k, v = (
            torch.stack([x[b][i : i + 1] for b, i in zip(sequences, at, strict=True)])
            for x in (case.q, case.k, case.v)
        )
        ways: list[tuple[Sequence[Tensor], dict[str, Any], slice]] = [
            (caches(paged), {"page_table": table}, slice(None)),
            (dense, {"cache_batch_idx": case.ints(sequences)}, slice(None)),
            (caches(paged), {"page_table": table[:1]}, slice(0, 1)),
        ]
        for (k_cache, v_cache), where, some in ways:
            out, softmax_lse = case.call(
                fa3_ops.flash_attn_with_kvcache,
                *(q[some], k_cache, v_cache, k[some], v[some]),
                cache_seqlens=case.ints(at[some]),
                **where,
                **case.options,
                return_softmax_lse=True,
            )
            for row, b in enumerate(sequences[some]):
                yield from case.same(b, out[row], softmax_lse[row], at[row])


def attend(case: Case, cache: Paged, rows: int | None = None, **keywords: Any) -> Iterator[Pair]:
    """The last `rows` rows of every sequence (all, if None) over a cache that holds all keys."""
    begins = [0 if rows is None else max(n - rows, 0) for n in case.seqlens]
    lengths = [n - begin for n, begin in zip(case.seqlens, begins, strict=True)]
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_with_kvcache,
        torch.cat([q[begin:] for q, begin in zip(case.q, begins, strict=True)]),
        *caches(cache),
        cache_seqlens=case.ints(case.seqlens),
        page_table=cache.page_table,
        cu_seqlens_q=case.cumulative(lengths),
        max_seqlen_q=max(lengths),
        **case.options,
        **keywords,
        return_softmax_lse=True,
    )
    yield from case.same_packed(out, softmax_lse, range(case.batch_size), begins, case.seqlens)


def page_sizes(case: Case) -> Iterator[Pair]:
    for page_size, order in ((1, "shuffled"), (16, "reversed"), (128, "shuffled"), (200, "rising")):
        yield from attend(case, case.paged(page_size, order).filled(case), rows=100)


def strided_caches(case: Case) -> Iterator[Pair]:
    """K and V as views of one tensor, (…, 2, nheads_k, headdim) and (num_pages, 2, …), dense and
    paged, as serving systems keep them."""
    dense = torch.stack([case.padded(x) for x in (case.k, case.v)], dim=2)
    q = torch.stack([q[-1:] for q in case.q])
    out, softmax_lse = case.call(
        fa3_ops.flash_attn_with_kvcache,
        *(q, dense[:, :, 0], dense[:, :, 1]),
        cache_seqlens=case.ints(case.seqlens),
        **case.options,
        return_softmax_lse=True,
    )
    for b, n in enumerate(case.seqlens):
        yield from case.same(b, out[b], softmax_lse[b], n - 1)
    cache = case.paged(128).filled(case)
    for dim in (1, 2):
        k_cache, v_cache = torch.stack(caches(cache), dim=dim).unbind(dim)
        yield from attend(case, Paged(k_cache, v_cache, cache.page_table), rows=20)


def few_splits(case: Case) -> Iterator[Pair]:
    """num_splits 1, 0 (chosen by the kernel), and 1 with scheduler_metadata."""
    cache = case.paged(128).filled(case)
    for rows in (1, 20):
        for num_splits in (1, 0):
            yield from attend(case, cache, rows, num_splits=num_splits)
        metadata = fa3_ops.get_scheduler_metadata(
            case.batch_size,
            min(rows, max(case.seqlens)),
            cache.page_table.shape[1] * 128,
            NHEADS,
            NHEADS_K,
            case.setting.headdim,
            case.ints(case.seqlens),
            case.setting.dtype,
            cu_seqlens_q=case.cumulative([min(rows, n) for n in case.seqlens]),
            page_size=128,
            causal=True,
            window_size=case.setting.window_size,
            has_softcap=case.setting.softcap > 0,
            num_splits=1,
            softcap=case.setting.softcap,
        )
        yield from attend(case, cache, rows, num_splits=1, scheduler_metadata=metadata)


def many_splits(case: Case) -> Iterator[Pair]:
    cache = case.paged(128).filled(case)
    for rows in (1, 4):
        for num_splits in (2, 3, 8):
            yield from attend(case, cache, rows, num_splits=num_splits)


def threads(case: Case) -> Iterator[Pair]:
    before = torch.get_num_threads()
    cache = case.paged(128).filled(case)
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            yield from case.varlen(range(case.batch_size))
            yield from attend(case, cache, rows=1)
    finally:
        torch.set_num_threads(before)


def gradients(case: Case, sequences: Sequence[int]) -> list[Tensor]:
    """dq, dk and dv of flash_attn_varlen_func, packed."""
    lengths = [case.seqlens[b] for b in sequences]
    cu_seqlens = case.cumulative(lengths)
    q, k, v, dout = (
        torch.cat([x[b] for b in sequences]) for x in (case.q, case.k, case.v, case.dout)
    )
    lengths_given = (cu_seqlens, cu_seqlens, max(lengths), max(lengths), None, None)
    scale = case.setting.headdim**-0.5
    out, softmax_lse = fa3_ops.flash_attn_varlen_func(
        *(q, k, v, *lengths_given, scale), **case.options, return_attn_probs=True
    )
    arguments = (
        *(dout, q, k, v, out, softmax_lse, *lengths_given, scale),
        *(True, case.setting.window_size, 0, case.setting.softcap),
        True,  # deterministic
    )
    results: tuple[Tensor, ...] = case.call(
        torch.ops.fa3npu.flash_attn_varlen_func_backward, *arguments
    )
    return list(results)


def backward(case: Case) -> Iterator[Pair]:
    """Gradients again, and of each sequence alone."""
    everyone = list(range(case.batch_size))
    together = gradients(case, everyone)
    yield from zip(together, gradients(case, everyone), strict=True)
    parts = [x.split(case.seqlens) for x in together]
    for b in everyone:
        for part, x in zip(parts, gradients(case, [b]), strict=True):
            yield part[b], x


@dataclass(frozen=True)
class Comparison:
    name: str
    function: Callable[[Case], Iterator[Pair]]
    devices: tuple[str, ...] = ("cpu", "npu", "cuda")
    may_differ: tuple[str, ...] = ()  # devices whose kernels are documented to change bits here


COMPARISONS = (
    Comparison("the same call again", repeated),
    Comparison("alone or in any batch", any_batch),
    Comparison("dense and padded batches", dense_batch),
    Comparison("max_seqlen larger than needed", longer_maximum),
    Comparison("whole prefill", whole_prefill),
    Comparison("prefill in chunks", chunked_prefill),
    Comparison("prefix cached", cached_prefix),
    Comparison("decode token by token", decode),
    Comparison("page sizes and page order", page_sizes),
    Comparison("strided caches", strided_caches),
    Comparison("num_splits 0 and 1, scheduler_metadata", few_splits),
    Comparison("num_splits above 1", many_splits, may_differ=("npu",)),
    Comparison("1, 2 and 4 threads", threads, devices=("cpu",)),
    Comparison("backward repeated, and alone", backward),
)


# ---- Running them ------------------------------------------------------------------------------


@dataclass
class Outcome:
    """One comparison, in one setting or, summed up, in several."""

    comparison: Comparison
    device: str
    elements: int = 0
    differing: int = 0
    largest: float = 0.0
    served: set[str] = field(default_factory=set)
    error: str = ""

    @property
    def held(self) -> bool:
        return not self.error and self.differing == 0 and self.elements > 0

    @property
    def required(self) -> bool:
        promised = self.served <= set(PROMISED)
        return promised and self.device not in self.comparison.may_differ

    @property
    def failed(self) -> bool:
        return bool(self.error) or (self.required and not self.held)

    @property
    def verdict(self) -> str:
        if self.error:
            return "error"
        if self.held:
            return "held"
        return "NOT HELD" if self.required else "differs, allowed"

    def count(self, wanted: Tensor, got: Tensor) -> None:
        """Bits are compared; the same NaN on both sides is no difference."""
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            raise ValueError(
                f"expected {tuple(wanted.shape)} {wanted.dtype}, got {tuple(got.shape)} {got.dtype}"
            )
        self.elements += got.numel()
        if torch.equal(wanted, got):
            return
        wanted, got = wanted.cpu().double(), got.cpu().double()
        differs = (wanted != got) & ~(wanted.isnan() & got.isnan())
        self.differing += int(differs.sum())
        if bool(differs.any()):
            distance = (wanted - got)[differs].abs().nan_to_num(float("inf"), float("inf"))
            self.largest = max(self.largest, float(distance.max()))

    def difference(self) -> str:
        if self.error:
            return self.error
        if not self.differing:
            return ""
        return f"{self.differing / self.elements:.2%} of elements, by at most {self.largest:.1e}"

    def add(self, other: Outcome) -> None:
        self.elements += other.elements
        self.differing += other.differing
        self.largest = max(self.largest, other.largest)
        self.served |= other.served
        self.error = self.error or other.error


def run(comparison: Comparison, case: Case) -> Outcome:
    """Compares; an exception becomes the outcome's error."""
    outcome = Outcome(comparison, case.setting.device)
    try:
        if comparison.function is not backward:  # which compares gradients with one another
            assert case.expected
        case.served = set(case.expected_by)
        for wanted, got in comparison.function(case):
            outcome.count(wanted, got)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}".splitlines()[0]
    outcome.served = set(case.served)
    return outcome


@dataclass
class Results:
    device: str
    rows: dict[str, Outcome] = field(default_factory=dict)  # by comparison, over all settings
    exceptions: list[str] = field(default_factory=list)  # what did not hold, setting by setting

    @property
    def failed(self) -> bool:
        return any(row.failed for row in self.rows.values()) or not self.rows

    def table(self) -> str:
        """Markdown."""
        lines = [
            "| comparison | result | difference | backend |",
            "|---|---|---|---|",
            *(
                f"| {name} | {row.verdict} | {row.difference() or '-'} "
                f"| {', '.join(sorted(row.served)) or '-'} |"
                for name, row in self.rows.items()
            ),
        ]
        if self.exceptions:
            lines += ["", *(f"- {line}" for line in self.exceptions)]
        return "\n".join(lines)

    def summary(self) -> str:
        rows = self.rows.values()
        parts = {
            "held": sum(row.held for row in rows),
            "did not hold": sum(row.failed for row in rows),
            "differed where that is allowed": sum(not (row.held or row.failed) for row in rows),
        }
        counted = ", ".join(f"{n} {what}" for what, n in parts.items() if n)
        return f"bitwise contract on {self.device}: {counted}"


def check(chosen: Sequence[Setting]) -> Results:
    """All comparisons in all settings, which are of one device."""
    results = Results(chosen[0].device)
    for setting in chosen:
        case = Case(setting)
        for comparison in COMPARISONS:
            if setting.device not in comparison.devices:
                continue
            outcome = run(comparison, case)
            if not outcome.held:
                results.exceptions.append(
                    f"{comparison.name} ({setting}): {outcome.verdict}, {outcome.difference()}"
                )
            row = results.rows.setdefault(comparison.name, Outcome(comparison, setting.device))
            row.add(outcome)
    return results


def best_device() -> str:
    """The accelerator that is there, or the CPU."""
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_available():
        return "npu"
    return "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "npu", "cuda"), default=None)
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", default=None)


def main(arguments: argparse.Namespace) -> int:
    """Prints the table; 1 if something that is promised did not hold."""
    device = arguments.device or best_device()
    try:
        torch.empty(0, device=device)
    except Exception as error:
        print(f"no device {device} here: {type(error).__name__}: {error}".splitlines()[0])
        return 1
    dtypes = [DTYPES[name] for name in arguments.dtype] if arguments.dtype else None
    results = check(settings(device, dtypes))
    print(results.table())
    print()
    print(results.summary())
    return int(results.failed)
