"""torch.compile(fullgraph=True): equal to eager, the append in its place, few compilations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import TestCase
from sample_inputs import ints, rand
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.utils import run_and_get_code

import fa3_ops

ops = torch.ops.fa3npu
BACKENDS = ("aot_eager", "inductor")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def decode_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reads the cache before and after the append."""
    before = k_cache.amax()
    out, softmax_lse = ops.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, page_table=page_table, causal=True
    )
    return out * 2, softmax_lse, before, k_cache.amax()


def decode_inputs(batch: int, pages: int, page_size: int = 4) -> tuple[Tensor, ...]:
    return (
        rand(batch, 1, 4, 16),
        rand(batch * pages, page_size, 2, 16),
        rand(batch * pages, page_size, 2, 16),
        rand(batch, 1, 2, 16) + 10,  # larger than anything in the cache, so that amax sees it
        rand(batch, 1, 2, 16),
        torch.randint(0, pages * page_size, (batch,), dtype=torch.int32),
        torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_over_20_shapes_compiles_twice(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(decode_step, backend=counter, fullgraph=True)
    for i in range(20):
        inputs = decode_inputs(batch=2 + i, pages=3 + i)
        copies = tuple(t.clone() for t in inputs)
        for got, want in zip(compiled(*inputs), decode_step(*copies), strict=True):
            assert torch.equal(got, want)
        for got, want in zip(inputs, copies, strict=True):  # the caches too
            assert torch.equal(got, want)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_around_the_append_keep_their_order(backend: str) -> None:
    compiled = torch.compile(decode_step, backend=backend, fullgraph=True)
    inputs = decode_inputs(2, 3)
    top = inputs[1].amax()
    _, _, before, after = compiled(*inputs)
    assert before == top
    assert after == inputs[3].amax()
    assert after > before


@pytest.mark.parametrize("backend", BACKENDS)
def test_append_happens_when_nothing_reads_the_result(backend: str) -> None:
    def only_append(*inputs: Tensor) -> None:
        decode_step(*inputs)

    inputs = decode_inputs(2, 3)
    torch.compile(only_append, backend=backend, fullgraph=True)(*inputs)
    assert inputs[1].amax() == inputs[3].amax()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_loop_equals_eager(backend: str) -> None:
    def loop(step: Any) -> list[Tensor]:
        torch.manual_seed(1)
        q, k_cache, v_cache, *_, page_table = decode_inputs(3, 5)
        cache_seqlens = ints(0, 3, 9)
        outs = []
        for _ in range(8):
            k, v = rand(3, 1, 2, 16), rand(3, 1, 2, 16)
            outs.append(step(q, k_cache, v_cache, k, v, cache_seqlens, page_table)[0])
            q = outs[-1].clone()
            cache_seqlens = cache_seqlens + 1
        return [*outs, k_cache, v_cache]

    compiled = torch.compile(decode_step, backend=backend, fullgraph=True)
    for got, want in zip(loop(compiled), loop(decode_step), strict=True):
        assert torch.equal(got, want)


def test_inductor_copies_no_cache() -> None:
    inputs = decode_inputs(2, 3)
    compiled = torch.compile(decode_step, fullgraph=True)
    _, (code,) = run_and_get_code(compiled, *inputs)
    assert "kvcache_append_" in code
    assert "clone" not in code
    assert "copy_(" not in code


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_overload(backend: str) -> None:
    def step(out: Tensor, *inputs: Tensor) -> Tensor:
        q, k_cache, v_cache, k, v, cache_seqlens, page_table = inputs
        softmax_lse: Tensor = ops.flash_attn_with_kvcache.out(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, page_table=page_table, out=out
        )
        return softmax_lse

    inputs = decode_inputs(2, 3)
    copies = tuple(t.clone() for t in inputs)
    out, eager_out = torch.empty(2, 1, 4, 16), torch.empty(2, 1, 4, 16)
    got = torch.compile(step, backend=backend, fullgraph=True)(out, *inputs)
    assert torch.equal(got, step(eager_out, *copies))
    assert torch.equal(out, eager_out)
    assert torch.equal(inputs[1], copies[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_over_20_batches_compiles_twice(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)

    def train(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out = fa3_ops.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True
        )
        assert isinstance(out, Tensor)
        return out * 3  # no sum: Inductor specialises reductions on their size

    compiled = torch.compile(train, backend=counter, fullgraph=True)
    for i in range(20):
        lengths = [6 + 2 * i, *[3] * (i + 1)]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        qkv = tuple(rand(sum(lengths), h, 16, grad=True) for h in (4, 2, 2))
        dout = rand(sum(lengths), 4, 16)
        got = torch.autograd.grad(compiled(*qkv, cu_seqlens, max(lengths)), qkv, dout)
        want = torch.autograd.grad(train(*qkv, cu_seqlens, max(lengths)), qkv, dout)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_with_sinks_and_lse(backend: str) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = ops.flash_attn_func(q, k, v, causal=True, sinks=sinks)
        return out.square().sum() + lse.sum()

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for seqlen in range(2, 22):
        inputs = (*(rand(2, seqlen, h, 16, grad=True) for h in (4, 2, 2)), rand(4, grad=True))
        got = torch.autograd.grad(compiled(*inputs), inputs)
        want = torch.autograd.grad(loss(*inputs), inputs)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    assert counter.frame_count <= 2


class TestGraph(TestCase):
    def test_decode_step(self) -> None:
        """What a compiler sees of one decode step: the composite is gone."""
        printed = ""

        def print_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            def keep(lowered: torch.fx.GraphModule, _: Any) -> Any:
                nonlocal printed
                printed = lowered.print_readable(print_output=False, include_stride=False)
                return lowered.forward

            return aot_module_simplified(graph, inputs, fw_compiler=keep)

        inputs = decode_inputs(2, 3)
        torch.compile(decode_step, backend=print_graph, fullgraph=True)(*inputs)
        body = [line.split("#")[0].split(";")[0].strip() for line in printed.splitlines()]
        calls = "\n".join(line for line in body if "torch.ops" in line)
        self.assertExpectedInline(
            calls,
            """\
amax: "f32[]" = torch.ops.aten.amax.default(arg0_1)
auto_functionalized_v2 = torch.ops.higher_order.auto_functionalized_v2(torch.ops.fa3npu.kvcache_append_.default, k = arg3_1, v = arg4_1, cache_seqlens = arg5_1, cache_batch_idx = None, page_table = arg6_1, cu_seqlens_k_new = None, rotary_cos = None, rotary_sin = None, rotary_seqlens = None, rotary_interleaved = True, k_descale = None, v_descale = None, _k_cache_base_index = 0, _v_cache_base_index = 1, _all_bases = [arg0_1, arg2_1])
add: "i32[2]" = torch.ops.aten.add.Tensor(arg5_1, 1)
flash_attn_kvcache = torch.ops.fa3npu.flash_attn_kvcache.default(arg1_1, getitem_1, getitem_2, None, add, None, None, arg6_1, None, None, None, None, None, None, None, True)
mul: "f32[2, 1, 4, 16]" = torch.ops.aten.mul.Tensor(getitem_3, 2)
amax_1: "f32[]" = torch.ops.aten.amax.default(getitem_1)""",
        )
