"""Random calls through torchair's GE mode against the CPU kernels: the graph that GE would get,
computed by ge_interpreter.py, and torchair's own run_eagerly; static and dynamic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchair
from ge_interpreter import COPIES, Interpreter
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from npu_calls import assert_close, assert_lse, examples_of
from sample_inputs import rand, rotary
from strategies import cumulative, poison
from torch import Tensor

from fa3_ops.backends.npu.capabilities import fused_limits

ops = torch.ops.fa3npu
CAPACITY = 128  # keys of a sequence in a cache
# Every example compiles, so a failing one stays as it was found.
examples = settings(examples_of(8), phases=[p for p in Phase if p is not Phase.shrink])


@dataclass(frozen=True)
class Structure:
    """What a graph is compiled for; the batch size and all lengths may vary."""

    kind: str  # flash_attn_func, flash_attn_varlen_func or flash_attn_with_kvcache
    packed: bool
    rows: int  # of q, the most of a sequence
    dtype: torch.dtype
    heads: tuple[int, int]
    headdims: tuple[int, int]
    page_size: int  # 0: the cache is dense
    append: bool
    rotary_dim: int  # 0: no rotary
    batch_idx: bool
    sinks: bool
    scalars: dict[str, Any]


@st.composite
def structures(draw: Any) -> Structure:
    kind = draw(st.sampled_from(["func", "varlen_func", *["with_kvcache"] * 4]))
    cached = kind == "with_kvcache"
    packed = kind == "varlen_func" or (cached and draw(st.booleans()))
    rows = draw(st.sampled_from([1, 1, 2, 5]))
    window = draw(st.sampled_from([(-1, -1)] * 3 + [(3, 0), (0, -1), (40, 2), (-1, 1)]))
    as_packed = packed or (rows == 1 and window[0] >= 0)
    equal = st.sampled_from([16, 48, 64, 128]).map(lambda d: (d, d))
    causal = draw(st.booleans())
    of_band = {d for d in fused_limits().headdims if d[1] == fused_limits().band_headdim_v}
    of_packed = fused_limits().headdims if causal and window[0] < 0 else of_band
    headdims = draw(st.sampled_from(sorted(of_packed)) if as_packed else equal)
    sizes = [0, 128] if rows > 1 and not packed else [0, 16, 64, 128]
    append = cached and draw(st.sampled_from([True, True, False]))
    rotates = append and draw(st.sampled_from([True, True, False]))
    nheads_k = draw(st.integers(1, 2))
    scalars = {
        "causal": causal,
        "window_size": list(window),
        "softmax_scale": draw(st.sampled_from([None, 0.2])),
    }
    if rotates:
        scalars["rotary_interleaved"] = draw(st.booleans())
    return Structure(
        kind,
        packed,
        rows,
        draw(st.sampled_from([torch.float16, torch.bfloat16])),
        (nheads_k * draw(st.sampled_from([1, 3, 4])), nheads_k),
        headdims,
        draw(st.sampled_from(sizes)) if cached else 0,
        append,
        draw(st.sampled_from([2, headdims[0] // 2, headdims[0]])) if rotates else 0,
        cached and draw(st.booleans()),
        draw(st.booleans()),
        scalars,
    )


def inputs(s: Structure, batch: int) -> dict[str, Tensor]:
    (nheads, nheads_k), (d, d_v) = s.heads, s.headdims
    given = {"sinks": rand(nheads)} if s.sinks else {}
    rows_of = torch.full((batch,), s.rows, dtype=torch.int32)
    if s.packed:
        rows_of = torch.randint(0, s.rows + 1, (batch,), dtype=torch.int32)
        first, behind = torch.randint(0, 3, (2,)).tolist()
        given["cu_seqlens_q"] = cumulative(rows_of, first)
        shape: tuple[int, ...] = (int(given["cu_seqlens_q"][-1]) + behind + 1,)
    else:
        shape = (batch, s.rows)
    given["q"] = rand(*shape, nheads, d, dtype=s.dtype)
    if s.kind == "with_kvcache":
        return given | cache(s, batch, rows_of, shape)
    if s.packed:
        given["cu_seqlens_k"] = cumulative(torch.randint(0, 20, (batch,)))
        shape = (int(given["cu_seqlens_k"][-1]) + 1,)
    else:
        shape = (batch, CAPACITY if s.rows == 1 else 9)
    keys = {"k": rand(*shape, nheads_k, d, dtype=s.dtype)}
    return given | keys | {"v": rand(*shape, nheads_k, d_v, dtype=s.dtype)}


def cache(s: Structure, batch: int, rows_of: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The keys of a cache, what is appended to it, and NaN in the rest of it."""
    nheads_k, (d, d_v) = s.heads[1], s.headdims
    entries = batch + 1 if s.batch_idx else batch
    seqlens = (torch.rand(batch) * (CAPACITY - rows_of + 1)).int()
    chosen = torch.randperm(entries)[:batch].int() if s.batch_idx else torch.arange(batch)
    size = s.page_size or CAPACITY
    per_entry = CAPACITY // size
    table = torch.randperm(entries * per_entry).int().view(entries, per_entry)
    table = table if s.page_size else torch.arange(entries)[:, None]
    owned = torch.zeros(entries * per_entry, size, dtype=torch.bool)
    for entry, length in zip(chosen.tolist(), seqlens.tolist(), strict=True):
        at = torch.arange(length)
        owned[table[entry].long()[at // size], at % size] = True
    given = {"cache_seqlens": seqlens}
    for name, width in (("k", d), ("v", d_v)):
        pages = rand(*owned.shape, nheads_k, width, dtype=s.dtype)
        given[f"{name}_cache"] = poison(pages, owned)
        if s.append:
            given[name] = rand(*shape, nheads_k, width, dtype=s.dtype)
    if s.append and s.packed:
        given["cu_seqlens_k_new"] = cumulative(rows_of)
    if s.page_size:
        given["page_table"] = table
    if s.batch_idx:
        given["cache_batch_idx"] = chosen
    if s.rotary_dim:
        given["rotary_cos"], given["rotary_sin"] = rotary(CAPACITY, s.rotary_dim, s.dtype)
    return given


def step(s: Structure) -> Callable[..., Any]:
    op, scalars = getattr(ops, f"flash_attn_{s.kind}"), dict(s.scalars)
    if s.packed:
        scalars["max_seqlen_q"] = s.rows
    if s.kind == "varlen_func":
        scalars["max_seqlen_k"] = 20
    return lambda given: op(**given, **scalars)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("eagerly", [False, True], ids=["interpreter", "run_eagerly"])
class TestRandomCalls:
    @examples
    @given(s=structures(), batches=st.permutations([2, 3, 5]), seed=st.integers(0, 2**31))
    def test_as_on_cpu(
        self, eagerly: bool, dynamic: bool, s: Structure, batches: list[int], seed: int
    ) -> None:
        torch.manual_seed(seed)
        torch._dynamo.reset()
        config = torchair.CompilerConfig()
        config.debug.run_eagerly = eagerly
        backend = torchair.get_npu_backend(compiler_config=config)
        function = step(s)
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
        Interpreter.graphs = []
        for batch in batches[:2] if dynamic else batches[:1]:
            given = inputs(s, batch)
            npu = {name: x.npu() for name, x in given.items()}
            with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
                patched.setattr("torchair.core._backend.TorchNpuGraph", Interpreter)
                out, lse = compiled(npu)
                want, want_lse = function(given)
            assert_close(out, want, s.dtype)
            assert_lse(lse, want_lse, s.dtype)
            for name, x in given.items():
                same = dict(rtol=0.01, atol=0.01, equal_nan=True)
                torch.testing.assert_close(npu[name].cpu(), x, **same)
        assert bool(Interpreter.graphs) != eagerly
        for graph in Interpreter.graphs:
            assert COPIES.isdisjoint(graph.types())
