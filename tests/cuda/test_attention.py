"""Attention on a GPU by Triton: random calls against the reference, recordings, bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import moved
from hypothesis import given
from hypothesis import strategies as st
from strategies import RELATIVE, dense_calls, examples, hide_pages, kvcache_calls, varlen_calls
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.backends import Attention
from fa3_ops.backends.cuda import prefill
from fa3_ops.backends.triton.attention import MOST_ROWS, Attend
from fa3_ops.testing import FunctionCall, recorded_calls

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
HEADDIMS = st.sampled_from([(16, 16), (40, 24), (64, 64), (96, 96), (128, 128), (192, 128)])
GOLDEN = Path(__file__).parents[1] / "golden"


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, coarse: float = 0.0) -> None:
    """Within the rounding of P, the result and float32 sums."""
    slack = {torch.float32: 3e-5, torch.bfloat16: 5 * 2.0**-9}.get(dtype, 5 * 2.0**-12)
    slack = max(slack, coarse)
    assert got.shape == want.shape
    assert not got.isnan().any()
    rtol = 2 * RELATIVE[dtype]
    torch.testing.assert_close(got.double().cpu(), want, rtol=rtol, atol=slack)


def assert_lse(got: Tensor, want: Tensor, coarse: float = 0.0) -> None:
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=max(1e-4, coarse))


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3NPU_STRICT", "1")


class TestRandomCalls:
    @examples(150)
    @given(dense_calls(DTYPES, HEADDIMS))
    def test_dense(self, call: dict[str, Any]) -> None:
        want_out, want_lse = reference.batched(**call)
        out, lse = fa3_ops.flash_attn_func(**moved(call), return_attn_probs=True)
        assert_close(out, want_out, call["q"].dtype)
        assert_lse(lse, want_lse)

    @examples(150)
    @given(varlen_calls(DTYPES, HEADDIMS))
    def test_varlen(self, call: dict[str, Any]) -> None:
        want_out, want_lse = reference.batched(**call)
        lengths = {"max_seqlen_q": 40, "max_seqlen_k": 70}
        call = moved(call) | lengths
        out, lse = fa3_ops.flash_attn_varlen_func(**call, return_attn_probs=True)
        assert_close(out, want_out, call["q"].dtype)
        assert_lse(lse, want_lse)

    @examples(150)
    @given(kvcache_calls(DTYPES, HEADDIMS))
    def test_kvcache(self, call: dict[str, Any]) -> None:
        hide_pages(call)
        ours = moved(call)
        call.pop("max_seqlen_q", None)
        want_out, want_lse = reference.flash_attn_with_kvcache(**call)
        out, lse = fa3_ops.flash_attn_with_kvcache(**ours, return_softmax_lse=True)
        # A rotated vector may round the other way: one ulp of it moves a score.
        half = call["q"].dtype.itemsize <= 2 and "rotary_cos" in call
        coarse = {2: 0.05, 1: 0.5}[call["q"].dtype.itemsize] if half else 0.0
        assert_close(out, want_out, call["q"].dtype, coarse)
        assert_lse(lse, want_lse, coarse)
        ulp = torch.finfo(call["q"].dtype).eps if "rotary_cos" in call else 0.0
        for name in ("k_cache", "v_cache"):
            got, want = ours[name].double().cpu(), call[name].double()
            torch.testing.assert_close(got, want, rtol=ulp, atol=4 * ulp, equal_nan=True)


CASES = [
    call for name in ("fa3", "fa2_alibi") for call in recorded_calls(GOLDEN / f"{name}.safetensors")
]


@pytest.mark.parametrize("call", CASES, ids=lambda call: call.name)
def test_as_exact_as_the_recorded_kernel(call: FunctionCall) -> None:
    arguments = moved(call.fresh())
    out, softmax_lse = call.function(**arguments)
    on_cpu = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    assert call.disagreements(out.cpu(), softmax_lse.cpu(), on_cpu) == []


NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [(torch.bfloat16, cache) for cache in (torch.bfloat16, *NARROW)]
    + [(torch.float16, torch.float8_e4m3fn), (torch.float8_e4m3fn, torch.float8_e4m3fn)],
    ids=str,
)
@pytest.mark.parametrize(
    ("page_size", "headdim"), [(None, 128), (16, 128), (64, 128), (16, 80)], ids=str
)
def test_decode_has_the_bits_of_prefill(
    dtype: torch.dtype, cache: torch.dtype, page_size: int | None, headdim: int
) -> None:
    """Of a row of any of the last 40 tokens, by 2 sequences and by 40."""
    lengths = torch.tensor([1300, 1984], dtype=torch.int32, device="cuda")
    q = torch.randn(2, 40, 32, headdim, device="cuda").to(dtype)
    k, v = (torch.randn(2, 1984, 8, headdim, device="cuda") for _ in "kv")
    k, v = ((x * (40 if cache == torch.int8 else 1)).clamp(-127, 127).to(cache) for x in (k, v))
    more: dict[str, Any] = {"causal": True, "softmax_scale": 0.01 if cache == torch.int8 else 0.1}
    if page_size is not None:
        k, v = (x.reshape(-1, page_size, 8, headdim) for x in (k, v))
        more["page_table"] = torch.arange(len(k), device="cuda").flip(0).int().view(2, -1)
    want = fa3_ops.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **more)
    for row in (0, 17, 39):
        alone = fa3_ops.flash_attn_with_kvcache(
            q[:, row : row + 1], k, v, cache_seqlens=lengths - 39 + row, **more
        )
        assert torch.equal(alone[:, 0], want[:, row])
    if page_size is not None:
        more["page_table"] = more["page_table"].repeat_interleave(40, 0)
        rows = torch.arange(40, device="cuda").repeat(2)
        many = fa3_ops.flash_attn_with_kvcache(
            q.flatten(0, 1)[:, None],
            *(k, v),
            cache_seqlens=(lengths.repeat_interleave(40) - 39 + rows).int(),
            **more,
        )
        assert torch.equal(many[:, 0], want.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("layout", ["dense", "packed", "paged"])
@pytest.mark.parametrize("causal", [True, False])
def test_hoppers_prefill_has_the_bits_of_triton(
    dtype: torch.dtype, headdim: int, layout: str, causal: bool
) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    call = prefill_call(dtype, headdim, layout, causal)
    assert prefill.prefills_on_hopper(call)
    want = Attend(call, MOST_ROWS)(call)
    assert all(map(torch.equal, prefill.Prefill(call)(call), want))


def prefill_call(dtype: torch.dtype, headdim: int, layout: str, causal: bool) -> Attention:
    """Of sequences whose lengths are no multiples, more keys than rows of q, over some chunks."""
    shapes = ((2, 700, 32, headdim), (2, 1344, 8, headdim), (2, 1344, 8, headdim))
    q, k, v = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    more: dict[str, Any] = {}
    if layout == "packed":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        ends_q, ends_k = ([0, 613, 1400], [0, 700, 2650])
        more = {"max_seqlen_q": 787, "max_seqlen_k": 1950}
        for name, ends in (("cu_seqlens_q", ends_q), ("cu_seqlens_k", ends_k)):
            more[name] = torch.tensor(ends, dtype=torch.int32, device="cuda")
    if layout == "paged":
        k, v = (x.reshape(42, 64, 8, headdim) for x in (k, v))
        more["page_table"] = torch.randperm(42, device="cuda").int().view(2, 21)
        more["seqused_k"] = torch.tensor([1301, 777], dtype=torch.int32, device="cuda")
    return Attention(q=q, k=k, v=v, causal=causal, **more)
