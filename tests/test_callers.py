"""What callers of the real libraries pass, beyond what their documentation says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sample_inputs import appending, cached, dense, ints, rand, rotary, varlen
from torch import Tensor

import fa3_ops
from fa3_ops import reference, v2, v4


def results(got: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in (got if isinstance(got, tuple) else (got,)) if x is not None)


def same(got: Any, want: Any) -> None:
    assert all(map(torch.equal, results(got), results(want)))


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


EVERY_WINDOW = [
    (fa3_ops.flash_attn_func, dense),
    (fa3_ops.flash_attn_varlen_func, varlen),
    (fa3_ops.flash_attn_with_kvcache, cached),
    (fa3_ops.flash_attn_with_kvcache, appending),
    (fa3_ops.flash_attn_qkvpacked_func, lambda: {"qkv": rand(2, 5, 3, 4, 16)}),
    (v2.flash_attn_func, dense),
    (v2.flash_attn_varlen_func, varlen),
    (v2.flash_attn_with_kvcache, cached),
    (v4.flash_attn_func, dense),
    (v4.flash_attn_varlen_func, varlen),
]


@pytest.mark.parametrize(("function", "inputs"), EVERY_WINDOW)
class TestNone:
    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            (None, (-1, -1)),
            ((None, None), (-1, -1)),
            ([2, None], (2, -1)),
            ((None, 1), (-1, 1)),
            (torch.tensor([2, 1]), (2, 1)),
        ],
        ids=str,
    )
    def test_window_size(self, function: Any, inputs: Any, given: Any, meant: Any) -> None:
        call = inputs()
        if function.__module__ == "fa3_ops.v4":
            meant = tuple(None if side == -1 else side for side in meant)
        same(function(**call, window_size=given), function(**call, window_size=meant))

    def test_numbers(self, function: Any, inputs: Any) -> None:
        call = inputs()
        want = function(**call)
        for name in ("attention_chunk", "softcap", "num_splits"):
            if name in function.__wrapped__.__annotations__:
                same(function(**call, **{name: None}), want)
        if "num_splits" in function.__wrapped__.__annotations__:
            same(function(**call, num_splits=-1), want)


def test_operators_take_num_splits_of_minus_one() -> None:
    call = cached()
    want = torch.ops.fa3npu.flash_attn_with_kvcache(**call)
    same(torch.ops.fa3npu.flash_attn_with_kvcache(**call, num_splits=-1), want)
    same(torch.ops.fa3npu.flash_attn_kvcache(**call, num_splits=-1), want)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [(fa3_ops.flash_attn_func, dense), (fa3_ops.flash_attn_varlen_func, varlen)],
)
class TestTraining:
    def test_return_softmax_lse(self, function: Any, inputs: Any) -> None:
        call = inputs()
        want = function(**call, return_attn_probs=True)
        same(function(**call, return_softmax_lse=True), want)
        same(function(**call, return_softmax_lse=True, return_attn_probs=True), want)
        assert len(want) == 2

    def test_dropout(self, function: Any, inputs: Any) -> None:
        call = inputs()
        same(function(**call, dropout_p=0.0), function(**call))
        with pytest.raises(ValueError, match=r"dropout_p must be 0 \(fa3_ops has no dropout\)"):
            function(**call, dropout_p=0.1)


def packed_with_lengths(**changes: Any) -> dict[str, Any]:
    call = varlen(cu_seqlens_k=None, max_seqlen_k=None, seqused_k=ints(3, 5), causal=True)
    return call | changes


class TestPackedKeysWithLengths:
    """k and v (total_k, nheads_k, headdim), one sequence behind the other."""

    @pytest.mark.parametrize("dense_q", [False, True])
    @pytest.mark.parametrize("used", [None, ints(2, 0)])
    def test_varlen(self, dense_q: bool, used: Tensor | None) -> None:
        call = packed_with_lengths(seqused_q=used)
        if dense_q:
            call |= {"q": rand(2, 3, 4, 16), "cu_seqlens_q": None, "max_seqlen_q": None}
        got = fa3_ops.flash_attn_varlen_func(**call, return_softmax_lse=True)
        names = ("max_seqlen_q", "max_seqlen_k")
        close(got, reference.batched(**{n: x for n, x in call.items() if n not in names}))
        same(v4.flash_attn_varlen_func(**call, return_lse=True), got)

    def test_kvcache(self) -> None:
        call = packed_with_lengths(out=torch.empty(7, 4, 16))
        want = fa3_ops.flash_attn_varlen_func(**call | {"out": None}, return_softmax_lse=True)
        cache = {
            "k_cache": call.pop("k"),
            "v_cache": call.pop("v"),
            "cache_seqlens": call.pop("seqused_k"),
        }
        for name in ("cu_seqlens_k", "max_seqlen_k"):
            del call[name]
        same(fa3_ops.flash_attn_with_kvcache(**call, **cache, return_softmax_lse=True), want)
        assert torch.equal(call["out"], want[0])
        same(fa3_ops.flash_attn_with_kvcache(**call, **cache, seqused_q=ints(3, 4)), want[:1])

    def test_an_int_is_the_length_of_all(self) -> None:
        q, cache = rand(2, 3, 4, 16), rand(9, 2, 16)
        got = fa3_ops.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=4)
        pages = cache[:8].view(2, 4, 2, 16)
        assert torch.equal(got, fa3_ops.flash_attn_func(q, pages, pages))

    def test_gradients(self) -> None:
        call = packed_with_lengths()
        grads = []
        for change in ({}, {"cu_seqlens_k": ints(0, 3, 8), "max_seqlen_k": 5, "seqused_k": None}):
            inputs = [call[n].clone().requires_grad_() for n in "qkv"]
            out = fa3_ops.flash_attn_varlen_func(
                **call | dict(zip("qkv", inputs, strict=True)) | change
            )
            grads.append(torch.autograd.grad(out.square().sum(), inputs))
        same(*grads)

    def test_compiled(self) -> None:
        torch._dynamo.reset()
        step = torch.compile(
            lambda q, k, v, cu, used: fa3_ops.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=used, cu_seqlens_q=cu, max_seqlen_q=4, causal=True
            ),
            fullgraph=True,
            backend="aot_eager",
        )
        for lengths in (ints(3, 5), ints(4, 1)):
            call = packed_with_lengths(seqused_k=lengths)
            want = fa3_ops.flash_attn_varlen_func(**call)
            assert torch.equal(step(*(call[n] for n in "qkv"), call["cu_seqlens_q"], lengths), want)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"cache_seqlens": None}, "cache_seqlens must be given with a 3-dimensional k_cache"),
            ({"cache_seqlens": ints(5, 5)}, "cache_seqlens must sum to at most the 9 rows of k_c"),
            ({"cache_seqlens": ints(5, -1)}, "cache_seqlens must not be negative, got -1"),
            ({"cache_seqlens": ints(5, 1, 1)}, r"cache_seqlens must have shape \(2,\), got \(3,\)"),
            ({"cache_leftpad": ints(0, 0)}, "cache_leftpad must be None with a 3-dimensional"),
            ({"v_cache": rand(8, 2, 16)}, r"v_cache must have shape \(9, 2, headdim_v\)"),
            ({"k_cache": rand(9, 2, 8)}, r"k_cache must have shape \(total_k, nheads_k, 16\)"),
        ],
    )
    def test_refused(self, change: Any, text: str) -> None:
        call = {"k_cache": rand(9, 2, 16), "v_cache": rand(9, 2, 16), "cache_seqlens": ints(5, 4)}
        with pytest.raises(ValueError, match=text):
            fa3_ops.flash_attn_with_kvcache(**cached(**call | change))


class TestSequsedQ:
    @pytest.mark.parametrize("inputs", [cached, appending])
    def test_like_the_reference(self, inputs: Any) -> None:
        call = inputs(seqused_q=ints(2, 0), causal=True)
        copies = {n: x.clone() if isinstance(x, Tensor) else x for n, x in call.items()}
        close(
            fa3_ops.flash_attn_with_kvcache(**call, return_softmax_lse=True),
            reference.flash_attn_with_kvcache(**copies),
        )

    def test_refused_before_anything_is_written(self) -> None:
        call = appending(seqused_q=ints(2, 4))
        before = call["k_cache"].clone()
        with pytest.raises(ValueError, match=r"seqused_q\[1\] must be in \[0, 3\], got 4"):
            fa3_ops.flash_attn_with_kvcache(**call)
        assert torch.equal(call["k_cache"], before)


def paged(dtype: torch.dtype = torch.float32, page_size: int = 16) -> dict[str, Any]:
    """Two sequences of 200 keys and some, in pages whose order is drawn."""
    count = -(-256 // page_size)
    table = torch.randperm(2 * count).int().view(2, count)
    cache = (2 * count, page_size, 2, 32)
    return {
        "q": rand(2, 3, 4, 32, dtype=dtype),
        "k_cache": rand(*cache, dtype=dtype),
        "v_cache": rand(*cache, dtype=dtype),
        "cache_seqlens": ints(250, 203),
        "page_table": table,
    }


HIDDEN = {
    "window": ({"window_size": (20, 0)}, (227, 180)),
    "causal window": ({"window_size": (0, -1), "causal": True}, (247, 200)),
    "chunk": ({"attention_chunk": 100, "causal": True}, (200, 200)),
    "left padding": ({"cache_leftpad": ints(200, 100)}, (200, 100)),
    "no rows": ({"seqused_q": ints(0, 0)}, (250, 203)),
}


def hide(call: dict[str, Any], first: tuple[int, int]) -> dict[str, Any]:
    """Ids that are none for the pages before the first key that is seen, and past the end."""
    size = call["k_cache"].shape[1]
    hidden = call["page_table"].clone()
    for b, key in enumerate(first):
        hidden[b, : key // size] = -1
        hidden[b, -(-int(call["cache_seqlens"][b]) // size) :] = 2**30
    return call | {"page_table": hidden}


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("change", "first"), HIDDEN.values(), ids=HIDDEN)
def test_pages_that_no_row_sees_need_no_id(
    change: dict[str, Any], first: tuple[int, int], dtype: torch.dtype, page_size: int
) -> None:
    call = paged(dtype, page_size) | change
    want = fa3_ops.flash_attn_with_kvcache(**call, return_softmax_lse=True)
    same(fa3_ops.flash_attn_with_kvcache(**hide(call, first), return_softmax_lse=True), want)
    same(torch.ops.fa3npu.flash_attn_kvcache(**hide(call, first)), want)


def test_an_append_of_no_keys_to_left_padding_needs_no_page() -> None:
    call = paged() | {"k": rand(2, 0, 2, 32), "v": rand(2, 0, 2, 32)}
    call["cache_leftpad"] = call["cache_seqlens"] = ints(3, 1)  # of the first page
    call["page_table"] = torch.full_like(call["page_table"], -7)
    assert not fa3_ops.flash_attn_with_kvcache(**call).any()


@pytest.mark.parametrize("compiled", [False, True])
def test_an_append_needs_the_pages_that_it_writes_and_those_that_are_seen(compiled: bool) -> None:
    torch._dynamo.reset()
    function: Any = fa3_ops.flash_attn_with_kvcache
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    call = paged() | {"k": rand(2, 3, 2, 32), "v": rand(2, 3, 2, 32), "window_size": (20, 0)}
    copy = {n: x.clone() if isinstance(x, Tensor) else x for n, x in call.items()}
    hidden = call["page_table"].clone()
    hidden[0, :14], hidden[1, :11] = -1, -1
    want = fa3_ops.flash_attn_with_kvcache(**copy)
    assert torch.equal(function(**call | {"page_table": hidden}), want)
    assert torch.equal(call["k_cache"], copy["k_cache"])


@pytest.mark.parametrize(
    ("at", "text"),
    [((0, 14), r"page_table\[0, 14\]"), ((1, 12), r"\[1, 12\]"), ((0, 15), r"\[0, 15\]")],
)
def test_a_page_that_is_seen_or_written_needs_one(at: tuple[int, int], text: str) -> None:
    call = paged() | {"k": rand(2, 3, 2, 32), "v": rand(2, 3, 2, 32), "window_size": (20, 0)}
    before = call["k_cache"].clone()
    call["page_table"][at] = -1
    with pytest.raises(ValueError, match=text):
        fa3_ops.flash_attn_with_kvcache(**call)
    assert torch.equal(call["k_cache"], before)
    if at != (0, 15):
        with pytest.raises(ValueError, match=text):
            fa3_ops.flash_attn_with_kvcache(
                **{n: x for n, x in call.items() if n not in ("k", "v")}
            )


class TestRotaryTables:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_float32_beside_another_q(self, dtype: torch.dtype, interleaved: bool) -> None:
        x = rand(2, 3, 4, 16, dtype=dtype)
        cos, sin = rotary(32, 12)
        got = torch.ops.fa3npu.apply_rotary(x, cos, sin, ints(5, 17), None, interleaved)
        for b, first in enumerate((5, 17)):
            positions = torch.arange(first, first + 3)
            want = reference.rotate(x[b], cos, sin, positions, interleaved)
            torch.testing.assert_close(got[b], want, rtol=1e-5, atol=1e-5)
        if dtype != torch.float64:  # the table is not rounded first
            rounded = torch.ops.fa3npu.apply_rotary(
                x, cos.to(dtype), sin.to(dtype), ints(5, 17), None, interleaved
            )
            assert not torch.equal(got, rounded)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_append(self, dtype: torch.dtype) -> None:
        cos, sin = rotary(32, 16)
        call = {n: x.to(dtype) if x.is_floating_point() else x for n, x in appending().items()}
        call |= {"rotary_cos": cos, "rotary_sin": sin, "causal": True}
        copies = {n: x.clone() if isinstance(x, Tensor) else x for n, x in call.items()}
        want = reference.flash_attn_with_kvcache(**copies)
        close(fa3_ops.flash_attn_with_kvcache(**call, return_softmax_lse=True), want, 0.02)
        torch.testing.assert_close(call["k_cache"], copies["k_cache"])

    def test_autocast_does_not_round_them(self) -> None:
        cos, sin = rotary(32, 16)
        call = appending(rotary_cos=cos, rotary_sin=sin, causal=True)
        kept = ("rotary_cos", "rotary_sin", "cache_seqlens", "causal")
        halves = {n: x if n in kept else x.bfloat16() for n, x in call.items()}
        copies = {n: x.clone() if isinstance(x, Tensor) else x for n, x in halves.items()}
        want = fa3_ops.flash_attn_with_kvcache(**copies)
        with torch.autocast("cpu", torch.bfloat16):
            got = fa3_ops.flash_attn_with_kvcache(**halves | {n: call[n] for n in ("q", "k", "v")})
        assert torch.equal(got, want)
        assert torch.equal(halves["k_cache"], copies["k_cache"])

    def test_of_two_dtypes(self) -> None:
        cos, sin = rotary(32, 16)
        with pytest.raises(
            TypeError, match=r"rotary_sin must have dtype torch.float32 like rotary"
        ):
            fa3_ops.flash_attn_with_kvcache(**appending(rotary_cos=cos, rotary_sin=sin.double()))
        with pytest.raises(RuntimeError, match="rotary_sin must have the dtype of rotary_cos"):
            torch.ops.fa3npu.apply_rotary(rand(1, 3, 4, 16), cos, sin.double(), ints(0))


class TestSchedulerMetadata:
    def test_v2(self) -> None:
        assert v2.get_scheduler_metadata is fa3_ops.get_scheduler_metadata

    def test_v4(self) -> None:
        call = packed_with_lengths(cu_seqlens_k=ints(0, 4, 9), max_seqlen_k=5, seqused_k=None)
        made = v4.get_scheduler_metadata(
            *(4, 5, 4, 2, 16, 3), cu_seqlens_q=call["cu_seqlens_q"], seqused_k=ints(4, 5)
        )
        assert made.num_splits_dynamic_ptr.tolist() == [3, 3]
        same(
            v4.flash_attn_varlen_func(**call, scheduler_metadata=made),
            v4.flash_attn_varlen_func(**call),
        )

    def test_v4_refuses_other_lengths(self) -> None:
        with pytest.raises(ValueError, match=r"seqused_k must have shape \(2,\), got \(3,\)"):
            v4.get_scheduler_metadata(
                *(4, 5, 4, 2, 16, 3), cu_seqlens_q=ints(0, 1, 2), seqused_k=ints(1, 1, 1)
            )
        with pytest.raises(ValueError, match="one of cu_seqlens_q, cu_seqlens_k, seqused_q, seq"):
            v4.get_scheduler_metadata(4, 5, 4, 2, 16, 3)
