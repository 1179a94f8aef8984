"""The bitwise contract of docs/design.md on CPU: random sequences, masks, layouts and threads.

fa3_ops/tools/consistency has the fixed comparisons that run on any device; here everything varies.
What a call computes of a sequence is compared with that sequence alone, by flash_attn_func, dense
and on one thread. Memory that no sequence owns holds NaN.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import python
from sample_inputs import ints, rotary
from strategies import (
    assert_exact,
    assert_lse,
    cache_dtype,
    examples,
    extras,
    largest_error,
    masks,
    memory,
    narrowed,
    threads,
)
from torch import Tensor

import fa3_ops
from fa3_ops import reference

# Register tiles, row tiles, blocks and chunks begin and end here.
EDGES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 239, 240, 241]
SHORT = st.one_of(st.sampled_from(EDGES), st.integers(0, 300))
LONG = st.one_of(st.sampled_from([1023, 1024, 1025, 2048, 2049]), st.integers(301, 6000))
FEW = st.integers(0, 40)
HEADDIMS = [1, 24, 40, 64, 72, 96, 128, 192, 256]
WORK = 2e8  # about as many multiplications a call
DTYPES = (torch.float32, torch.float16, torch.bfloat16) * 3 + (torch.float64, torch.float8_e4m3fn)


@dataclass
class Sequence:
    """One sequence; its last row of q stands at its last key."""

    q: Tensor  # (seqlen_q, nheads, headdim)
    k: Tensor  # (seqlen_k, nheads_k, headdim)
    v: Tensor  # (seqlen_k, nheads_k, headdim_v)
    qv: Tensor | None  # (seqlen_q, nheads, headdim_v)
    own: dict[str, Tensor]  # alibi_slopes (nheads,) and descales (nheads_k,)
    options: dict[str, Any]  # what it has in common with every sequence of a batch

    @property
    def seqlen_q(self) -> int:
        return len(self.q)

    @property
    def seqlen_k(self) -> int:
        return len(self.k)

    @property
    def prefix(self) -> int:
        """The keys before the first row of q."""
        return self.seqlen_k - self.seqlen_q

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """out (seqlen_q, nheads, headdim_v) and softmax_lse (nheads, seqlen_q)."""
        return self.alone(1)

    def alone(self, count: int) -> tuple[Tensor, Tensor]:
        """With so many threads."""
        qv = None if self.qv is None else self.qv[None]
        with threads(count):
            out, softmax_lse = fa3_ops.flash_attn_func(
                *(x[None] for x in (self.q, self.k, self.v)),
                qv=qv,
                **together([self]),
                return_attn_probs=True,
            )
        return out[0], softmax_lse[0]

    @cached_property
    def output_gradients(self) -> tuple[Tensor, Tensor]:
        """dout and dsoftmax_lse."""
        out, softmax_lse = self.expected
        return torch.randn(out.shape).to(out.dtype), torch.randn(softmax_lse.shape)

    @cached_property
    def gradients(self) -> tuple[Tensor, ...]:
        """dq, dk and dv, alone."""
        inputs = [x[None].requires_grad_() for x in (self.q, self.k, self.v)]
        with threads(1):
            outputs = fa3_ops.flash_attn_func(*inputs, **together([self]), return_attn_probs=True)
            grads = torch.autograd.grad(outputs, inputs, [x[None] for x in self.output_gradients])
        return tuple(x[0] for x in grads)

    @cached_property
    def mask(self) -> Tensor:
        """(seqlen_q, seqlen_k), true where a row sees a key."""
        names = ("causal", "window_size", "attention_chunk")
        return reference.mask(self.seqlen_q, self.seqlen_k, *(self.options[n] for n in names))

    def rows(self, begin: int, end: int) -> Sequence:
        """The same sequence with some rows of q only."""
        qv = None if self.qv is None else self.qv[begin:end]
        return replace(self, q=self.q[begin:end], qv=qv)

    def rotated(self, rotary_cos: Tensor, rotary_sin: Tensor, interleaved: bool) -> Sequence:
        """With the q and k that rotary embeddings make of it."""
        q, k = (
            torch.ops.fa3npu.apply_rotary(
                x[None], rotary_cos, rotary_sin, first, None, interleaved
            )[0]
            for x, first in ((self.q, ints(self.prefix)), (self.k, ints(0)))
        )
        return replace(self, q=q, k=k)

    def assert_same(self, out: Tensor, softmax_lse: Tensor, begin: int = 0) -> None:
        """out and softmax_lse are those of the rows from `begin` on."""
        rows = slice(begin, begin + len(out))
        assert torch.equal(out, self.expected[0][rows])
        assert torch.equal(softmax_lse, self.expected[1][:, rows])


class Stranger(Sequence):
    """A neighbour of NaN, which no result may notice."""

    def assert_same(self, out: Tensor, softmax_lse: Tensor, begin: int = 0) -> None:
        pass

    @cached_property
    def output_gradients(self) -> tuple[Tensor, Tensor]:
        shape, dtype = (self.seqlen_q, self.q.shape[1]), self.q.dtype
        nan = float("nan")
        return torch.full((*shape, self.v.shape[2]), nan, dtype=dtype), torch.full(shape, nan).T


def together(batch: Several[Sequence]) -> dict[str, Any]:
    """The options of a call for these sequences."""
    own = {name: torch.stack([s.own[name] for s in batch]) for name in batch[0].own}
    return batch[0].options | own


KINDS = ("square", "any", "few rows", "chunks")


def lengths(draw: Any, kind: str) -> Iterator[tuple[int, int]]:
    """(seqlen_q, seqlen_k) of one to three sequences."""
    if kind == "many keys":  # of one sequence, which threads share
        yield draw(st.integers(1, 8)), draw(st.integers(3000, 12000))
        return
    for i in range(draw(st.integers(1, 3))):
        seqlen_k = draw(LONG if kind == "few rows" else SHORT)
        if kind == "chunks" and i == 0:  # more keys than a partial result has, all with their row
            seqlen_k = draw(st.integers(1010, 1200))
        yield draw({"any": SHORT, "few rows": FEW}.get(kind, st.just(seqlen_k))), seqlen_k


@st.composite
def batches(
    draw: Any, kinds: Several[str] = KINDS, backward: bool = False, suffix: bool = False
) -> list[Sequence]:
    """One to three sequences; with backward, of what has gradients; with suffix, causal ones with
    no more rows than keys."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES[:-1] if backward else DTYPES))
    pairs = list(lengths(draw, draw(st.sampled_from(kinds))))
    if suffix:
        pairs = [(min(m, n), n) for m, n in pairs]
    large = max(m * n for m, n in pairs) > 1e6
    headdims = st.sampled_from([d for d in HEADDIMS if d <= 128 or not large])
    d = draw(headdims)
    dv = draw(st.one_of(st.just(d), headdims))
    has_qv = not backward and draw(st.integers(0, 5)) == 0
    work = sum(m * n for m, n in pairs) * (d + dv + dv * has_qv)
    most = max(int(WORK / max(work, 1)), 1)
    group = draw(st.integers(1, min(most, 8)))
    nheads_k = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if n == 1 or n * group <= most]))
    nheads = group * nheads_k
    options = masks(draw, draw(st.sampled_from([45, 1500])))
    if suffix:
        options["causal"] = True
    of_keys = dtype if backward or suffix else cache_dtype(draw, dtype)
    chosen = extras(draw, len(pairs), (nheads, nheads_k), dtype, of_keys)
    own = {name: x for name, x in chosen.items() if x.dim() == 2}
    options |= {name: x for name, x in chosen.items() if x.dim() < 2}

    def rand(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return narrowed(torch.randn(shape), dtype)

    return [
        Sequence(
            rand(m, nheads, d),
            rand(n, nheads_k, d, dtype=of_keys),
            rand(n, nheads_k, dv, dtype=of_keys),
            rand(m, nheads, dv) if has_qv else None,
            {name: x[b] for name, x in own.items()},
            options,
        )
        for b, (m, n) in enumerate(pairs)
    ]


def stranger(like: Sequence, seqlen_q: int, seqlen_k: int) -> Stranger:
    def nan(x: Tensor, rows: int) -> Tensor:
        return narrowed(torch.full((rows, *x.shape[1:]), float("nan")), x.dtype)

    qv = None if like.qv is None else nan(like.qv, seqlen_q)
    q, k, v = nan(like.q, seqlen_q), nan(like.k, seqlen_k), nan(like.v, seqlen_k)
    return Stranger(q, k, v, qv, like.own, like.options)


def company(draw: Any, sequences: Several[Sequence], suffix: bool = False) -> list[Sequence]:
    """Some of the sequences, in any order, and perhaps a stranger between them."""
    batch = draw(st.lists(st.sampled_from(list(sequences)), min_size=1, max_size=4))
    if draw(st.booleans()):
        seqlen_k = draw(SHORT)
        seqlen_q = draw(st.integers(0, seqlen_k) if suffix else SHORT)
        batch.insert(draw(st.integers(0, len(batch))), stranger(sequences[0], seqlen_q, seqlen_k))
    return list(batch)


# ---- Layouts -----------------------------------------------------------------------------------


@dataclass
class Rows:
    """Where a batch has the rows of its sequences: packed, or one batch entry each."""

    lengths: list[int]
    shape: tuple[int, ...]
    bounds: list[int] | None  # cu_seqlens, if packed

    @classmethod
    def packed(cls, draw: Any, lengths: list[int], most_unused: int = 0) -> Rows:
        """With NaN before and behind, and between sequences as far as rows may be unused."""
        unused = [draw(st.integers(0, most_unused)) for _ in lengths]
        sizes = (a + b for a, b in zip(lengths, unused, strict=True))
        bounds = list(accumulate(sizes, initial=draw(st.integers(0, 2))))
        return cls(lengths, (bounds[-1] + draw(st.integers(0, 2)),), bounds)

    @classmethod
    def padded(cls, draw: Any, lengths: list[int], most_unused: int = 0) -> Rows:
        longest = max(lengths) + draw(st.integers(0, most_unused))
        return cls(lengths, (len(lengths), longest), None)

    @classmethod
    def any(cls, draw: Any, lengths: list[int]) -> Rows:
        """Packed; or padded, where no row is unused."""
        same = min(lengths) == max(lengths)
        return (cls.padded if same and draw(st.booleans()) else cls.packed)(draw, lengths)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.bounds is None else ints(*self.bounds)

    def tensor(self, draw: Any, parts: Several[Tensor]) -> Tensor:
        x = memory(draw, (*self.shape, *parts[0].shape[1:]), parts[0].dtype)
        for b, part in enumerate(parts):
            self.part(x, b).copy_(part)
        return x

    def part(self, x: Tensor, b: int) -> Tensor:
        """The rows of sequence b in x (..., heads, d)."""
        if self.bounds is None:
            return x[b, : self.lengths[b]]
        return x[self.bounds[b] : self.bounds[b] + self.lengths[b]]

    def lse_part(self, x: Tensor, b: int) -> Tensor:
        """Those in x (..., heads, rows)."""
        return self.part(x.transpose(-1, -2), b).transpose(-1, -2)


class Cache:
    """A KV cache for a batch, dense or paged, that holds NaN until something is written."""

    def __init__(self, draw: Any, batch: Several[Sequence]) -> None:
        count, s = len(batch), batch[0]
        self.leftpad, self.dropped = [0] * count, [0] * count
        if draw(st.integers(0, 3)) == 0:
            self.leftpad = [draw(st.integers(0, 70)) for _ in batch]
        room = (pad + s.seqlen_k for pad, s in zip(self.leftpad, batch, strict=True))
        capacity = max(*room, 1) + draw(st.integers(0, 40))
        entries = count + draw(st.integers(0, 1))
        self.entries = list(draw(st.permutations(range(entries))))[:count]
        self.page_size = 0
        shape = (entries, capacity)
        if draw(st.booleans()):
            self.page_size = draw(st.one_of(st.sampled_from([1, 16, 64, 128]), st.integers(1, 300)))
            columns = -(-capacity // self.page_size)
            pages = entries * columns + draw(st.integers(0, 3))
            self.table = torch.randperm(pages)[: entries * columns].int().view(entries, columns)
            shape = (pages, self.page_size)
        self.k, self.v = (
            memory(draw, (*shape, *x.shape[1:]), x.dtype, any_last=False) for x in (s.k, s.v)
        )

    def drop(self, draw: Any, batch: Several[Sequence]) -> None:
        """Forgets keys at the start, as far as no row of the batch sees them."""
        for b, s in enumerate(batch):
            unseen = int((~s.mask.any(0)).int().cumprod(0).sum())
            self.dropped[b] = draw(st.integers(0, unseen))

    def write(self, b: int, k: Tensor, v: Tensor) -> None:
        """Keys and values from the start of sequence b, of which the first may be dropped."""
        k, v = k[self.dropped[b] :], v[self.dropped[b] :]
        entry: Any = self.entries[b]
        at = self.leftpad[b] + torch.arange(len(k))
        if self.page_size:
            entry, at = self.table[entry].long()[at // self.page_size], at % self.page_size
        self.k[entry, at], self.v[entry, at] = k, v

    def arguments(self, sequences: Several[int], seqlens: Several[int]) -> dict[str, Any]:
        """Of flash_attn_with_kvcache, for these sequences, which have so many keys."""
        entries = [self.entries[b] for b in sequences]
        leftpad = [self.leftpad[b] for b in sequences]
        chosen: dict[str, Any] = {"k_cache": self.k, "v_cache": self.v}
        dropped = [self.dropped[b] for b in sequences]
        kept = [n - gone for n, gone in zip(seqlens, dropped, strict=True)]
        chosen["cache_seqlens"] = ints(*(a + b for a, b in zip(leftpad, kept, strict=True)))
        if any(dropped):
            chosen["cache_start"] = ints(*dropped)
        if self.page_size:
            chosen["page_table"] = self.table[entries]
        else:
            chosen["cache_batch_idx"] = ints(*entries)
        if any(leftpad):
            chosen["cache_leftpad"] = ints(*leftpad)
        return chosen


def schedule(draw: Any, batch_size: int) -> dict[str, Any]:
    """What may change when a number is computed, and never the number."""
    chosen: dict[str, Any] = {"num_splits": draw(st.integers(0, 40))}
    chosen["pack_gqa"] = draw(st.sampled_from([None, False, True]))
    if draw(st.booleans()):
        parts = draw(st.lists(st.integers(0, 9), min_size=batch_size, max_size=batch_size))
        chosen["scheduler_metadata"] = ints(*parts)
    return chosen


def some_threads(draw: Any) -> Any:
    return threads(draw(st.integers(1, 8)))


def queries(draw: Any, batch: Several[Sequence]) -> tuple[Rows, dict[str, Any]]:
    """q and qv of a batch, as flash_attn_with_kvcache takes them."""
    rows = Rows.any(draw, [s.seqlen_q for s in batch])
    chosen: dict[str, Any] = {"q": rows.tensor(draw, [s.q for s in batch])}
    if rows.bounds is not None:
        slack = draw(st.sampled_from([0, 1, 1000]))
        chosen |= {"cu_seqlens_q": rows.cu_seqlens, "max_seqlen_q": max(rows.lengths) + slack}
    qv = [s.qv for s in batch if s.qv is not None]
    return rows, chosen | ({"qv": rows.tensor(draw, qv)} if qv else {})


# ---- Forward -----------------------------------------------------------------------------------


class TestForward:
    @examples(50)
    @given(batches())
    def test_alone_is_exact(self, sequences: list[Sequence]) -> None:
        """What all others are compared with."""
        for s in sequences:
            arguments = {name: x[None] for name, x in s.own.items()} | s.options
            qv = None if s.qv is None else s.qv[None]
            want_out, want_lse = reference.batched(
                s.q[None], s.k[None], s.v[None], qv=qv, **arguments
            )
            # A score's error grows with the scores, and is the weights' relative error.
            headdim = s.q.shape[-1] + (0 if s.qv is None else s.qv.shape[-1])
            size = max(1, abs(s.options.get("softmax_scale") or 0) * headdim**0.5)
            assert_exact(s.expected[0], want_out[0], s.q.dtype, largest_error(s.q.dtype) * size)
            assert_lse(s.expected[1], want_lse[0], 3e-5 * size)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("d", [*range(1, 9), 64])
    def test_last_rows_alone(self, d: int, dtype: torch.dtype) -> None:
        """Small products, whose multiply-adds a compiler would fuse in one loop and not another."""
        torch.manual_seed(0)
        for seqlen, nheads in itertools.product((3, 17, 70, 1100), (1, 4)):
            q, k, v = (torch.randn(1, seqlen, n, d).to(dtype) for n in (nheads, 1, 1))
            whole, whole_lse = fa3_ops.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
            for rows in (1, 2, 5, 16, 17):
                out, softmax_lse = fa3_ops.flash_attn_func(
                    q[:, -rows:], k, v, causal=True, return_attn_probs=True
                )
                assert torch.equal(out, whole[:, -rows:])
                assert torch.equal(softmax_lse, whole_lse[:, :, -rows:])

    def test_table_before_the_first_key(self) -> None:
        """Steps of keys that a cache has dropped read no page: here none lies there."""
        program = """if True:
            import torch, fa3_ops
            from sample_inputs import ints
            q, k = torch.ones(1, 1, 4, 32), torch.ones(16, 1, 2, 32)
            table = torch.full((4, 16), 2**30, dtype=torch.int32)
            table[3] = torch.arange(16)
            out = fa3_ops.flash_attn_with_kvcache(
                q, k, k, page_table=table, cache_batch_idx=ints(3), cache_start=ints(49),
                causal=True,
            )
            assert torch.equal(out, q)
        """
        done = python("-c", program, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr

    @examples(100)
    @given(batches(), st.data())
    def test_in_any_batch(self, sequences: list[Sequence], data: Any) -> None:
        """Training: packed and padded batches of flash_attn_varlen_func."""
        batch = company(data.draw, sequences)
        layout = data.draw(st.sampled_from([Rows.packed, Rows.padded]))
        most_unused = data.draw(st.sampled_from([0, 70]))
        q_rows = layout(data.draw, [s.seqlen_q for s in batch], most_unused)
        k_rows = layout(data.draw, [s.seqlen_k for s in batch], most_unused)
        slack = data.draw(st.sampled_from([0, 1, 1000]))
        qv = [s.qv for s in batch if s.qv is not None]
        metadata = schedule(data.draw, len(batch))
        with some_threads(data.draw):
            out, softmax_lse = fa3_ops.flash_attn_varlen_func(
                q_rows.tensor(data.draw, [s.q for s in batch]),
                k_rows.tensor(data.draw, [s.k for s in batch]),
                k_rows.tensor(data.draw, [s.v for s in batch]),
                *(q_rows.cu_seqlens, k_rows.cu_seqlens),
                *(max(rows.lengths) + most_unused + slack for rows in (q_rows, k_rows)),
                seqused_q=ints(*q_rows.lengths),
                seqused_k=ints(*k_rows.lengths),
                qv=q_rows.tensor(data.draw, qv) if qv else None,
                **together(batch),
                **metadata,
                return_attn_probs=True,
            )
        for b, s in enumerate(batch):
            s.assert_same(q_rows.part(out, b), q_rows.lse_part(softmax_lse, b))

    @examples(40)
    @given(batches(["many keys"]))
    def test_threads_share_keys(self, sequences: list[Sequence]) -> None:
        everything = {"window_size": (-1, -1), "attention_chunk": 0}
        s = replace(sequences[0], options=sequences[0].options | everything)
        for count in (2, 3, 5, 8):
            s.assert_same(*s.alone(count))

    @examples(60)
    @given(batches(), st.data())
    def test_dense_batch(self, sequences: list[Sequence], data: Any) -> None:
        """Training: flash_attn_func."""
        s = sequences[0]
        other = stranger(s, s.seqlen_q, s.seqlen_k)
        batch = data.draw(st.lists(st.sampled_from([s, s, other]), min_size=1, max_size=4))
        q, k, v = (
            memory(data.draw, (len(batch), *x[0].shape), x[0].dtype).copy_(torch.stack(x))
            for x in ([s.q for s in batch], [s.k for s in batch], [s.v for s in batch])
        )
        qv = [s.qv for s in batch if s.qv is not None]
        with some_threads(data.draw):
            out, softmax_lse = fa3_ops.flash_attn_func(
                *(q, k, v),
                qv=torch.stack(qv) if qv else None,
                num_splits=data.draw(st.integers(0, 40)),
                **together(batch),
                return_attn_probs=True,
            )
        for b, s in enumerate(batch):
            s.assert_same(out[b], softmax_lse[b])

    @examples(150)
    @given(batches(), st.data())
    def test_cached_keys(self, sequences: list[Sequence], data: Any) -> None:
        """All keys are in the cache, and the last rows of q attend to them: all, some, or one."""
        whole = company(data.draw, sequences)
        most = data.draw(st.sampled_from([1, 1, 9, 10000]))
        begins = [max(s.seqlen_q - most, 0) for s in whole]
        batch = [s.rows(begin, s.seqlen_q) for s, begin in zip(whole, begins, strict=True)]
        cache = Cache(data.draw, batch)
        if data.draw(st.booleans()):
            cache.drop(data.draw, batch)
        for b, s in enumerate(batch):
            cache.write(b, s.k, s.v)
        rows, arguments = queries(data.draw, batch)
        arguments |= cache.arguments(range(len(batch)), [s.seqlen_k for s in batch])
        arguments |= together(batch) | schedule(data.draw, len(batch))
        with some_threads(data.draw):
            out, softmax_lse = fa3_ops.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
        for b, (s, begin) in enumerate(zip(whole, begins, strict=True)):
            s.assert_same(rows.part(out, b), rows.lse_part(softmax_lse, b), begin)

    @examples(150)
    @given(batches(suffix=True), st.data())
    def test_appended_keys(self, sequences: list[Sequence], data: Any) -> None:
        """Behind what is cached of each sequence, if anything, its keys are appended: all at once,
        in chunks, or token by token, with whichever other sequences are there."""
        draw = data.draw
        raw = batch = company(draw, sequences, suffix=True)
        table: dict[str, Any] = {}
        if raw[0].q.shape[2] > 1 and draw(st.booleans()):
            rotary_dim = 2 * draw(st.integers(1, raw[0].q.shape[2] // 2))
            cos, sin = rotary(max(s.seqlen_k for s in raw) + 1, rotary_dim, raw[0].q.dtype)
            interleaved = draw(st.booleans())
            table = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
            batch = [s.rotated(cos, sin, interleaved) for s in raw]
        begins = [s.prefix for s in batch]
        cache = Cache(draw, batch)
        for b, s in enumerate(batch):
            cache.write(b, s.k[: s.prefix], s.v[: s.prefix])
        steps = draw(st.integers(1, 5))
        cuts = [appends(draw, s, steps) for s in batch]
        for step in range(steps):
            ends = [cut[step] for cut in cuts]
            present = draw(st.permutations(range(len(batch))))
            if draw(st.booleans()):
                present = [b for b in present if ends[b] > begins[b]] or present
            parts = [
                raw[b].rows(begins[b] - raw[b].prefix, ends[b] - raw[b].prefix) for b in present
            ]
            new = Rows.any(draw, [s.seqlen_q for s in parts])
            k, v = (
                new.tensor(draw, [x[begins[b] : ends[b]] for b, x in zip(present, xs, strict=True)])
                for xs in ([s.k for s in parts], [s.v for s in parts])
            )
            rows, arguments = queries(draw, parts)
            arguments |= cache.arguments(present, [begins[b] for b in present])
            arguments |= {"k": k, "v": v, "cu_seqlens_k_new": new.cu_seqlens}
            arguments |= together(parts) | schedule(draw, len(parts))
            if table:
                arguments |= table | {"rotary_seqlens": ints(*(begins[b] for b in present))}
            with some_threads(draw):
                out, softmax_lse = fa3_ops.flash_attn_with_kvcache(
                    **arguments, return_softmax_lse=True
                )
            for i, b in enumerate(present):
                at = begins[b] - batch[b].prefix
                batch[b].assert_same(rows.part(out, i), rows.lse_part(softmax_lse, i), at)
            begins = ends

    @examples(80)
    @given(batches(), st.data())
    def test_unseen_keys(self, sequences: list[Sequence], data: Any) -> None:
        """Rows that do not see a key keep their bits, whatever it holds."""
        for s in sequences:
            begin = max(s.seqlen_q - data.draw(st.sampled_from([1, 9, 10000])), 0)
            bad = some(data.draw, s.seqlen_k)
            kept = ~s.mask[begin:, bad].any(1)
            out, softmax_lse = spoilt(data.draw, s, bad).rows(begin, s.seqlen_q).expected
            assert torch.equal(out[kept], s.expected[0][begin:][kept])
            assert torch.equal(softmax_lse[:, kept], s.expected[1][:, begin:][:, kept])


def appends(draw: Any, s: Sequence, steps: int) -> list[int]:
    """How many keys the sequence has after each step; all of them after the last one."""
    last = s.seqlen_k
    if draw(st.booleans()):  # token by token, after the first step
        return [max(last - i, s.prefix) for i in reversed(range(steps))]
    cuts = st.lists(st.integers(s.prefix, last), min_size=steps - 1, max_size=steps - 1)
    return [*sorted(draw(cuts)), last]


def some(draw: Any, length: int) -> Tensor:
    """(length,) bool: true in some places, from somewhere on or up to there."""
    chosen = torch.arange(length) >= draw(st.integers(0, length))
    if draw(st.booleans()):
        chosen = chosen.flip(0)
    if draw(st.booleans()):
        chosen &= torch.rand(length) < 0.1
    return chosen


def bad(draw: Any, x: Tensor, rows: Tensor) -> Tensor:
    """x with NaN, an infinity or the largest number in these rows."""
    largest = torch.finfo(x.dtype).max if x.is_floating_point() else 127.0
    worst = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), largest]))
    return torch.where(rows[:, None, None], narrowed(torch.tensor(worst), x.dtype), x)


def spoilt(draw: Any, s: Sequence, keys: Tensor) -> Sequence:
    """The sequence with anything in these rows of k, v, or both."""
    which = draw(st.sampled_from(["k", "v", "kv"]))
    k, v = (bad(draw, x, keys) if name in which else x for name, x in (("k", s.k), ("v", s.v)))
    return replace(s, k=k, v=v)


# ---- Backward ----------------------------------------------------------------------------------


class TestBackward:
    @examples(70)
    @given(batches(backward=True), st.data())
    def test_in_any_batch(self, sequences: list[Sequence], data: Any) -> None:
        draw, batch = data.draw, company(data.draw, sequences)
        layout = draw(st.sampled_from([Rows.packed, Rows.padded]))
        most_unused = draw(st.sampled_from([0, 70]))
        q_rows = layout(draw, [s.seqlen_q for s in batch], most_unused)
        k_rows = layout(draw, [s.seqlen_k for s in batch], most_unused)
        inputs = [
            q_rows.tensor(draw, [s.q for s in batch]).requires_grad_(),
            k_rows.tensor(draw, [s.k for s in batch]).requires_grad_(),
            k_rows.tensor(draw, [s.v for s in batch]).requires_grad_(),
        ]
        dout = q_rows.tensor(draw, [s.output_gradients[0] for s in batch])
        dlse = q_rows.tensor(draw, [s.output_gradients[1].T[..., None] for s in batch])
        with some_threads(draw):
            outputs = fa3_ops.flash_attn_varlen_func(
                *inputs,
                *(q_rows.cu_seqlens, k_rows.cu_seqlens),
                *(max(rows.lengths) + most_unused for rows in (q_rows, k_rows)),
                seqused_q=ints(*q_rows.lengths),
                seqused_k=ints(*k_rows.lengths),
                **together(batch),
                return_attn_probs=True,
            )
            grads = torch.autograd.grad(outputs, inputs, (dout, dlse[..., 0].transpose(-1, -2)))
        for b, s in enumerate(batch):
            if not isinstance(s, Stranger):
                for rows, got, want in zip(
                    (q_rows, k_rows, k_rows), grads, s.gradients, strict=True
                ):
                    assert torch.equal(rows.part(got, b), want)

    @examples(50)
    @given(batches(backward=True), st.data())
    def test_unseen_rows_and_keys(self, sequences: list[Sequence], data: Any) -> None:
        """What rows and keys hold reaches only the gradients that depend on them."""
        for s in sequences:
            keys, rows = some(data.draw, s.seqlen_k), some(data.draw, s.seqlen_q)
            where = data.draw(st.sampled_from(["keys", "q", "dout"]))
            dout, dlse = s.output_gradients
            if where == "keys":
                changed = spoilt(data.draw, s, keys)
                rows = s.mask[:, keys].any(1)
            else:
                changed = replace(s, q=bad(data.draw, s.q, rows)) if where == "q" else replace(s)
                dout = bad(data.draw, dout, rows) if where == "dout" else dout
                keys = torch.zeros_like(keys)
            changed.output_gradients = dout, dlse
            kept = ~(keys | s.mask[rows].any(0))
            for got, want, same in zip(
                changed.gradients, s.gradients, (~rows, kept, kept), strict=True
            ):
                assert torch.equal(got[same], want[same])
