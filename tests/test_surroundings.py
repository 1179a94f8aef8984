"""What users of scaled_dot_product_attention expect around an attention operator."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from sample_inputs import ints, rand, rotary
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import fa3_ops
from fa3_ops.ops.checks import NARROW

ops = torch.ops.fa3npu


def qkv(grad: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rand(2, 6, 4, 16, dtype=dtype, grad=grad),
        rand(2, 9, 2, 16, dtype=dtype, grad=grad),
        rand(2, 9, 2, 16, dtype=dtype, grad=grad),
    )


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_training_takes_the_autocast_dtype(self, dtype: torch.dtype) -> None:
        q, k, v = qkv(grad=True)
        slopes = torch.rand(4)
        with torch.autocast("cpu", dtype):
            out, lse = ops.flash_attn_func(q, k, v, alibi_slopes=slopes)
        assert out.dtype == dtype
        half = (q.to(dtype), k.to(dtype), v.to(dtype))
        want, _ = ops.flash_attn_func(*half, alibi_slopes=slopes)
        assert torch.equal(out, want)
        assert lse.dtype == torch.float32
        assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32

    def test_functions_take_mixed_dtypes(self) -> None:
        q, k, v = (x.flatten(0, 1) for x in qkv())
        lengths = (ints(0, 6, 12), ints(0, 9, 18), 6, 9)
        with torch.autocast("cpu", torch.bfloat16):
            out = fa3_ops.flash_attn_varlen_func(q, k.bfloat16(), v, *lengths)
            buffer = torch.empty(12, 4, 16, dtype=torch.bfloat16)
            fa3_ops.flash_attn_varlen_func(q, k, v, *lengths, out=buffer)
            dense = fa3_ops.flash_attn_func(q[None], k[None].half(), v[None])
        want = fa3_ops.flash_attn_varlen_func(q.bfloat16(), k.bfloat16(), v.bfloat16(), *lengths)
        assert torch.equal(out, want)
        assert torch.equal(buffer, want)
        assert dense.dtype == torch.bfloat16

    def test_a_cache_keeps_its_dtype_and_is_written(self) -> None:
        k_cache, v_cache = (rand(2, 8, 2, 16, dtype=torch.bfloat16) for _ in range(2))
        q, k, v = rand(2, 1, 4, 16), rand(2, 1, 2, 16), rand(2, 1, 2, 16)
        cos, sin = rotary(8, 8)
        with torch.autocast("cpu", torch.float16):
            out, _ = ops.flash_attn_with_kvcache(
                *(q, k_cache, v_cache, k, v),
                cache_seqlens=ints(3, 5),
                rotary_cos=cos,
                rotary_sin=sin,
            )
        assert out.dtype == torch.bfloat16
        assert torch.equal(v_cache[0, 3], v[0, 0].bfloat16())
        assert torch.equal(v_cache[1, 5], v[1, 0].bfloat16())
        with torch.autocast("cpu", torch.float16):
            read, _ = ops.flash_attn_kvcache(q, k_cache, v_cache)
        assert torch.equal(read, ops.flash_attn_kvcache(q.bfloat16(), k_cache, v_cache)[0])

    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    def test_a_narrow_cache_stays_and_q_takes_autocasts_dtype(self, dtype: torch.dtype) -> None:
        q, cache = rand(2, 1, 4, 16), rand(2, 8, 2, 16).to(dtype)
        call = {"k_descale": torch.tensor([0.5, 2.0]), "cache_seqlens": ints(3, 8)}
        want = ops.flash_attn_with_kvcache(q.bfloat16(), cache, cache.clone(), **call)
        for op in (ops.flash_attn_with_kvcache, ops.flash_attn_kvcache):
            with torch.autocast("cpu", torch.bfloat16):
                got = op(q, cache, cache.clone(), **call)
            assert got[0].dtype == torch.bfloat16
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])

    def test_fp8_is_never_the_product_of_a_cast(self) -> None:
        q, cache = (rand(2, 8, 2, 16).to(torch.float8_e4m3fn) for _ in "qk")
        with torch.autocast("cpu", torch.bfloat16):
            got = ops.flash_attn_with_kvcache(q, cache, cache.clone())
        assert torch.equal(got[0], ops.flash_attn_kvcache(q, cache, cache)[0])

    def test_double_stays_double(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = ops.flash_attn_func(*qkv(dtype=torch.float64))
        assert out.dtype == torch.float64

    def test_compiled(self) -> None:
        def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = ops.flash_attn_func(q, k, v)[0]
                return out

        torch._dynamo.reset()
        inputs = qkv()
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*inputs), f(*inputs))


def test_inference_mode() -> None:
    want, _ = ops.flash_attn_func(*(inputs := qkv(grad=True)))
    with torch.inference_mode():
        out, _ = ops.flash_attn_func(*inputs)
        cache = rand(2, 8, 2, 16)
        ops.flash_attn_with_kvcache(
            *(rand(2, 1, 4, 16), cache, cache.clone(), rand(2, 1, 2, 16), rand(2, 1, 2, 16)),
            cache_seqlens=ints(0, 1),
        )
    assert out.is_inference()
    assert torch.equal(out, want)


class TestCheckpointing:
    @staticmethod
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ops.flash_attn_func(q.sin(), k.cos(), v, causal=True)[0]
        return out * 2

    def run(self, **options: Any) -> tuple[list[Tensor], float]:
        """Gradients, and how often the attention forward ran."""
        torch.manual_seed(0)
        inputs = qkv(grad=True)
        with FlopCounterMode(display=False) as once:
            self.layer(*(x.detach() for x in inputs))
        with FlopCounterMode(display=False) as counter:
            checkpoint(self.layer, *inputs, use_reentrant=False, **options).sum().backward()
        forward = counter.get_flop_counts()["Global"][ops.flash_attn_func]
        gradients = [x.grad for x in inputs if x.grad is not None]
        return gradients, forward / once.get_total_flops()

    def test_recomputes(self) -> None:
        torch.manual_seed(0)
        want = torch.autograd.grad(self.layer(*(inputs := qkv(grad=True))).sum(), inputs)
        got, calls = self.run()
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert calls == 2

    def test_selective_keeps_the_attention(self) -> None:
        def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            save = op == ops.flash_attn_func.default
            return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

        got, calls = self.run(context_fn=partial(create_selective_checkpoint_contexts, policy))
        want, _ = self.run()
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert calls == 1


class TestFlops:
    def count(self, f: Any) -> dict[str, int]:
        with FlopCounterMode(display=False) as counter:
            f()
        return {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}

    def test_dense(self) -> None:
        q, k, v = qkv(grad=True)
        counts = self.count(lambda: ops.flash_attn_func(q, k, v)[0].sum().backward())
        pairs = 2 * 6 * 9 * 4  # batch, seqlen_q, seqlen_k, nheads
        assert counts["fa3npu.flash_attn_func"] == 2 * pairs * (16 + 16)
        assert counts["fa3npu.flash_attn_func_backward"] == 2 * pairs * 5 * 16

    def test_varlen_counts_the_pairs_of_each_sequence(self) -> None:
        q, k, v = rand(7, 4, 16, grad=True), rand(9, 2, 16), rand(9, 2, 8)
        cu_q, cu_k = ints(0, 3, 7), ints(0, 4, 9)
        call = partial(fa3_ops.flash_attn_varlen_func, q, k, v, cu_q, cu_k, 4, 5)
        counts = self.count(lambda: call().sum().backward())
        pairs = (3 * 4 + 4 * 5) * 4
        assert counts["fa3npu.flash_attn_varlen_func"] == 2 * pairs * (16 + 8)
        assert counts["fa3npu.flash_attn_varlen_func_backward"] == 2 * pairs * (3 * 16 + 2 * 8)

    def test_kvcache(self) -> None:
        cache = rand(2, 8, 2, 16)
        q, qv = rand(2, 3, 4, 16), rand(2, 3, 4, 16)
        counts = self.count(
            lambda: fa3_ops.flash_attn_with_kvcache(
                q, cache, cache, qv=qv, cache_seqlens=ints(5, 2)
            )
        )
        assert counts == {"fa3npu.flash_attn_kvcache": 2 * 3 * (5 + 2) * 4 * (16 + 16 + 16)}


def test_profiler_names_the_operators() -> None:
    cache = rand(2, 8, 2, 16)
    with torch.profiler.profile() as profile:
        ops.flash_attn_with_kvcache(
            *(rand(2, 1, 4, 16), cache, cache.clone(), rand(2, 1, 2, 16), rand(2, 1, 2, 16)),
            cache_seqlens=ints(0, 1),
        )
    names = {e.name for e in profile.events()}
    assert {"fa3npu::kvcache_append_", "fa3npu::flash_attn_kvcache"} <= names
