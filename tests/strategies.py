"""Random calls for hypothesis: any features together, odd sizes, strided and poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from sample_inputs import rotary
from torch import Tensor

from fa3_ops import reference

FORWARD_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
)
# Of caches beside a q of one of these.
NARROW_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
WIDE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT8_UNIT = 1 / 32  # a number of an int8 cache, before its descale
SIZES = st.integers(1, 40)
HEADDIMS = st.tuples(SIZES, SIZES)  # (headdim, headdim_v)
# Rounded once from float32: half an ulp of the result, plus float32's own error.
RELATIVE = {
    torch.float64: 1e-6,
    torch.float32: 1e-6,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-8,
}


def examples(count: int) -> settings:
    """So many random calls; fewer where FA3NPU_TEST_SHARE, in percent, asks for a short run."""
    share = int(os.environ.get("FA3NPU_TEST_SHARE", "100"))
    return settings(max_examples=max(count * share // 100, 1), deadline=None, print_blob=True)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def largest_error(dtype: torch.dtype) -> float:
    """What float32 sums add to the rounding of the result, of normally distributed values.

    Where products of bfloat16 are instructions, P is rounded to it: half an ulp of every value.
    """
    if dtype == torch.bfloat16 and torch.ops.fa3npu.cpu_capability() in ("AMX", "AVX512_BF16"):
        return 5 * 2.0**-9
    return 3e-5


def assert_exact(got: Tensor, want: Tensor, dtype: torch.dtype, slack: float | None = None) -> None:
    """Within one rounding of the float64 result; `slack` is the absolute part."""
    assert got.shape == want.shape
    assert not got.isnan().any()
    slack = largest_error(dtype) if slack is None else slack
    torch.testing.assert_close(got.double(), want, rtol=RELATIVE[dtype], atol=slack)


def assert_lse(got: Tensor, want: Tensor, slack: float | None = None) -> None:
    assert got.dtype == torch.float32
    slack = 3e-5 if slack is None else slack
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=slack)


LAYOUTS = (
    *("contiguous", "padded", "heads first", "first strided", "side by side", "last strided"),
)


def memory(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, any_last: bool = True) -> Tensor:
    """A view of something larger that holds NaN; the last stride is 1 unless any_last."""
    layout = draw(st.sampled_from(LAYOUTS if any_last else LAYOUTS[:-1]))

    def nan(*size: int) -> Tensor:
        return narrowed(torch.full(size, float("nan")), dtype)

    if layout == "padded":
        wide = nan(*shape[:-2], shape[-2] + 1, shape[-1] + 3)
        return wide[..., 1:, 1 : shape[-1] + 1]
    if layout == "heads first":
        return nan(*shape[:-3], shape[-2], shape[-3], shape[-1]).transpose(-3, -2)
    if layout == "first strided":  # as K and V of one cache, (num_pages, 2, ...)
        return nan(shape[0], 2, *shape[1:])[:, 1]
    if layout == "side by side":  # (num_pages, nheads_k, page_size, headdim + headdim_v)
        wide = nan(*shape[:-3], shape[-2], shape[-3], 2 * shape[-1] + 1)
        return wide.transpose(-3, -2)[..., : shape[-1]]
    if layout == "last strided":
        return nan(*shape[:-1], 2 * shape[-1])[..., ::2]
    return nan(*shape)


def tensor(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, any_last: bool = True) -> Tensor:
    return memory(draw, shape, dtype, any_last).copy_(narrowed(torch.randn(shape), dtype))


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype, of int8 in its units; there is no NaN among them: the greatest number stands for
    it."""
    if dtype == torch.int8:
        x = (x / INT8_UNIT).nan_to_num(127).round().clamp(-128, 127)
    return x.to(dtype)


def cache_dtype(draw: Any, dtype: torch.dtype) -> torch.dtype:
    """Of k and v beside a q of dtype: mostly the same."""
    narrow = dtype in WIDE_DTYPES and draw(st.sampled_from([False, False, True]))
    return draw(st.sampled_from(NARROW_DTYPES)) if narrow else dtype


def lengths(draw: Any, batch: int, most: int) -> Tensor:
    """int32 lengths, now and then strided."""
    values = draw(st.lists(st.integers(0, most), min_size=batch, max_size=batch))
    if draw(st.booleans()):
        return torch.tensor(values, dtype=torch.int32)
    return torch.tensor([x for v in values for x in (v, -1)], dtype=torch.int32)[::2]


def cumulative(seqlens: Tensor, first: int = 0) -> Tensor:
    return torch.cat([torch.tensor([first]), first + seqlens.cumsum(0)]).to(torch.int32)


def masks(draw: Any, most: int = 45) -> dict[str, Any]:
    side = st.integers(-1, most)
    return {
        "causal": draw(st.booleans()),
        "window_size": draw(st.one_of(st.just((-1, -1)), st.tuples(side, side))),
        "attention_chunk": draw(st.one_of(st.just(0), st.integers(1, most + 5))),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])),
        "softmax_scale": draw(st.sampled_from([None, None, 0.37, -0.2])),
    }


def extras(
    draw: Any,
    batch: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    cache: torch.dtype | None = None,
) -> dict[str, Any]:
    nheads, nheads_k = heads
    chosen: dict[str, Any] = {}
    kind = draw(st.sampled_from(["none", "(h,)", "(b, h)"]))
    if kind != "none":
        shape = (nheads,) if kind == "(h,)" else (batch, nheads)
        chosen["alibi_slopes"] = torch.rand(shape)
    if draw(st.booleans()):
        chosen["sinks"] = torch.randn(nheads).to(draw(st.sampled_from([torch.float32, dtype])))
        if dtype == torch.float8_e4m3fn:
            chosen["sinks"] = chosen["sinks"].to(torch.bfloat16)
    # Serving code passes descales whatever the dtype is; they count for narrow ones alone.
    for name in ("q_descale", "k_descale", "v_descale"):
        if cache == torch.int8 or draw(st.booleans()):
            chosen[name] = descale(draw, batch, nheads_k)
            if cache == torch.int8:
                chosen[name] *= INT8_UNIT
    return chosen


def descale(draw: Any, batch: int | None, nheads_k: int) -> Tensor:
    """In any of its shapes, now and then strided; without a batch for all sequences."""
    shapes: list[tuple[int, ...]] = [(nheads_k,), (1,), ()]
    if batch is not None:
        shapes.append((batch, nheads_k))
    shape = draw(st.sampled_from(shapes))
    factors = 0.5 + torch.rand(*shape, 2) / 2
    return factors[..., 0] if draw(st.booleans()) else factors[..., 0].contiguous()


def heads(draw: Any) -> tuple[int, int]:
    nheads_k = draw(st.integers(1, 3))
    return nheads_k * draw(st.sampled_from([1, 2, 3, 7])), nheads_k


@st.composite
def dense_calls(
    draw: Any,
    dtypes: tuple[torch.dtype, ...] = FORWARD_DTYPES,
    headdims: st.SearchStrategy[tuple[int, int]] = HEADDIMS,
    narrow: bool = True,
) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    batch, seqlen_q, seqlen_k = draw(st.integers(0, 3)), draw(st.integers(0, 40)), draw(SIZES)
    (nheads, nheads_k), (d, dv) = heads(draw), draw(headdims)
    of_keys = cache_dtype(draw, dtype) if narrow else dtype
    call = {
        "q": tensor(draw, (batch, seqlen_q, nheads, d), dtype),
        "k": tensor(draw, (batch, seqlen_k, nheads_k, d), of_keys),
        "v": tensor(draw, (batch, seqlen_k, nheads_k, dv), of_keys),
        **masks(draw),
        **extras(draw, batch, (nheads, nheads_k), dtype, of_keys),
    }
    if draw(st.booleans()):
        call["qv"] = tensor(draw, (batch, seqlen_q, nheads, dv), dtype)
    return call


@st.composite
def varlen_calls(
    draw: Any,
    dtypes: tuple[torch.dtype, ...] = FORWARD_DTYPES,
    headdims: st.SearchStrategy[tuple[int, int]] = HEADDIMS,
    narrow: bool = True,
) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, batch = draw(st.sampled_from(dtypes)), draw(st.integers(0, 4))
    (nheads, nheads_k), (d, dv) = heads(draw), draw(headdims)
    seqlens_q, seqlens_k = lengths(draw, batch, 40), lengths(draw, batch, 70)
    # A serving engine passes a slice: the first offset need not be 0, the last not the end.
    cu_seqlens_q = cumulative(seqlens_q, draw(st.integers(0, 2)))
    cu_seqlens_k = cumulative(seqlens_k, draw(st.integers(0, 2)))
    total_q = int(cu_seqlens_q[-1]) + draw(st.integers(0, 2))
    total_k = int(cu_seqlens_k[-1]) + draw(st.integers(0, 2))
    of_keys = cache_dtype(draw, dtype) if narrow else dtype
    call = {
        "q": tensor(draw, (total_q, nheads, d), dtype),
        "k": tensor(draw, (total_k, nheads_k, d), of_keys),
        "v": tensor(draw, (total_k, nheads_k, dv), of_keys),
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        **masks(draw),
        **extras(draw, batch, (nheads, nheads_k), dtype, of_keys),
    }
    if draw(st.booleans()):
        call["qv"] = tensor(draw, (total_q, nheads, dv), dtype)
    if draw(st.booleans()):
        call["seqused_q"] = (torch.rand(batch) * (seqlens_q + 1)).int()
    if draw(st.booleans()):
        call["seqused_k"] = (torch.rand(batch) * (seqlens_k + 1)).int()
    return call


@st.composite
def kvcache_calls(
    draw: Any,
    dtypes: tuple[torch.dtype, ...] = FORWARD_DTYPES,
    headdims: st.SearchStrategy[tuple[int, int]] = HEADDIMS,
    narrow: bool = True,
    most_keys: int = 90,
) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, batch = draw(st.sampled_from(dtypes)), draw(st.integers(0, 4))
    (nheads, nheads_k), (d, dv) = heads(draw), draw(headdims)
    capacity = draw(st.integers(1, most_keys))
    entries = batch + draw(st.integers(0, 2))
    appends = draw(st.booleans())
    of_keys = cache_dtype(draw, dtype) if narrow else dtype
    call: dict[str, Any] = {
        **masks(draw),
        **extras(draw, batch, (nheads, nheads_k), dtype, of_keys),
    }

    if entries > batch or draw(st.booleans()):
        call["cache_batch_idx"] = torch.randperm(entries)[:batch].int()
    if draw(st.booleans()):
        page_size = draw(st.integers(1, 20))
        per_row = -(-capacity // page_size)
        capacity = per_row * page_size
        pages = entries * per_row + draw(st.integers(0, 3))
        table = torch.full((entries, per_row + 2), -1, dtype=torch.int32)  # a strided table
        table[:, :per_row] = torch.randperm(pages)[: entries * per_row].view(entries, per_row)
        call["page_table"] = table[:, :per_row]
        rows = (pages, page_size)
    else:
        rows = (entries, capacity)
    k_cache = tensor(draw, (*rows, nheads_k, d), of_keys, any_last=False)
    v_cache = tensor(draw, (*rows, nheads_k, dv), of_keys, any_last=False)

    new_lengths = torch.zeros(batch, dtype=torch.int32)
    if appends:
        if draw(st.booleans()):
            new_lengths = lengths(draw, batch, capacity)
            call["cu_seqlens_k_new"] = cumulative(new_lengths)
            new: tuple[int, ...] = (int(new_lengths.sum()),)
        else:
            new = (batch, draw(st.integers(0, capacity)))
            new_lengths = torch.full((batch,), new[1], dtype=torch.int32)
        call["k"] = tensor(draw, (*new, nheads_k, d), dtype)
        call["v"] = tensor(draw, (*new, nheads_k, dv), dtype)
    cache_seqlens = (torch.rand(batch) * (capacity - new_lengths + 1)).int()
    call["cache_seqlens"] = cache_seqlens
    if draw(st.booleans()):
        call["cache_leftpad"] = (torch.rand(batch) * (cache_seqlens + 1)).int()
    dropped = draw(st.sampled_from([0, 0, 40, 3000]))
    if dropped:
        call["cache_start"] = lengths(draw, batch, dropped)

    seqlen_q = draw(st.integers(0, 20))
    if draw(st.booleans()):
        seqlens_q = lengths(draw, batch, seqlen_q)
        call["cu_seqlens_q"] = cumulative(seqlens_q)
        call["max_seqlen_q"] = seqlen_q + draw(st.integers(0, 5))
        q_rows: tuple[int, ...] = (int(call["cu_seqlens_q"][-1]),)
    else:
        q_rows = (batch, seqlen_q)
        seqlens_q = torch.full((batch,), seqlen_q, dtype=torch.int32)
    if draw(st.booleans()):
        call["seqused_q"] = (torch.rand(batch) * (seqlens_q + 1)).int()
    call["q"] = tensor(draw, (*q_rows, nheads, d), dtype)
    if draw(st.booleans()):
        call["qv"] = tensor(draw, (*q_rows, nheads, dv), dtype)

    if "k" in call and d >= 2 and draw(st.booleans()):
        rotary_dim = 2 * draw(st.integers(1, d // 2))
        positions = capacity + 20 + 90 + dropped
        tables = draw(st.sampled_from([dtype, torch.float32]))
        call["rotary_cos"], call["rotary_sin"] = rotary(positions, rotary_dim, tables)
        call["rotary_interleaved"] = draw(st.booleans())
        if draw(st.booleans()):
            call["rotary_seqlens"] = lengths(draw, batch, 20)

    # What no sequence owns is NaN: it must reach nothing.
    owned_k = torch.zeros(rows, dtype=torch.bool)
    for b in range(batch):
        entry = int(call["cache_batch_idx"][b]) if "cache_batch_idx" in call else b
        first = int(call["cache_leftpad"][b]) if "cache_leftpad" in call else 0
        at = torch.arange(first, int(cache_seqlens[b]))
        if "page_table" in call:
            owned_k[call["page_table"][entry].long()[at // rows[1]], at % rows[1]] = True
        else:
            owned_k[entry, at] = True
    call["k_cache"] = k_cache.copy_(poison(k_cache, owned_k))
    call["v_cache"] = v_cache.copy_(poison(v_cache, owned_k))
    return call


@st.composite
def scatter_calls(draw: Any) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    cached = draw(st.sampled_from((*FORWARD_DTYPES, *NARROW_DTYPES)))
    narrow = cached in NARROW_DTYPES and draw(st.booleans())
    dtype = draw(st.sampled_from(WIDE_DTYPES)) if narrow else cached
    nheads_k, (d, dv) = draw(st.integers(1, 4)), draw(HEADDIMS)
    entries, rows = draw(st.integers(0, 5)), draw(st.integers(1, 20))
    if draw(st.booleans()):  # as vLLM has them: one tensor, heads before rows
        both = filled((entries, nheads_k, rows, d + dv), cached).transpose(1, 2)
        k_cache, v_cache = both[..., :d], both[..., d:]
    else:
        k_cache, v_cache = (filled((entries, rows, nheads_k, width), cached) for width in (d, dv))
    slots = torch.randperm(entries * rows)[: draw(st.integers(0, 40))]
    slots = slots.masked_fill(torch.rand(slots.shape) < 0.2, -draw(st.sampled_from((1, 2**31))))
    slots = slots.to(draw(st.sampled_from((torch.int32, torch.int64))))
    count = len(slots) + draw(st.integers(0, 3))
    return {
        "k": tensor(draw, (count, nheads_k, d), dtype),
        "v": tensor(draw, (count, nheads_k, dv), dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": slots,
        **descales_of_writes(draw, None, nheads_k),
    }


def descales_of_writes(draw: Any, batch: int | None, nheads_k: int) -> dict[str, Tensor]:
    """Under which most numbers of an int8 cache differ."""
    names = draw(st.sets(st.sampled_from(("k_descale", "v_descale"))))
    return {name: descale(draw, batch, nheads_k) * INT8_UNIT for name in sorted(names)}


@st.composite
def narrow_append_calls(draw: Any, most_rows: int = 9) -> dict[str, Any]:
    """To a narrow cache of pages of so many rows."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, cached = draw(st.sampled_from(WIDE_DTYPES)), draw(st.sampled_from(NARROW_DTYPES))
    batch, nheads_k, (d, dv) = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(HEADDIMS)
    rows, per_row = draw(st.integers(1, most_rows)), 3
    new_lengths = lengths(draw, batch, rows * per_row)
    call: dict[str, Any] = {"cu_seqlens_k_new": cumulative(new_lengths)}
    count: tuple[int, ...] = (int(new_lengths.sum()),)
    if draw(st.booleans()):
        new_lengths = torch.full((batch,), draw(st.integers(0, rows)), dtype=torch.int32)
        call, count = {}, (batch, int(new_lengths[0]))
    if d >= 2 and draw(st.booleans()):
        call["rotary_cos"], call["rotary_sin"] = rotary(rows * per_row, 2 * (d // 2), dtype)
    return call | {
        "k": tensor(draw, (*count, nheads_k, d), dtype),
        "v": tensor(draw, (*count, nheads_k, dv), dtype),
        "k_cache": filled((batch * per_row, rows, nheads_k, d), cached),
        "v_cache": filled((batch * per_row, rows, nheads_k, dv), cached),
        "cache_seqlens": (torch.rand(batch) * (rows * per_row - new_lengths + 1)).int(),
        "page_table": torch.randperm(batch * per_row).int().view(batch, per_row),
        **descales_of_writes(draw, batch, nheads_k),
    }


LINEAR_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LINEAR_ROWS = (0, 1, 2, 3, 4, 5, 16, 17, 33, 70, 130)
LINEAR_COLUMNS = (0, 1, 2, 7, 16, 47, 49, 97, 130)
LINEAR_DEPTHS = (0, 1, 2, 3, 8, 15, 17, 32, 100, 511, 513, 1024, 1030, 2050)


@st.composite
def linear_calls(
    draw: Any,
    dtypes: tuple[torch.dtype, ...] = LINEAR_DTYPES,
    most_rows: int = 130,
    most_depth: int = 2050,
) -> dict[str, Any]:
    """In memory of any strides, with NaN around."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, columns = draw(st.sampled_from(dtypes)), draw(st.sampled_from(LINEAR_COLUMNS))
    rows = draw(st.sampled_from([n for n in LINEAR_ROWS if n <= most_rows]))
    depth = draw(st.sampled_from([n for n in LINEAR_DEPTHS if n <= most_depth]))

    def matrix(*shape: int) -> Tensor:
        if draw(st.booleans()):
            return tensor(draw, (1, *shape[::-1]), dtype)[0].t()
        return tensor(draw, (1, *shape), dtype)[0]

    bias = draw(st.sampled_from([None, (columns,)]))
    return {
        "x": matrix(rows, depth),
        "weight": matrix(columns, depth),
        "bias": None if bias is None else tensor(draw, (1, 1, columns), dtype)[0, 0],
    }


def assert_neighbours(got: Tensor, want: Tensor) -> None:
    """Of 8 bits: a rotation in float32 may round otherwise than one in float64, one code up or
    down."""
    steps = []
    for x in (got, want):
        code = x.view(torch.int8).int()
        negative = code if x.dtype == torch.int8 else -(code & 127)
        steps.append(torch.where(code < 0, negative, code))
    assert (steps[0] - steps[1]).abs().le(1).all()


def assert_linear(got: Tensor, call: dict[str, Any]) -> None:
    """Within one rounding of float64's result and float32's error in the sum of the products."""
    want, dtype = reference.linear(**call), call["x"].dtype
    assert got.dtype == dtype
    assert got.is_contiguous()
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    sizes = reference.linear(**{name: None if x is None else x.abs() for name, x in call.items()})
    # A bound for a sum of blocks that were summed by lanes, not for one sum of 2050 products.
    error = (got.double() - want).abs() - RELATIVE[dtype] * want.abs() - 100 * unit * sizes
    assert error.numel() == 0 or error.max() <= 0


# The arguments of kvcache_append_ among those of flash_attn_with_kvcache.
OF_APPENDS = (
    *("k", "v", "k_cache", "v_cache", "cache_seqlens", "cache_batch_idx", "page_table"),
    *("cu_seqlens_k_new", "rotary_cos", "rotary_sin", "rotary_seqlens", "rotary_interleaved"),
    *("k_descale", "v_descale"),
)


@st.composite
def append_calls(
    draw: Any, dtypes: tuple[torch.dtype, ...] = FORWARD_DTYPES, most_keys: int = 90
) -> dict[str, Any]:
    """Of kvcache_append_."""
    call = draw(kvcache_calls(dtypes, most_keys=most_keys).filter(lambda call: "k" in call))
    return {name: call[name] for name in OF_APPENDS if name in call}


@st.composite
def rotary_calls(draw: Any, dtypes: tuple[torch.dtype, ...] = FORWARD_DTYPES) -> dict[str, Any]:
    """Of apply_rotary; packed rows also of no sequence."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype, batch, most = draw(st.sampled_from(dtypes)), draw(st.integers(1, 4)), 9
    nheads, d, seqlen = (
        draw(st.integers(1, 9)),
        draw(st.integers(2, 40)),
        draw(st.integers(0, most)),
    )
    call: dict[str, Any] = {}
    shape: tuple[int, ...] = (batch, seqlen, nheads, d)
    if draw(st.booleans()):
        call["cu_seqlens"] = cumulative(lengths(draw, batch, most), draw(st.integers(0, 2)))
        shape = (int(call["cu_seqlens"][-1]) + draw(st.integers(0, 2)), nheads, d)
    tables = draw(st.sampled_from([dtype, torch.float32]))
    cos, sin = rotary(50, 2 * draw(st.integers(1, d // 2)), tables)
    return {
        "x": tensor(draw, shape, dtype),
        "rotary_cos": cos,
        "rotary_sin": sin,
        "rotary_seqlens": lengths(draw, batch, 40),
        "rotary_interleaved": draw(st.booleans()),
        "advance": draw(st.booleans()),
        **call,
    }


@st.composite
def combine_calls(draw: Any) -> dict[str, Any]:
    """Of flash_attn_combine; parts without keys, which say so by either infinity, hold NaN."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = [draw(st.integers(1, most)) for most in (20, 3, 5, 4, 40)]
    if draw(st.booleans()):
        del shape[1]
    lse = tensor(draw, tuple(shape[:-1]), torch.float32)
    lse.mul_(draw(st.sampled_from([1.0, 30.0])))
    empty = torch.rand(lse.shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    lse.masked_fill_(empty, draw(st.sampled_from([float("-inf"), float("inf")])))
    out = tensor(draw, tuple(shape), torch.float32)
    return {
        "out_partial": out.masked_fill_(empty[..., None], float("nan")),
        "lse_partial": lse,
        "out_dtype": draw(st.sampled_from([None, torch.float32, torch.float16])),
    }


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """With numbers that tell one place from another."""
    return (torch.rand(shape) * 100).to(dtype)


def row_counts(x: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    return [x.shape[1]] * x.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()


def hide_pages(call: dict[str, Any]) -> None:
    """Gives the pages that no row of q sees and no key is written to an id that is none."""
    if "page_table" not in call:
        return
    seqlens_q = row_counts(call["q"], call.get("cu_seqlens_q"))
    old = call["cache_seqlens"].tolist()
    new = row_counts(call["k"], call.get("cu_seqlens_k_new")) if "k" in call else [0] * len(old)
    needed = torch.zeros(call["page_table"].shape, dtype=torch.bool)
    defaults = {"causal": False, "window_size": (-1, -1), "attention_chunk": 0}
    masks = [call.get(name, default) for name, default in defaults.items()]
    for b, seqlen_q in enumerate(seqlens_q):
        rows = int(call["seqused_q"][b]) if "seqused_q" in call else seqlen_q
        entry = int(call["cache_batch_idx"][b]) if "cache_batch_idx" in call else b
        first = int(call["cache_leftpad"][b]) if "cache_leftpad" in call else 0
        total = old[b] + new[b]
        start = int(call["cache_start"][b]) if "cache_start" in call else 0
        seen = reference.mask(rows, total - first, *masks, start).any(0).nonzero()[:, 0]
        at = torch.cat((first + seen, torch.arange(old[b], total)))
        needed[entry, at // call["k_cache"].shape[1]] = True
    call["page_table"][~needed] = -7


def poison(cache: Tensor, owned: Tensor) -> Tensor:
    x = torch.where(owned[..., None, None], cache.float(), float("nan"))
    return (x.nan_to_num(127) if cache.dtype == torch.int8 else x).to(cache.dtype)
