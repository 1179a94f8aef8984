"""Tensors that share memory with what is written: computed as if they were apart, in eager and in
compiled code; elements of the written tensor that share a place are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_inputs import ints, rand, rotary
from torch import Tensor

import fa3_ops

ops = torch.ops.fa3npu
BACKENDS = ("eager", "aot_eager", "inductor")


def run(f: Callable[..., Any], backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch._dynamo.reset()
    step = f if backend == "eager" else torch.compile(f, fullgraph=True, backend=backend)
    step(*inputs)
    return inputs


class TestAppend:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_from_the_cache_itself(self, backend: str, dtype: torch.dtype) -> None:
        def shift(k_cache: Tensor, v_cache: Tensor) -> None:
            new = (k_cache[:, :4], v_cache[:, :4])
            fa3_ops.flash_attn_with_kvcache(
                k_cache[:, :2], k_cache, v_cache, *new, cache_seqlens=ints(1, 3)
            )

        caches = tuple(rand(2, 2, 8, 2, 16, dtype=dtype))
        got = run(shift, backend, *(x.clone() for x in caches))
        for after, before in zip(got, caches, strict=True):
            want = before.clone()
            want[0, 1:5], want[1, 3:7] = before[0, :4], before[1, :4]
            assert torch.equal(after, want)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_of_interleaved_caches(self, backend: str) -> None:
        """K and V of a page side by side, as vLLM has them; V's new rows are K's old ones."""

        def append(pages: Tensor) -> None:
            k_cache, v_cache = pages[:, 0], pages[:, 1]
            table = ints(1, 0).view(1, 2)
            ops.kvcache_append_(
                v_cache[:1, 2:], k_cache[:1, 2:], k_cache, v_cache, ints(3), page_table=table
            )

        before = rand(2, 2, 4, 2, 16)
        (after,) = run(append, backend, before.clone())
        want = before.clone()
        want[1, 0, 3], want[0, 0, 0] = before[0, 1, 2:]
        want[1, 1, 3], want[0, 1, 0] = before[0, 0, 2:]
        assert torch.equal(after, want)

    def test_of_rotary_tables_in_the_cache(self) -> None:
        cache = torch.zeros(1, 8, 1, 16)
        cos, sin = rotary(8, 16)
        cache[0, :, 0, :8] = cos
        want, new = torch.zeros(1, 8, 1, 16), rand(1, 8, 1, 16)
        for k_cache, table in ((want, cos), (cache, cache[0, :, 0, :8])):
            ops.kvcache_append_(
                new, new, k_cache, torch.zeros_like(want), ints(0), rotary_cos=table, rotary_sin=sin
            )
        assert torch.equal(cache, want)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", ["k_cache", "v_cache"])
    def test_to_a_cache_whose_elements_share_a_place(self, backend: str, name: str) -> None:
        def append(k: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
            ops.kvcache_append_(k, k, k_cache, v_cache, ints(1, 2))

        caches = {"k_cache": rand(2, 8, 2, 16), "v_cache": rand(2, 8, 2, 16)}
        for shared in (
            caches[name][:1].expand(2, -1, -1, -1),
            rand(2, 9, 2, 16).as_strided((2, 8, 2, 16), (32, 32, 16, 1)),
        ):
            before = shared.clone()
            call = caches | {name: shared}
            if backend != "eager" and 0 not in shared.stride():
                continue  # a compiler writes a copy, and copies it back
            with pytest.raises(RuntimeError, match=r"place for every element|single memory"):
                run(append, backend, rand(2, 1, 2, 16), *call.values())
            assert torch.equal(shared, before)


class TestOut:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("first", [0, 1, 2])
    def test_over_q_and_the_cache(self, backend: str, first: int) -> None:
        """q is rows 0 and 1, k_cache and v_cache rows 2 to 5."""

        def attend(x: Tensor) -> None:
            fa3_ops.flash_attn_with_kvcache(x[:2], x[2:4], x[4:], out=x[first : first + 2])

        before = rand(6, 3, 4, 16)
        (after,) = run(attend, backend, before.clone())
        want = before.clone()
        want[first : first + 2] = fa3_ops.flash_attn_with_kvcache(*before.split(2))
        assert torch.equal(after, want)

    def test_over_packed_k(self) -> None:
        x = rand(3, 7, 4, 16)
        want = fa3_ops.flash_attn_varlen_func(*x, ints(0, 7), ints(0, 7), 7, 7)
        fa3_ops.flash_attn_varlen_func(*x, ints(0, 7), ints(0, 7), 7, 7, out=x[1])
        assert torch.equal(x[1], want)

    def test_between_the_heads_of_q(self) -> None:
        """Memory that interleaves without an element in common."""
        x = rand(2, 3, 8, 16)
        k = rand(2, 5, 4, 16)
        want = fa3_ops.flash_attn_func(x[:, :, :4], k, k)
        fa3_ops.flash_attn_with_kvcache(x[:, :, :4], k, k.clone(), out=x[:, :, 4:])
        assert torch.equal(x[:, :, 4:], want)

    @pytest.mark.parametrize("op", ["flash_attn_kvcache", "flash_attn_with_kvcache"])
    def test_whose_elements_share_a_place(self, op: str) -> None:
        q, k = rand(2, 3, 4, 16), rand(2, 5, 2, 16)
        out = torch.zeros(1, 3, 4, 16).expand(2, 3, 4, 16)
        with pytest.raises((RuntimeError, ValueError), match="out must have a place for every"):
            getattr(ops, op).out(q, k, k.clone(), out=out)
        with pytest.raises(ValueError, match="out must have a place for every element"):
            fa3_ops.flash_attn_with_kvcache(q, k, k.clone(), out=out)
        assert out.count_nonzero() == 0
