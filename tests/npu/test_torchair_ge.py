# ruff: noqa: E501
"""torch.compile(backend="npu") in torchair's GE mode: the graph it builds of our operators, and the
numbers of that graph.

GE itself is not emulated: ge_interpreter.py computes what torchair hands to it.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import expecttest
import pytest
import torch
from ge_interpreter import COPIES, Interpreter
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from fa3_ops import reference
from fa3_ops.backends.npu import device
from fa3_ops.backends.npu.ge import torchair as hook

ops = torch.ops.fa3npu


# ---- Compiling and comparing -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Interpreter]:
    from torchair.core import _backend

    torch._dynamo.reset()
    torch.manual_seed(0)
    Interpreter.graphs = []
    monkeypatch.setattr(_backend, "TorchNpuGraph", Interpreter)
    return Interpreter.graphs


def rand(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def pages(rows: int, columns: int) -> Tensor:
    return torch.randperm(rows * columns, dtype=torch.int32).view(rows, columns)


def compiled(f: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    return torch.compile(f, backend="npu", fullgraph=True, dynamic=dynamic)


def check(
    f: Callable[..., Any], step: Callable[..., Any], slack: float = 2e-3, **inputs: Tensor
) -> dict[str, Tensor]:
    """f, compiled as step, gives on the NPU what it gives on CPU, also in its inputs. Returns the
    inputs on the NPU."""
    on_npu = {name: t.npu() for name, t in inputs.items()}
    with torch.no_grad():
        got, want = step(**on_npu), f(**inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu(), w, atol=slack, rtol=slack)
    for name, t in inputs.items():
        assert torch.equal(on_npu[name].cpu(), t), name
    return on_npu


def expect(graph: Interpreter, text: str, **names: Tensor) -> None:
    assert COPIES.isdisjoint(graph.types())
    expecttest.assert_expected_inline(graph.text(**names), text, skip=1)


def decode_inputs(batch: int, table: int, headdim: int = 64, rows: int = 1) -> dict[str, Tensor]:
    n = batch * table
    return {
        "q": rand(batch, rows, 4, headdim),
        "k_cache": rand(n, 128, 2, headdim),
        "v_cache": rand(n, 128, 2, headdim),
        "k": rand(batch, rows, 2, headdim),
        "v": rand(batch, rows, 2, headdim),
        "cache_seqlens": torch.randint(0, table * 128 - rows, (batch,), dtype=torch.int32),
        "page_table": pages(batch, table),
    }


def causal_step(**inputs: Tensor) -> Any:
    return ops.flash_attn_with_kvcache(**inputs, causal=True)


def test_decode(graphs: list[Interpreter]) -> None:
    npu = check(causal_step, compiled(causal_step), **decode_inputs(3, 2))
    expect(
        graphs[0],
        """\
_0 = (Reshape(cache_seqlens, [-1, 1]) + Range(0, 1, 1))
ScatterPaKvCache
  key = Reshape(k, [-1, 2, 64])
  key_cache = k_cache
  slot_mapping = Reshape(SelectV2((_0 < 256), ((Reshape(page_table, [-1])[((Reshape(Range(0, 3, 1), [-1, 1]) * 2) + Minimum((_0 // 128), 1))] * 128) + (_0 % 128)), -1), [-1])
  value = Reshape(v, [-1, 2, 64])
  value_cache = v_cache
  .cache_mode = b'Norm'
_1 = (cache_seqlens + 1)
FusedInferAttentionScore
  query = q
  key0 = Reshape(ScatterPaKvCache:0, [-1, 128, 128])
  value0 = Reshape(ScatterPaKvCache:1, [-1, 128, 128])
  actual_seq_lengths_kv = Cast(_1)
  block_table = page_table
  .block_size = 128
  .input_layout = b'BSND'
  .next_tokens = 2147483647
  .num_heads = 4
  .num_key_value_heads = 2
  .pre_tokens = 2147483647
  .scale = 0.125
  .softmax_lse_flag = True""",
        **npu,
    )


def test_decode_dynamic(graphs: list[Interpreter]) -> None:
    """One graph for every batch size, number of pages and page table."""
    step = compiled(causal_step, dynamic=True)
    npu = check(causal_step, step, **decode_inputs(3, 5))
    expect(
        graphs[0],
        """\
_0 = (Reshape(cache_seqlens, [-1, 1]) + Range(0, 1, 1))
_1 = Shape(page_table)[1]
ScatterPaKvCache
  key = Reshape(k, [-1, 2, 64])
  key_cache = k_cache
  slot_mapping = Reshape(SelectV2((_0 < (_1 * 128)), ((Reshape(page_table, [-1])[((Reshape(Range(0, Shape(cache_seqlens)[0], 1), [-1, 1]) * _1) + Minimum((_0 // 128), (_1 - 1)))] * 128) + (_0 % 128)), -1), [-1])
  value = Reshape(v, [-1, 2, 64])
  value_cache = v_cache
  .cache_mode = b'Norm'
_2 = (cache_seqlens + 1)
FusedInferAttentionScore
  query = q
  key0 = Reshape(ScatterPaKvCache:0, [-1, 128, 128])
  value0 = Reshape(ScatterPaKvCache:1, [-1, 128, 128])
  actual_seq_lengths_kv = Cast(_2)
  block_table = page_table
  .block_size = 128
  .input_layout = b'BSND'
  .next_tokens = 2147483647
  .num_heads = 4
  .num_key_value_heads = 2
  .pre_tokens = 2147483647
  .scale = 0.125
  .softmax_lse_flag = True""",
        **npu,
    )
    for batch, table in ((7, 6), (5, 9)):
        check(causal_step, step, **decode_inputs(batch, table))
    assert len(graphs) == 1


def test_prefill(graphs: list[Interpreter]) -> None:
    npu = check(causal_step, compiled(causal_step), **decode_inputs(2, 2, rows=5))
    expect(
        graphs[0],
        """\
_0 = (Reshape(cache_seqlens, [-1, 1]) + Range(0, 5, 1))
ScatterPaKvCache
  key = Reshape(k, [-1, 2, 64])
  key_cache = k_cache
  slot_mapping = Reshape(SelectV2((_0 < 256), ((Reshape(page_table, [-1])[((Reshape(Range(0, 2, 1), [-1, 1]) * 2) + Minimum((_0 // 128), 1))] * 128) + (_0 % 128)), -1), [-1])
  value = Reshape(v, [-1, 2, 64])
  value_cache = v_cache
  .cache_mode = b'Norm'
_1 = (cache_seqlens + 5)
FusedInferAttentionScore
  query = q
  key0 = Reshape(ScatterPaKvCache:0, [-1, 128, 128])
  value0 = Reshape(ScatterPaKvCache:1, [-1, 128, 128])
  atten_mask = fa3npu_upper_triangle
  actual_seq_lengths_kv = Cast(_1)
  block_table = page_table
  .block_size = 128
  .input_layout = b'BSND'
  .next_tokens = 2147483647
  .num_heads = 4
  .num_key_value_heads = 2
  .pre_tokens = 2147483647
  .scale = 0.125
  .softmax_lse_flag = True
  .sparse_mode = 3""",
        **npu,
    )


def mixed_inputs(spare: int = 0, first: int = 0) -> dict[str, Tensor]:
    """A prefill, a decode and a chunk, with unused rows in front and behind."""
    cu_seqlens = int32(0, 6, 7, 10) + first
    total = 10 + first + spare
    return {
        "q": rand(total, 4, 128),
        "k_cache": rand(6, 32, 2, 128),
        "v_cache": rand(6, 32, 2, 128),
        "k": rand(total, 2, 128),
        "v": rand(total, 2, 128),
        "cache_seqlens": int32(0, 40, 13),
        "page_table": pages(3, 2),
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k_new": cu_seqlens.clone(),
    }


def mixed_step(max_seqlen_q: int = 6, **inputs: Tensor) -> Any:
    return ops.flash_attn_with_kvcache(**inputs, max_seqlen_q=max_seqlen_q, causal=True)


def test_mixed(graphs: list[Interpreter]) -> None:
    npu = check(mixed_step, compiled(mixed_step), **mixed_inputs())
    expect(
        graphs[0],
        """\
_0 = Range(0, 10, 1)
_1 = SearchSorted(cu_seqlens_k_new, _0)
_2 = (ConcatV2(Reshape(64, [1]), cache_seqlens, Reshape(64, [1]), 0)[_1] + (_0 - ConcatV2(Reshape(0, [1]), cu_seqlens_k_new, 0)[_1]))
ScatterPaKvCache
  key = Reshape(k, [-1, 2, 128])
  key_cache = k_cache
  slot_mapping = Reshape(SelectV2((_2 < 64), ((Reshape(page_table, [-1])[((ConcatV2(Reshape(0, [1]), Range(0, 3, 1), Reshape(0, [1]), 0)[_1] * 2) + Minimum((_2 // 32), 1))] * 32) + (_2 % 32)), -1), [-1])
  value = Reshape(v, [-1, 2, 128])
  value_cache = v_cache
  .cache_mode = b'Norm'
_3 = (cache_seqlens + (StridedSliceV2(cu_seqlens_k_new, 1, 4, -1, 1) - StridedSliceV2(cu_seqlens_k_new, 0, 3, -1, 1)))
FusedInferAttentionScore
  query = q
  key0 = Reshape(ScatterPaKvCache:0, [-1, 32, 256])
  value0 = Reshape(ScatterPaKvCache:1, [-1, 32, 256])
  atten_mask = fa3npu_upper_triangle
  actual_seq_lengths = Cast(ConcatV2(StridedSliceV2(cu_seqlens_q, [1], [2147483647], [0], [1]), Reshape(10, [1]), 0))
  actual_seq_lengths_kv = Cast(ConcatV2(_3, Reshape(0, [1]), 0))
  block_table = Pad(page_table, [[0, 1], [0, 0]])
  .block_size = 32
  .input_layout = b'TND'
  .next_tokens = 2147483647
  .num_heads = 4
  .num_key_value_heads = 2
  .pre_tokens = 2147483647
  .scale = 0.088388
  .softmax_lse_flag = True
  .sparse_mode = 3""",
        **npu,
    )


def test_mixed_dynamic_with_unused_rows(graphs: list[Interpreter]) -> None:
    step = compiled(mixed_step, dynamic=True)
    for spare, first, longest in ((0, 2, 6), (3, 0, 7), (5, 4, 9)):
        f = functools.partial(mixed_step, longest)
        check(f, functools.partial(step, longest), **mixed_inputs(spare, first))
    assert len(graphs) == 1
    assert COPIES.isdisjoint(graphs[0].types())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cache", ["paged", "dense", "packed"])
def test_rotary_is_done_by_plain_operators(
    cache: str, dynamic: bool, graphs: list[Interpreter]
) -> None:
    """Of the sizes of q and k alone: one of a cache would be a read before the write, for which
    torchair copies the cache."""
    tables = {f"rotary_{name}": rand(256, 16) for name in ("cos", "sin")}
    inputs = mixed_inputs(1) if cache == "packed" else decode_inputs(3, 2)
    if cache == "dense":
        del inputs["page_table"]
        inputs |= {name: rand(3, 128, 2, 64) for name in ("k_cache", "v_cache")}
        inputs["cache_seqlens"] = int32(0, 40, 13)
    step = mixed_step if cache == "packed" else causal_step
    check(step, compiled(step, dynamic), **inputs, **tables)
    assert COPIES.isdisjoint(graphs[0].types())


def test_packed_rows_without_a_mask(graphs: list[Interpreter]) -> None:
    """Layout TND is never given sparse_mode 0: vllm-ascend #13699."""

    def step(**inputs: Tensor) -> Any:
        return ops.flash_attn_with_kvcache(**inputs, max_seqlen_q=6)

    check(step, compiled(step), **mixed_inputs(spare=2))
    (fia,) = (op for op in graphs[0].graph.op if op.type == "FusedInferAttentionScore")
    assert fia.attr["sparse_mode"].i == 4
    assert fia.attr["pre_tokens"].i == fia.attr["next_tokens"].i == 2**30


def test_window_of_packed_rows(graphs: list[Interpreter]) -> None:
    def step(**inputs: Tensor) -> Any:
        return ops.flash_attn_with_kvcache(**inputs, max_seqlen_q=6, window_size=[7, 1])

    npu = check(step, compiled(step), **mixed_inputs(spare=2))
    expect(
        graphs[0],
        """\
_0 = Range(0, 12, 1)
_1 = SearchSorted(cu_seqlens_k_new, _0)
_2 = (ConcatV2(Reshape(64, [1]), cache_seqlens, Reshape(64, [1]), 0)[_1] + (_0 - ConcatV2(Reshape(0, [1]), cu_seqlens_k_new, 0)[_1]))
ScatterPaKvCache
  key = Reshape(k, [-1, 2, 128])
  key_cache = k_cache
  slot_mapping = Reshape(SelectV2((_2 < 64), ((Reshape(page_table, [-1])[((ConcatV2(Reshape(0, [1]), Range(0, 3, 1), Reshape(0, [1]), 0)[_1] * 2) + Minimum((_2 // 32), 1))] * 32) + (_2 % 32)), -1), [-1])
  value = Reshape(v, [-1, 2, 128])
  value_cache = v_cache
  .cache_mode = b'Norm'
_3 = (cache_seqlens + (StridedSliceV2(cu_seqlens_k_new, 1, 4, -1, 1) - StridedSliceV2(cu_seqlens_k_new, 0, 3, -1, 1)))
FusedInferAttentionScore
  query = q
  key0 = Reshape(ScatterPaKvCache:0, [-1, 32, 256])
  value0 = Reshape(ScatterPaKvCache:1, [-1, 32, 256])
  atten_mask = fa3npu_upper_triangle
  actual_seq_lengths = Cast(ConcatV2(StridedSliceV2(cu_seqlens_q, [1], [2147483647], [0], [1]), Reshape(12, [1]), 0))
  actual_seq_lengths_kv = Cast(ConcatV2(_3, Reshape(0, [1]), 0))
  block_table = Pad(Minimum(Maximum(page_table, 0), 5), [[0, 1], [0, 0]])
  .block_size = 32
  .input_layout = b'TND'
  .next_tokens = 1
  .num_heads = 4
  .num_key_value_heads = 2
  .pre_tokens = 7
  .scale = 0.088388
  .softmax_lse_flag = True
  .sparse_mode = 4""",
        **npu,
    )


@pytest.mark.parametrize("window_size", [[0, 0], [3, 0], [40, -1], [-1, 2], [2, 5]])
def test_windows(window_size: list[int], graphs: list[Interpreter]) -> None:
    def step(**inputs: Tensor) -> Any:
        return ops.flash_attn_with_kvcache(**inputs, window_size=window_size)

    for rows in (1, 4):
        inputs = decode_inputs(2, 2, headdim=128, rows=rows)
        inputs["cache_seqlens"] = int32(0, 150)
        check(step, compiled(step), **inputs)
    # Layout BSND would ignore the window of a single row.
    alone = graphs[0].text(**dict.fromkeys(())).count("b'TND'")
    assert alone == (window_size[0] >= 0)


def test_sinks(graphs: list[Interpreter]) -> None:
    inputs = decode_inputs(2, 2, rows=3) | {"sinks": torch.tensor([-90.0, 0.0, 1.5, 90.0])}
    inputs["cache_seqlens"] = int32(0, 130)
    check(causal_step, compiled(causal_step), **inputs)
    packed = mixed_inputs(spare=1) | {"sinks": rand(4, dtype=torch.bfloat16)}
    check(mixed_step, compiled(mixed_step), **packed)
    for graph in graphs:
        (fia,) = (op for op in graph.graph.op if op.type == "FusedInferAttentionScore")
        assert (
            dict(zip([d.name for d in fia.input_desc], fia.input, strict=True))["learnable_sink"]
            == ""
        )


@pytest.mark.parametrize("packed", [False, True])
def test_sinks_without_end(packed: bool) -> None:
    sinks = torch.tensor([-torch.inf, 0.5, -torch.inf, torch.inf])
    inputs = mixed_inputs(spare=1) if packed else decode_inputs(2, 2, rows=3)
    if not packed:
        inputs["cache_seqlens"] = int32(0, 130)
    inputs["sinks"] = sinks
    with torch.no_grad():
        step = compiled(mixed_step if packed else causal_step)
        got = step(**{name: t.npu() for name, t in inputs.items()})
    want = reference.flash_attn_with_kvcache(**inputs, causal=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, atol=2e-3, rtol=2e-3)


def test_rows_without_keys() -> None:
    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, causal: bool) -> Any:
        return ops.flash_attn_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, causal=causal)

    for causal in (False, True):
        inputs = rand(4, 5, 4, 64), rand(4, 9, 2, 64), rand(4, 9, 2, 64), int32(0, 1, 3, 9)
        want = step(*inputs, causal)
        got = compiled(step)(*(t.npu() for t in inputs), causal)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.cpu(), w, atol=2e-3, rtol=2e-3)
        assert torch.isneginf(want[1]).any()


def test_several_layers(graphs: list[Interpreter]) -> None:
    def step(
        q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, table: Tensor, **caches: Tensor
    ) -> Any:
        for layer in range(3):
            q, lse = ops.flash_attn_with_kvcache(
                q, caches[f"k{layer}"], caches[f"v{layer}"], k, v,
                cache_seqlens=seqlens, page_table=table, causal=True,
            )  # fmt: skip
        return q, lse

    inputs = decode_inputs(2, 2, rows=2)
    caches = {f"{x}{layer}": rand(4, 128, 2, 64) for x in "kv" for layer in range(3)}
    rest = {"seqlens": inputs["cache_seqlens"], "table": inputs["page_table"]}
    check(step, compiled(step), **{x: inputs[x] for x in "qkv"}, **rest, **caches)
    types = graphs[0].types()
    assert types.count("ScatterPaKvCache") == types.count("FusedInferAttentionScore") == 3
    assert [op.name for op in graphs[0].graph.op].count("fa3npu_upper_triangle") == 1
    assert COPIES.isdisjoint(types)


def test_append_alone(graphs: list[Interpreter]) -> None:
    """Nothing in the graph reads what it writes."""

    def step(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor) -> Any:
        ops.kvcache_append_(k, v, k_cache, v_cache, cache_seqlens)
        return (cache_seqlens + 1,)

    inputs = decode_inputs(3, 1)
    del inputs["q"], inputs["page_table"]
    check(step, compiled(step), **inputs)
    assert COPIES.isdisjoint(graphs[0].types())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", [5, 7])
def test_scatter(graphs: list[Interpreter], tokens: int, dtype: torch.dtype) -> None:
    """Rows behind the slots are padding, a slot behind the end of the cache is skipped."""

    def step(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Any:
        ops.kvcache_scatter_(k, v, k_cache, v_cache, slots)
        return (slots + 1,)

    caches = {f"{x}_cache": rand(3, 128, 2, 64) for x in "kv"}
    inputs = {"k": rand(tokens, 2, 64), "v": rand(tokens, 2, 64), **caches}
    slots = torch.tensor([5, -1, 383, 384, 0], dtype=dtype)
    npu = {name: x.npu() for name, x in inputs.items()}
    compiled(step)(**npu, slots=slots.npu())
    fits = (slots >= 0) & (slots < 384)
    for x in "kv":
        inputs[f"{x}_cache"].view(-1, 2, 64)[slots[fits].long()] = inputs[x][:5][fits]
        assert torch.equal(npu[f"{x}_cache"].cpu(), inputs[f"{x}_cache"])
    assert COPIES.isdisjoint(graphs[0].types())


@pytest.mark.parametrize("bias", [None, rand(40)], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 64), (64,)], ids=str)
def test_linear(graphs: list[Interpreter], shape: tuple[int, ...], bias: Tensor | None) -> None:
    x, weight = rand(*shape), rand(40, 64)
    given = (x, weight) if bias is None else (x, weight, bias.to(x.dtype))
    out = compiled(ops.linear)(*(t.npu() for t in given))
    torch.testing.assert_close(out.cpu(), ops.linear(*given), atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("of_one_base", [False, True])
def test_caches_that_are_views(of_one_base: bool, graphs: list[Interpreter]) -> None:
    """Cut before the compiled function, as serving code does."""
    inputs = decode_inputs(3, 2)
    npu = {name: t.npu() for name, t in inputs.items()}
    npu["k_cache"], npu["v_cache"] = base = torch.stack((npu["k_cache"], npu["v_cache"]))
    if not of_one_base:
        npu["v_cache"] = base.clone()[1]
    got, want = compiled(causal_step)(**npu), causal_step(**inputs)
    torch.testing.assert_close(got[0].cpu(), want[0], atol=2e-3, rtol=2e-3)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(npu[name].cpu(), inputs[name])
    assert COPIES.isdisjoint(graphs[0].types())


def test_views_in_the_graph_are_copied_by_torchair(graphs: list[Interpreter]) -> None:
    def step(k_base: Tensor, v_base: Tensor, **inputs: Tensor) -> Any:
        return causal_step(k_cache=k_base[1], v_cache=v_base[0], **inputs)

    inputs = decode_inputs(3, 2)
    bases = {"k_base": rand(2, 6, 128, 2, 64), "v_base": rand(2, 6, 128, 2, 64)}
    del inputs["k_cache"], inputs["v_cache"]
    check(step, compiled(step), **bases, **inputs)
    assert graphs[0].types().count("TensorMove") == 2


def test_views_of_one_base_in_the_graph_fail_in_torchair() -> None:
    def step(base: Tensor, **inputs: Tensor) -> Any:
        return causal_step(k_cache=base[0], v_cache=base[1], **inputs)

    npu = {name: t.npu() for name, t in decode_inputs(3, 2).items()}
    base = torch.stack((npu.pop("k_cache"), npu.pop("v_cache")))
    with pytest.raises(BackendCompilerFailed, match="length of ge_outputs must be equal"):
        compiled(step)(base, **npu)


def test_reading_a_cache_before_the_append_copies_it(graphs: list[Interpreter]) -> None:
    def step(**inputs: Tensor) -> Any:
        return inputs["k_cache"] * inputs["k_cache"], *causal_step(**inputs)

    check(step, compiled(step), **decode_inputs(3, 2))
    assert graphs[0].types().count("TensorMove") == 1


def test_cache_batch_idx_of_pages(graphs: list[Interpreter]) -> None:
    inputs = decode_inputs(3, 2) | {"cache_batch_idx": int32(4, 0, 3)}
    inputs |= {
        "page_table": pages(5, 2),
        "k_cache": rand(10, 128, 2, 64),
        "v_cache": rand(10, 128, 2, 64),
    }
    npu = check(causal_step, compiled(causal_step), **inputs)
    expect(
        graphs[0],
        """\
_0 = (Reshape(cache_seqlens, [-1, 1]) + Range(0, 1, 1))
ScatterPaKvCache
  key = Reshape(k, [-1, 2, 64])
  key_cache = k_cache
  slot_mapping = Reshape(SelectV2((_0 < 256), ((Reshape(page_table, [-1])[((Reshape(cache_batch_idx, [-1, 1]) * 2) + Minimum((_0 // 128), 1))] * 128) + (_0 % 128)), -1), [-1])
  value = Reshape(v, [-1, 2, 64])
  value_cache = v_cache
  .cache_mode = b'Norm'
_1 = (cache_seqlens + 1)
FusedInferAttentionScore
  query = q
  key0 = Reshape(ScatterPaKvCache:0, [-1, 128, 128])
  value0 = Reshape(ScatterPaKvCache:1, [-1, 128, 128])
  actual_seq_lengths_kv = Cast(_1)
  block_table = page_table[cache_batch_idx]
  .block_size = 128
  .input_layout = b'BSND'
  .next_tokens = 2147483647
  .num_heads = 4
  .num_key_value_heads = 2
  .pre_tokens = 2147483647
  .scale = 0.125
  .softmax_lse_flag = True""",
        **npu,
    )


def test_cache_batch_idx_of_dense_cache(graphs: list[Interpreter]) -> None:
    inputs = decode_inputs(3, 2) | {"cache_batch_idx": int32(4, 0, 3)}
    del inputs["page_table"]
    inputs |= {"k_cache": rand(5, 256, 2, 64), "v_cache": rand(5, 256, 2, 64)}
    npu = check(causal_step, compiled(causal_step), **inputs)
    expect(
        graphs[0],
        """\
_0 = (Reshape(cache_seqlens, [-1, 1]) + Range(0, 1, 1))
ScatterPaKvCache
  key = Reshape(k, [-1, 2, 64])
  key_cache = k_cache
  slot_mapping = Reshape(SelectV2((_0 < 256), ((Reshape(cache_batch_idx, [-1, 1]) * 256) + _0), -1), [-1])
  value = Reshape(v, [-1, 2, 64])
  value_cache = v_cache
  .cache_mode = b'Norm'
_1 = (cache_seqlens + 1)
FusedInferAttentionScore
  query = q
  key0 = Reshape(ScatterPaKvCache:0, [-1, 128, 128])
  value0 = Reshape(ScatterPaKvCache:1, [-1, 128, 128])
  actual_seq_lengths_kv = Cast(_1)
  block_table = ((Reshape(cache_batch_idx, [-1, 1]) * 2) + Range(0, 2, 1))
  .block_size = 128
  .input_layout = b'BSND'
  .next_tokens = 2147483647
  .num_heads = 4
  .num_key_value_heads = 2
  .pre_tokens = 2147483647
  .scale = 0.125
  .softmax_lse_flag = True""",
        **npu,
    )


def test_packed_rows_of_dense_cache() -> None:
    inputs = mixed_inputs(spare=1)
    del inputs["page_table"]
    inputs |= {"k_cache": rand(3, 128, 2, 128), "v_cache": rand(3, 128, 2, 128)}
    check(mixed_step, compiled(mixed_step), **inputs)


def test_cache_read_in_full() -> None:
    """No cache_seqlens: all of the page table."""

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor) -> Any:
        return ops.flash_attn_kvcache(q, k_cache, v_cache, page_table=page_table)

    inputs = decode_inputs(3, 2)
    names = ("q", "k_cache", "v_cache", "page_table")
    check(step, compiled(step), **{name: inputs[name] for name in names})


def test_tokens_that_do_not_fit_are_not_written() -> None:
    """On CPU they are an error; a graph cannot raise."""
    inputs = decode_inputs(2, 2)
    inputs["cache_seqlens"] = int32(256, 3)
    inputs.pop("q")
    npu = {name: t.npu() for name, t in inputs.items()}
    compiled(ops.kvcache_append_)(**npu)
    page, row = int(inputs["page_table"][1, 0]), 3
    inputs["k_cache"][page, row] = inputs["k"][1, 0]
    assert torch.equal(npu["k_cache"].cpu(), inputs["k_cache"])


def test_varlen(graphs: list[Interpreter]) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Any:
        return ops.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 9, causal=True)

    rows = {"q": rand(10, 4, 192), "k": rand(16, 2, 192), "v": rand(16, 2, 128)}
    lengths = {"cu_q": int32(1, 6, 6, 9), "cu_k": int32(2, 5, 7, 15)}
    npu = check(step, compiled(step), **rows, **lengths)
    expect(
        graphs[0],
        """\
FusedInferAttentionScore
  query = q
  key0 = k
  value0 = v
  atten_mask = fa3npu_upper_triangle
  actual_seq_lengths = Cast(ConcatV2(cu_q, Reshape(10, [1]), 0))
  actual_seq_lengths_kv = Cast(ConcatV2(cu_k, Reshape(16, [1]), 0))
  .input_layout = b'TND'
  .next_tokens = 2147483647
  .num_heads = 4
  .num_key_value_heads = 2
  .pre_tokens = 2147483647
  .scale = 0.072169
  .softmax_lse_flag = True
  .sparse_mode = 3""",
        **npu,
    )


def test_func_dynamic(graphs: list[Interpreter]) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.flash_attn_func(q, k, v, causal=True, softmax_scale=0.2)

    def inputs(batch: int, seqlen_q: int, seqlen_k: int) -> dict[str, Tensor]:
        shapes = {"q": (seqlen_q, 4), "k": (seqlen_k, 2), "v": (seqlen_k, 2)}
        return {name: rand(batch, *shape, 48) for name, shape in shapes.items()}

    dynamic = compiled(step, dynamic=True)
    npu = check(step, dynamic, **inputs(3, 5, 9))
    expect(
        graphs[0],
        """\
FusedInferAttentionScore
  query = q
  key0 = k
  value0 = v
  atten_mask = fa3npu_upper_triangle
  .input_layout = b'BSND'
  .next_tokens = 2147483647
  .num_heads = 4
  .num_key_value_heads = 2
  .pre_tokens = 2147483647
  .scale = 0.2
  .softmax_lse_flag = True
  .sparse_mode = 3""",
        **npu,
    )
    check(step, dynamic, **inputs(6, 7, 8))
    check(step, dynamic, **inputs(5, 11, 10))  # row 0 sees no key
    assert len(graphs) == 1


def test_mla(graphs: list[Interpreter]) -> None:
    def step(
        q: Tensor, qv: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, table: Tensor
    ) -> Any:
        return ops.flash_attn_kvcache(
            q, k_cache, v_cache, qv, cache_seqlens=seqlens, page_table=table, causal=True
        )

    inputs = {
        "q": rand(2, 3, 8, 64),
        "qv": rand(2, 3, 8, 512) / 8,
        "k_cache": rand(4, 32, 1, 64),
        "v_cache": rand(4, 32, 1, 512),
    }
    npu = check(step, compiled(step), **inputs, seqlens=int32(1, 40), table=pages(2, 2))
    expect(
        graphs[0],
        """\
_0 = Reshape(v_cache, [-1, 32, 512])
FusedInferAttentionScore
  query = qv
  key0 = _0
  value0 = _0
  atten_mask = fa3npu_upper_triangle
  actual_seq_lengths_kv = Cast(seqlens)
  block_table = table
  query_rope = q
  key_rope = Reshape(k_cache, [-1, 32, 64])
  .block_size = 32
  .input_layout = b'BSND'
  .next_tokens = 2147483647
  .num_heads = 8
  .num_key_value_heads = 1
  .pre_tokens = 2147483647
  .scale = 0.041667
  .softmax_lse_flag = True
  .sparse_mode = 3""",
        **npu,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 64])
def test_apply_rotary(interleaved: bool, rotary_dim: int) -> None:
    def step(
        x: Tensor, cos: Tensor, sin: Tensor, seqlens: Tensor, packed: Tensor, cu: Tensor
    ) -> Any:
        return (
            ops.apply_rotary(x, cos, sin, seqlens, None, interleaved),
            ops.apply_rotary(x, cos, sin, seqlens, None, interleaved, False),
            ops.apply_rotary(packed, cos, sin, seqlens, cu, interleaved),
        )

    inputs = {
        "x": rand(2, 3, 4, 64),
        "cos": rand(20, rotary_dim // 2),
        "sin": rand(20, rotary_dim // 2),
    }
    check(
        step,
        compiled(step),
        **inputs,
        seqlens=int32(4, 15),
        packed=rand(9, 4, 64),
        cu=int32(1, 3, 8),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotation_of_the_caller(dtype: torch.dtype) -> None:
    """As models write it themselves, before the call."""

    def step(q: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor) -> Any:
        left, right = q.split([24, 40], dim=-1)
        turned = torch.cat((right, -left), dim=-1)
        return ops.flash_attn_func(q * cos + turned * sin, k, v, causal=True)

    shapes = {
        "q": (2, 3, 4, 64),
        "cos": (64,),
        "sin": (64,),
        "k": (2, 9, 2, 64),
        "v": (2, 9, 2, 64),
    }
    inputs = {name: rand(*shape, dtype=dtype) for name, shape in shapes.items()}
    check(step, compiled(step), slack=2e-3 if dtype == torch.float16 else 3e-2, **inputs)


def test_run_eagerly() -> None:
    """torchair's own check of a graph: it converts the graph and calls the operators."""
    import torchair

    config = torchair.CompilerConfig()
    config.debug.run_eagerly = True
    backend = torchair.get_npu_backend(compiler_config=config)
    step = torch.compile(causal_step, backend=backend, fullgraph=True)
    check(causal_step, step, **decode_inputs(3, 2, headdim=128))


# ---- Errors ------------------------------------------------------------------------------------


def paged_call(
    page_size: int = 128,
    headdim: int = 64,
    headdim_v: int | None = None,
    nheads: int = 4,
    nheads_k: int = 2,
    rows: int = 2,
    dtype: torch.dtype = torch.float16,
    **arguments: Any,
) -> Callable[[], Any]:
    q = rand(2, rows, nheads, headdim, dtype=dtype)
    k = rand(4, page_size, nheads_k, headdim, dtype=dtype)
    v = rand(4, page_size, nheads_k, headdim_v or headdim, dtype=dtype)
    if "cu_seqlens_q" in arguments:
        q = q.flatten(0, 1)
        arguments["max_seqlen_q"] = rows
    arguments |= {"cache_seqlens": int32(3, 5), "page_table": pages(2, 2)}
    return call(ops.flash_attn_kvcache, q, k, v, **arguments)


def call(op: Any, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    def to_npu(x: Any) -> Any:
        return x.npu() if isinstance(x, Tensor) else x

    args, kwargs = torch.utils._pytree.tree_map(to_npu, (args, kwargs))
    return lambda: compiled(lambda *args, **kwargs: op(*args, **kwargs))(*args, **kwargs)


PACKED = int32(0, 2, 4)
ERRORS: dict[str, tuple[Callable[[], Callable[[], Any]], str]] = {
    "softcap": (lambda: paged_call(softcap=3.0), "softcap: FIA has none"),
    "alibi_slopes": (lambda: paged_call(alibi_slopes=torch.ones(4)), "alibi_slopes"),
    "attention_chunk": (lambda: paged_call(attention_chunk=8), "attention_chunk"),
    "cache_leftpad": (lambda: paged_call(cache_leftpad=int32(0, 1)), "cache_leftpad"),
    "seqused_q": (lambda: paged_call(seqused_q=int32(1, 2)), "seqused_q"),
    "float32": (lambda: paged_call(dtype=torch.float32), "dtype torch.float32 of q"),
    "float8": (
        lambda: paged_call(dtype=torch.float8_e4m3fn, q_descale=torch.ones(2, 2)),
        "dtype torch.float8_e4m3fn of q",
    ),
    "int8 cache": (
        lambda: call(
            ops.flash_attn_kvcache,
            rand(2, 1, 4, 64), *(torch.ones(4, 128, 2, 64, dtype=torch.int8) for _ in "kv"),
            cache_seqlens=int32(3, 5), page_table=pages(2, 2),
        ),
        "dtype torch.int8 of k: it takes float16 and bfloat16",
    ),
    "headdim": (lambda: paged_call(headdim=72), "headdim 72 and headdim_v 72"),
    "headdim_v": (lambda: paged_call(headdim_v=128), "headdim 64 and headdim_v 128"),
    "packed headdim": (lambda: paged_call(cu_seqlens_q=PACKED), "headdim 64 and headdim_v 64 of packed q"),
    "window of one row": (
        lambda: paged_call(rows=1, window_size=[4, 0]),
        "headdim 64 and headdim_v 64 of packed q, or of one row with a window",
    ),
    "nheads": (lambda: paged_call(nheads=130), "nheads 130 and nheads_k 2"),
    "prefill pages": (lambda: paged_call(page_size=64), "page_size 64 .* multiples of 128"),
    "decode pages": (lambda: paged_call(page_size=8, rows=1), "page_size 8 .* multiples of 16"),
    "packed pages": (
        lambda: paged_call(page_size=1040, headdim=128, cu_seqlens_q=PACKED),
        "page_size 1040 .* multiples of 16 up to 1024",
    ),
    "qv": (
        lambda: paged_call(qv=rand(2, 2, 4, 64)),
        "qv with headdim 64 and headdim_v 64, nheads 4 and nheads_k 2",
    ),
    "dense cache": (
        lambda: call(
            ops.flash_attn_kvcache,
            rand(2, 1, 4, 64), rand(3, 100, 2, 64), rand(3, 100, 2, 64),
            cache_batch_idx=int32(2, 0),
        ),
        "a dense cache of 100 keys with cache_batch_idx",
    ),
    "seqused_k": (
        lambda: call(
            ops.flash_attn_varlen_func,
            rand(4, 4, 128), rand(4, 2, 128), rand(4, 2, 128), PACKED, PACKED, 2, 2,
            seqused_k=int32(1, 2),
        ),
        "seqused_k with cu_seqlens_k",
    ),
    "cu_seqlens_k": (
        lambda: call(
            ops.flash_attn_varlen_func,
            rand(2, 2, 4, 128), rand(4, 2, 128), rand(4, 2, 128), None, PACKED, None, 2,
        ),
        "cu_seqlens_k without cu_seqlens_q",
    ),
    "qv with cu_seqlens_k": (
        lambda: call(
            ops.flash_attn_varlen_func,
            rand(4, 4, 64), rand(4, 1, 64), rand(4, 1, 512), PACKED, PACKED, 2, 2,
            qv=rand(4, 4, 512),
        ),
        "qv with cu_seqlens_k",
    ),
    "out": (
        lambda: paged_call_with_out(),
        "the operator fa3npu.flash_attn_kvcache.out",
    ),
    "backward": (
        lambda: call(
            ops.flash_attn_func_backward,
            *(rand(2, 3, 4, 64) for _ in range(5)), torch.zeros(2, 4, 3),
        ),
        "the operator fa3npu.flash_attn_func_backward",
    ),
    "combine": (
        lambda: call(ops.flash_attn_combine, torch.ones(2, 1, 3, 4, 8), torch.ones(2, 1, 3, 4)),
        "the operator fa3npu.flash_attn_combine",
    ),
    "get_scheduler_metadata": (
        lambda: call(
            ops.get_scheduler_metadata, 2, 1, 128, 4, 2, 64, int32(3, 5), torch.float16
        ),
        "the operator fa3npu.get_scheduler_metadata",
    ),
    "strided cache": (
        lambda: append_call(rand(2, 9, 4, 64).npu()[:, :, ::2]),
        r"strides \(.*\) of k_cache: it takes contiguous caches",
    ),
    "dtype of a cache": (
        lambda: append_call(rand(2, 9, 2, 64, dtype=torch.float32)),
        "dtype torch.float32 of k_cache",
    ),
    "rotary_cos": (
        lambda: append_call(
            rand(2, 9, 2, 64), rotary_cos=rand(9, 16), rotary_sin=rand(9, 16)
        ),
        "rotary_cos of kvcache_append_: flash_attn_with_kvcache rotates k before it",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("release", "case", "message"),
    [
        ((8, 2), {}, "dtype torch.float16 of packed q: CANN 8.2 or unknown takes"),
        ((8, 2), {"dtype": torch.bfloat16}, "headdim 128 and headdim_v 128 of packed q"),
        ((8, 2), {"dtype": torch.bfloat16, "headdim": 192}, "nheads 4 and nheads_k 2 of packed q"),
        (
            (8, 2),
            {"dtype": torch.bfloat16, "headdim": 192, "nheads": 2, "causal": False},
            "packed q without a causal mask: CANN 8.2 or unknown has no band",
        ),
        ((8, 3), {"qv": rand(4, 4, 512)}, "qv: CANN 8.3 takes it with some masks only"),
        ((8, 3), {"dtype": torch.bfloat16}, "page_size 128 .* it takes no pages of packed q"),
        ((9, 0), {"headdim": 192, "causal": False}, "without a causal mask: headdim_v must be 128"),
    ],
    ids=str,
)
def test_what_a_release_cannot_express(
    release: tuple[int, int], case: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cann_release", lambda: release)
    case = {"headdim": 128, "causal": True, "cu_seqlens_q": PACKED} | case
    with pytest.raises(BackendCompilerFailed, match=message):
        paged_call(**case)()


def paged_call_with_out() -> Callable[[], Any]:
    q, k, v = rand(2, 1, 4, 64), rand(2, 128, 2, 64), rand(2, 128, 2, 64)
    return call(
        lambda *args: ops.flash_attn_kvcache.out(*args[:3], out=args[3]), q, k, v, q.clone()
    )


def append_call(k_cache: Tensor, **rotary: Tensor) -> Callable[[], Any]:
    k = rand(2, 1, 2, 64, dtype=k_cache.dtype)
    return call(ops.kvcache_append_, k, k, k_cache, k_cache.clone(), int32(0, 3), **rotary)


@pytest.mark.parametrize("case", ERRORS)
def test_what_GE_cannot_express_is_an_error_of_the_compiler(
    case: str, graphs: list[Interpreter]
) -> None:
    make, message = ERRORS[case]
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as error:
        make()()
    assert isinstance(error.value.inner_exception, NotImplementedError)
    error.match(f"fa3npu: torchair's GE mode cannot express {message}")
    error.match('Use backend="npugraph_ex"')
    assert graphs == []


# ---- Attaching ---------------------------------------------------------------------------------


def run_in_python(script: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


LOADED = "'torch_npu.dynamo.torchair' in sys.modules"
ATTACHED = "hasattr(torch.ops.fa3npu.kvcache_append_.default, '_ge_converter')"


def test_importing_us_does_not_load_torchair() -> None:
    run_in_python(f"import cann_emulator, fa3_ops, sys; assert not {LOADED}")


@pytest.mark.parametrize(("first", "second"), [("fa3_ops", "torchair"), ("torchair", "fa3_ops")])
def test_converters_are_attached(first: str, second: str) -> None:
    imports = f"import sys, cann_emulator, torch, {first}, {second}"
    run_in_python(f"{imports}; assert {LOADED} and {ATTACHED}")


def test_a_failed_import_leaves_its_error_and_the_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late.py").write_text(
        "import os\nif 'READY' not in os.environ: raise OSError('no GE')"
    )
    attached: list[Any] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hook, "PACKAGE", "late")
    monkeypatch.setattr(hook, "attach", attached.append)
    before = list(sys.meta_path)
    hook.attach_when_loaded()
    with pytest.raises(OSError, match="no GE"):
        importlib.import_module("late")
    assert attached == []
    monkeypatch.setenv("READY", "")
    assert [importlib.import_module("late")] == attached
    assert sys.meta_path == before


def test_a_torchair_that_we_do_not_fit_still_loads() -> None:
    with pytest.warns(RuntimeWarning, match="no GE converters for this torchair: .* has no"):
        hook.attach(ModuleType("torchair"))
