"""q in 16 or 32 bits over caches of 8 bits: float8_e4m3fn, float8_e5m2 and int8, with descales."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sample_inputs import ints, rand
from strategies import (
    INT8_UNIT,
    NARROW_DTYPES,
    WIDE_DTYPES,
    assert_exact,
    assert_lse,
    narrowed,
    threads,
)
from torch import Tensor

import fa3_ops
from fa3_ops import reference

ops = torch.ops.fa3npu
of_each = pytest.mark.parametrize("cache", NARROW_DTYPES, ids=str)
of_both_kinds = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def serving_cache(
    blocks: int, nheads_k: int, block_size: int, d: int, dv: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """k_cache and v_cache as vLLM has them: slices of (blocks, nheads_k, block_size, d + dv)."""
    both = narrowed(torch.randn(blocks, nheads_k, block_size, d + dv), dtype).transpose(1, 2)
    return both[..., :d], both[..., d:]


def descales(dtype: torch.dtype, *shape: int) -> Tensor:
    return (0.5 + torch.rand(shape) / 2) * (INT8_UNIT if dtype == torch.int8 else 1)


@of_each
@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize(("d", "dv"), [(128, 128), (64, 32), (80, 80), (33, 257), (1, 2)])
@pytest.mark.parametrize("rows", [(1, 1, 1), (0, 5, 3), (40, 200, 1)], ids=str)
def test_serving(
    cache: torch.dtype, dtype: torch.dtype, d: int, dv: int, rows: tuple[int, ...]
) -> None:
    """A mixed batch of a serving engine; one sequence has no keys yet but is there."""
    torch.manual_seed(0)
    k_cache, v_cache = serving_cache(40, 2, 16, d, dv, cache)
    table = torch.randperm(40)[:39].int().view(3, 13)
    call: dict[str, Any] = {
        "page_table": table,
        "cu_seqlens_q": ints(0, *torch.tensor(rows).cumsum(0).tolist()),
        "k_descale": descales(cache, 3, 2),
        "v_descale": descales(cache, 2),
        "causal": True,
    }
    q, seqlens = rand(sum(rows), 8, d, dtype=dtype), ints(208, 200, 0)
    out, lse = fa3_ops.flash_attn_varlen_func(
        *(q, k_cache, v_cache),
        **call,
        cu_seqlens_k=None,
        max_seqlen_q=200,
        max_seqlen_k=208,
        seqused_k=seqlens,
        return_attn_probs=True,
    )
    want, want_lse = reference.batched(q, k_cache, v_cache, **call, seqused_k=seqlens)
    assert out.dtype == dtype
    assert_exact(out, want, dtype)
    assert_lse(lse, want_lse)
    again, again_lse = fa3_ops.flash_attn_with_kvcache(
        *(q, k_cache, v_cache),
        **call,
        max_seqlen_q=200,
        cache_seqlens=seqlens,
        return_softmax_lse=True,
    )
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)


@of_each
@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize("d", [128, 40, 9])
@pytest.mark.parametrize("seqlen_q", [1, 4, 90])
def test_numbers_are_those_of_a_wider_cache(
    cache: torch.dtype, dtype: torch.dtype, d: int, seqlen_q: int
) -> None:
    """Whatever holds a number of 8 bits holds it exactly: without a descale, the same bits."""
    torch.manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8)[torch.randint(256, (2, 2, 1100, 2, d))]
    k, v = codes.view(cache).float().nan_to_num(0, 0, 0).clamp(-448, 448).to(cache)
    q = rand(2, seqlen_q, 4, d, dtype=dtype) / 64
    call: dict[str, Any] = {"cache_seqlens": ints(1100, 70), "causal": True}
    got = ops.flash_attn_kvcache(q, k, v, **call)
    want = ops.flash_attn_kvcache(q, k.float().to(dtype), v.float().to(dtype), **call)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@of_each
@pytest.mark.parametrize("q_dtype", [*WIDE_DTYPES, torch.float8_e4m3fn], ids=str)
def test_shapes_of_descales(cache: torch.dtype, q_dtype: torch.dtype) -> None:
    if q_dtype == torch.float8_e4m3fn:
        cache = q_dtype
    q = rand(3, 2, 4, 16).to(q_dtype)
    k, v = (narrowed(torch.randn(3, 70, 2, 16), cache) for _ in "kv")
    factors = torch.tensor([0.75, 0.5])
    want = ops.flash_attn_kvcache(
        *(q, k, v), k_descale=factors.expand(3, 2), v_descale=factors.expand(3, 2).contiguous()
    )
    got = ops.flash_attn_kvcache(q, k, v, k_descale=factors, v_descale=factors)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    one = ops.flash_attn_kvcache(
        *(q, k, v), k_descale=torch.full((3, 2), 0.75), v_descale=torch.full((2,), 0.5)
    )
    for k_descale, v_descale in (
        (torch.tensor([0.75]), torch.tensor(0.5)),
        (torch.tensor(0.75), torch.tensor([0.5])),
    ):
        got = ops.flash_attn_kvcache(q, k, v, k_descale=k_descale, v_descale=v_descale)
        assert torch.equal(got[0], one[0])
        assert torch.equal(got[1], one[1])
    if q_dtype == torch.float8_e4m3fn:
        scaled = ops.flash_attn_kvcache(q, k, v, q_descale=torch.tensor(2.0))
        want = reference.batched(q, k, v, q_descale=torch.tensor(2.0))
        assert_exact(scaled[0], want[0], q_dtype)


@of_each
@of_both_kinds
def test_qv_takes_the_descale_of_v(cache: torch.dtype, dtype: torch.dtype) -> None:
    q, qv = rand(2, 3, 4, 24, dtype=dtype), rand(2, 3, 4, 40, dtype=dtype)
    k, v = (narrowed(torch.randn(2, 90, 2, n), cache) for n in (24, 40))
    call: dict[str, Any] = {
        **{"qv": qv, "k_descale": descales(cache, 2, 2), "v_descale": descales(cache, 2) / 4},
        **{"causal": True, "softcap": 5.0},
    }
    out, lse = ops.flash_attn_kvcache(q, k, v, **call)
    want, want_lse = reference.batched(q, k, v, **call)
    assert_exact(out, want, dtype)
    assert_lse(lse, want_lse)


@of_both_kinds
@pytest.mark.parametrize(
    ("cache", "bad"),
    [
        (torch.float8_e4m3fn, math.nan),
        (torch.float8_e5m2, math.nan),
        (torch.float8_e5m2, math.inf),
        (torch.float8_e5m2, -math.inf),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("rows", [4, 90])
def test_unseen_nan_and_infinity_reach_no_row(
    cache: torch.dtype, dtype: torch.dtype, bad: float, where: str, rows: int
) -> None:
    q, k, v = rand(1, rows, 2, 32, dtype=dtype), rand(1, 90, 2, 32), rand(1, 90, 2, 32)
    k, v = k.to(cache), v.to(cache)
    clean, lse = ops.flash_attn_func(q, k, v, causal=True)
    (k if where == "k" else v)[:, 88:] = bad
    out, dirty_lse = ops.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out[:, : rows - 2], clean[:, : rows - 2])
    assert torch.equal(dirty_lse[:, :, : rows - 2], lse[:, :, : rows - 2])
    wide, wide_lse = ops.flash_attn_func(q, k.to(dtype), v.to(dtype), causal=True)
    torch.testing.assert_close(out, wide, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dirty_lse, wide_lse, rtol=0, atol=0, equal_nan=True)
    assert not out[:, rows - 2 :].isfinite().any()  # the rows that do see it say so


@of_each
def test_a_sequence_alone_and_in_a_batch(cache: torch.dtype) -> None:
    k, v = (narrowed(torch.randn(3, 2100, 4, 64), cache) for _ in "kv")
    q, factors = rand(3, 1, 16, 64, dtype=torch.bfloat16), descales(cache, 3, 4)
    lengths = ints(2100, 1, 700)
    together = ops.flash_attn_kvcache(
        q, k, v, cache_seqlens=lengths, k_descale=factors, v_descale=factors
    )
    for b in range(3):
        with threads(3):
            out, lse = ops.flash_attn_kvcache(
                *(q[b : b + 1], k[b : b + 1], v[b : b + 1]),
                cache_seqlens=lengths[b : b + 1],
                k_descale=factors[b],
                v_descale=factors[b],
                num_splits=3,
            )
        assert torch.equal(out[0], together[0][b])
        assert torch.equal(lse[0], together[1][b])


@of_each
def test_descales_of_0_and_nan(cache: torch.dtype) -> None:
    """A descale is a factor of what is read, and of nothing else."""
    q = rand(1, 2, 2, 16, dtype=torch.bfloat16)
    k, v = (narrowed(torch.randn(1, 90, 2, 16), cache) for _ in "kv")
    nan = torch.tensor([0.0, math.nan])
    out, lse = ops.flash_attn_kvcache(q, k, v, k_descale=nan, v_descale=nan)
    assert torch.equal(out[:, :, 0], torch.zeros(1, 2, 16, dtype=torch.bfloat16))
    torch.testing.assert_close(lse[:, 0], torch.full((1, 2), math.log(90)))
    assert out[:, :, 1].isnan().all()
    assert lse[:, 1].isnan().all()


@of_each
def test_has_no_backward_and_says_so(cache: torch.dtype) -> None:
    q = rand(2, 3, 4, 16, grad=True)
    k, v = (narrowed(torch.randn(2, 5, 2, 16), cache) for _ in "kv")
    name = str(cache).removeprefix("torch.")
    out, _ = ops.flash_attn_func(q, k, v)
    with pytest.raises(NotImplementedError, match=f"flash_attn_func of {name} has no backward"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="has no backward"):
        ops.flash_attn_func_backward(*(out.detach(), q.detach(), k, v, out.detach()), out)


@of_each
def test_compiled(cache: torch.dtype) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, descale: Tensor) -> Tensor:
        call = {"cache_seqlens": seqlens, "k_descale": descale, "v_descale": descale}
        return fa3_ops.flash_attn_with_kvcache(q.cos(), k, v, **call) * 2

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        k, v = (narrowed(torch.randn(batch, 20, 2, 16), cache) for _ in "kv")
        for factors in (descales(cache), descales(cache, 2), descales(cache, batch, 2)):
            inputs = (rand(batch, 1, 4, 16), k, v, ints(*[7] * batch), factors)
            assert torch.equal(compiled(*inputs), f(*inputs))


@of_each
def test_vmap(cache: torch.dtype) -> None:
    q = rand(3, 2, 1, 4, 16)
    k, v = (narrowed(torch.randn(3, 2, 9, 2, 16), cache) for _ in "kv")
    one, each = descales(cache), descales(cache, 3)

    def f(q: Tensor, k: Tensor, v: Tensor, v_descale: Tensor) -> Tensor:
        out: Tensor = ops.flash_attn_func(q, k, v, k_descale=one, v_descale=v_descale)[0]
        return out

    for factors, dim in ((one, None), (each, 0)):
        got = torch.vmap(f, in_dims=(0, 0, 0, dim))(q, k, v, factors)
        want = [f(q[i], k[i], v[i], one if dim is None else each[i]) for i in range(3)]
        assert torch.equal(got, torch.stack(want))
