"""Random calls against the float64 reference, on NPU tensors, for every backend that can serve
them. Strides, poisoned memory and odd sizes as on CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_calls import (
    assert_close,
    assert_lse,
    examples,
    examples_of,
    for_kernels,
    rounds_keys,
    to_npu,
)
from sample_inputs import ints, rand
from strategies import (
    HEADDIMS,
    INT8_UNIT,
    assert_neighbours,
    cumulative,
    dense_calls,
    descale,
    hide_pages,
    kvcache_calls,
    lengths,
    scatter_calls,
    tensor,
    varlen_calls,
)
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.backends import fallback

pytestmark = pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
HALF = torch.float16
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
# Some that the kernels take of a cache, which is not padded, and FIA of packed q.
SOME_HEADDIMS = st.sampled_from([(16, 16), (32, 32), (128, 128), (192, 128)]) | HEADDIMS


@pytest.mark.usefixtures("any_kernel")
class TestFlashAttnFunc:
    @examples
    @given(for_kernels(dense_calls(DTYPES, SOME_HEADDIMS)))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        out, lse = fa3_ops.flash_attn_func(**to_npu(call), return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype, rounds_keys(call))


@pytest.mark.usefixtures("any_kernel")
class TestFlashAttnVarlenFunc:
    @examples
    @given(for_kernels(varlen_calls(DTYPES, SOME_HEADDIMS)))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
        out, lse = fa3_ops.flash_attn_varlen_func(**to_npu(call), **bounds, return_attn_probs=True)
        want, want_lse = reference.batched(**call)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype, rounds_keys(call))


@pytest.mark.usefixtures("any_kernel")
class TestFlashAttnWithKvcache:
    @examples
    @given(for_kernels(kvcache_calls(DTYPES, SOME_HEADDIMS)))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        hide_pages(call)
        device = to_npu(call)
        out, lse = fa3_ops.flash_attn_with_kvcache(**device, return_softmax_lse=True)
        plain = {k: v for k, v in call.items() if k != "max_seqlen_q"}
        want, want_lse = reference.flash_attn_with_kvcache(**plain)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype, rounds_keys(call))
        for name in ("k_cache", "v_cache"):
            got, want = device[name].cpu(), call[name]
            if want.dtype.itemsize == 1:
                assert_neighbours(got, want)
            else:
                torch.testing.assert_close(got, want, rtol=0.01, atol=1e-3, equal_nan=True)

    def test_quantises_what_lies_as_channels_last_does(self) -> None:
        """torch_npu lacks operators for such strides."""
        q, k, v = (x.permute(0, 3, 1, 2) for x in rand(3, 2, 2, 1, 3, dtype=torch.float16))
        assert k.is_contiguous(memory_format=torch.channels_last)
        caches = torch.zeros(2, 2, 4, 2, 1).to(torch.float8_e4m3fn)
        call = {"q": q, "k_cache": caches[0], "v_cache": caches[1], "k": k, "v": v}
        call |= {"cache_seqlens": torch.tensor([0, 1], dtype=torch.int32)}
        device = to_npu(call)
        out = fa3_ops.flash_attn_with_kvcache(**device)
        assert_close(out, reference.flash_attn_with_kvcache(**call)[0], torch.float16)
        for name in ("k_cache", "v_cache"):
            assert torch.equal(device[name].cpu().float(), call[name].float())


class TestKvcacheScatter:
    @pytest.mark.parametrize("backend", [None, "torch"])
    @examples
    @given(call=scatter_calls())
    def test_random_calls(self, backend: str | None, call: dict[str, Any]) -> None:
        device = to_npu(call)
        with fa3_ops.use_backend(backend) if backend else nullcontext():
            fa3_ops.kvcache_scatter_(**device)
        reference.scatter(**call)
        for name in ("k_cache", "v_cache"):
            got, want = (x[name].cpu().double() for x in (device, call))
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)

    def test_a_slot_behind_the_end_is_skipped(self) -> None:
        """The host does not wait to see it."""
        k, v, caches = rand(2, 2, 16), rand(2, 2, 16), rand(2, 2, 4, 2, 16)
        slots = torch.tensor([8, 1])
        got = caches.npu()
        fa3_ops.kvcache_scatter_(k.npu(), v.npu(), *got, slots.npu())
        caches[0, 0, 1], caches[1, 0, 1] = k[1], v[1]
        assert torch.equal(got.cpu(), caches)


class TestLinear:
    def given(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        shapes = {"x": (2, 3, 32), "weight": (7, 32), "bias": (7,)}
        return {name: rand(*shape, dtype=dtype) for name, shape in shapes.items()}

    def check(self, out: Tensor, call: dict[str, Tensor]) -> None:
        assert out.device.type == "npu"
        assert out.is_contiguous()
        assert out.dtype == call["x"].dtype
        torch.testing.assert_close(
            out.cpu().double(), reference.linear(**call), rtol=1e-2, atol=1e-2
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_without_the_package(self, dtype: torch.dtype) -> None:
        call = self.given(dtype)
        explained = fa3_ops.explain(fa3_ops.linear, **to_npu(call))
        assert (explained.backend, explained.bitwise) == ("torch", False)
        assert "batch_invariant_ops is not installed" in str(explained)
        fallback._warned.clear()
        with pytest.warns(fa3_ops.FallbackWarning, match="linear served by torch, because batch"):
            self.check(fa3_ops.linear(**to_npu(call)), call)

    @pytest.mark.parametrize("bias", [True, False])
    def test_with_the_package(
        self, batch_invariant_ops: list[tuple[Tensor, Tensor]], bias: bool
    ) -> None:
        call = self.given(torch.bfloat16)
        call = call if bias else call | {"bias": None}
        explained = fa3_ops.explain(fa3_ops.linear, **to_npu(call))
        assert (explained.backend, explained.bitwise) == ("batch_invariant_ops", True)
        assert not batch_invariant_ops
        self.check(fa3_ops.linear(**to_npu(call)), call)
        assert [(x.shape, y.shape) for x, y in batch_invariant_ops] == [((6, 32), (32, 7))]

    def test_what_the_package_does_not_serve(
        self, batch_invariant_ops: list[tuple[Tensor, Tensor]]
    ) -> None:
        call = to_npu(self.given())
        empty = {"x": call["x"][..., :0], "weight": call["weight"][:, :0]}
        assert fa3_ops.explain(fa3_ops.linear, **empty).backend == "torch"
        assert torch.equal(fa3_ops.linear(**empty).cpu(), torch.zeros(2, 3, 7))
        doubles = to_npu(self.given(torch.float64))
        assert fa3_ops.explain(fa3_ops.linear, **doubles).backend == "torch"
        none = {"x": call["x"][:0], "weight": call["weight"]}
        assert fa3_ops.linear(**none).shape == (0, 3, 7)
        assert not batch_invariant_ops

    def test_gradients(self) -> None:
        call = {name: x.npu().requires_grad_() for name, x in self.given().items()}
        fa3_ops.linear(**call).square().sum().backward()
        plain = {name: x.detach().cpu().double().requires_grad_() for name, x in call.items()}
        reference.linear(**plain).square().sum().backward()
        for name, x in call.items():
            torch.testing.assert_close(
                x.grad.cpu().double(), plain[name].grad, rtol=1e-2, atol=5e-2
            )


def apart(x: Any) -> Any:
    """Lengths and offsets of which every second element counts, other tensors as they are."""
    if not isinstance(x, Tensor) or x.dtype != torch.int32:
        return x
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), -7, dtype=torch.int32)
    wide[..., ::2] = x
    return wide.npu()[..., ::2]


@pytest.mark.usefixtures("any_kernel")
class TestStridedLengths:
    """Kernels that read lengths, offsets and page tables by address get contiguous ones."""

    def paged(self) -> dict[str, Any]:
        torch.manual_seed(0)
        pages = {name: rand(6, 128, 2, 128, dtype=torch.float16) for name in ("k_cache", "v_cache")}
        return pages | {
            "q": rand(2, 2, 4, 128, dtype=torch.float16),
            "cache_seqlens": ints(130, 70),
            "page_table": torch.randperm(6).int().view(2, 3),
        }

    def check(self, function: Any, call: dict[str, Any], flag: str, **keywords: Any) -> None:
        keywords |= {"causal": True, flag: True}
        want = function(**to_npu(call), **keywords)
        device = to_npu({name: x for name, x in call.items() if apart(x) is x})
        strided = {name: apart(x) for name, x in call.items() if apart(x) is not x}
        assert not any(x.is_contiguous() for x in strided.values())
        got = function(**device, **strided, **keywords)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g.cpu(), w.cpu())

    @pytest.mark.parametrize("extra", ["", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q"])
    def test_a_paged_cache(self, extra: str) -> None:
        call, keywords = self.paged(), {}
        if extra == "cu_seqlens_q":
            call |= {"q": call["q"].flatten(0, 1), extra: ints(0, 1, 4)}
            keywords = {"max_seqlen_q": 3}
        elif extra:
            call[extra] = ints(1, 0)
        self.check(fa3_ops.flash_attn_with_kvcache, call, "return_softmax_lse", **keywords)

    @pytest.mark.parametrize("packed", [True, False])
    def test_an_append_with_rotary(self, packed: bool) -> None:
        call, keywords = self.paged(), {}
        call |= {name: rand(2, 2, 2, 128, dtype=torch.float16) for name in "kv"}
        call |= {f"rotary_{name}": rand(300, 16, dtype=torch.float16) for name in ("cos", "sin")}
        call["rotary_seqlens"] = ints(3, 9)
        if packed:
            call |= {name: call[name].flatten(0, 1) for name in "qkv"}
            call |= {"cu_seqlens_q": ints(0, 1, 4), "cu_seqlens_k_new": ints(0, 3, 4)}
            keywords = {"max_seqlen_q": 3}
        self.check(fa3_ops.flash_attn_with_kvcache, call, "return_softmax_lse", **keywords)

    @pytest.mark.parametrize("used", [True, False])
    def test_packed_keys(self, used: bool) -> None:
        torch.manual_seed(0)
        call = {
            name: rand(9, h, 128, dtype=torch.float16)
            for name, h in zip("qkv", (4, 2, 2), strict=True)
        }
        call |= {"cu_seqlens_q": ints(0, 4, 9), "cu_seqlens_k": ints(0, 4, 9)}
        if used:
            call |= {"seqused_q": ints(3, 5), "seqused_k": ints(4, 2)}
        bounds = {"max_seqlen_q": 5, "max_seqlen_k": 5}
        self.check(fa3_ops.flash_attn_varlen_func, call, "return_attn_probs", **bounds)

    def test_gradients(self) -> None:
        torch.manual_seed(0)
        tensors = [rand(9, h, 64, dtype=torch.float16) for h in (4, 2, 2)]

        def gradients(lengths: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.npu().requires_grad_() for x in tensors]
            out = fa3_ops.flash_attn_varlen_func(*leaves, lengths, lengths, 5, 5, causal=True)
            return torch.autograd.grad(out.float().square().sum(), leaves)

        lengths = ints(0, 4, 9)
        for got, want in zip(gradients(apart(lengths)), gradients(lengths.npu()), strict=True):
            torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-2, atol=1e-2)

    def test_metadata(self) -> None:
        call = self.paged()
        call |= {"q": call["q"].flatten(0, 1), "cu_seqlens_q": ints(0, 1, 4)}

        def made(lengths: Any) -> Tensor:
            return fa3_ops.get_scheduler_metadata(
                *(2, 3, 384, 4, 2, 128, lengths(call["cache_seqlens"]), torch.float16),
                cu_seqlens_q=lengths(call["cu_seqlens_q"]),
                page_size=128,
                causal=True,
            )

        metadata = made(Tensor.npu)
        assert torch.equal(made(apart).cpu(), metadata.cpu())
        wide = torch.stack((metadata, metadata), dim=1)
        keywords = {"max_seqlen_q": 3, "causal": True}
        want = fa3_ops.flash_attn_with_kvcache(**to_npu(call), **keywords).cpu()
        for each in (metadata, wide[:, 0]):
            out = fa3_ops.flash_attn_with_kvcache(
                **to_npu(call), **keywords, scheduler_metadata=each
            )
            assert torch.equal(out.cpu(), want)


@pytest.mark.usefixtures("any_kernel")
@pytest.mark.parametrize("packed", [True, False])
def test_sinks_without_end(packed: bool) -> None:
    """-inf is no sink; +inf takes all weight. Rows that see no key stay 0 and -inf."""
    torch.manual_seed(0)
    call: dict[str, Any] = {"q": rand(2, 3, 4, 128, dtype=torch.float16)}
    call |= {name: rand(2, 9, 2, 128, dtype=torch.float16) for name in ("k_cache", "v_cache")}
    endless = float("inf")
    call["sinks"] = torch.tensor([-endless, 0.5, -endless, endless])
    call["cache_seqlens"] = ints(0, 2)
    keywords = {}
    if packed:
        call |= {"q": call["q"].flatten(0, 1), "cu_seqlens_q": ints(0, 3, 6)}
        keywords = {"max_seqlen_q": 3}
    want, want_lse = reference.flash_attn_with_kvcache(**call, causal=True)
    out, lse = fa3_ops.flash_attn_with_kvcache(
        **to_npu(call), **keywords, causal=True, return_softmax_lse=True
    )
    assert_close(out, want, torch.float16)
    assert_lse(lse, want_lse, torch.float16)
    assert {"inf", "-inf"} <= {str(x) for x in lse.cpu().flatten().tolist()}


class TestBitwise:
    """Where flash_attn_npu serves: lengths that its flash-decode cut would split, were it let."""

    LENGTHS = (1500, 1, 700, 1040)

    def cache(self) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        pages = {name: rand(48, 128, 1, 16, dtype=torch.float16) for name in ("k_cache", "v_cache")}
        return to_npu(pages), torch.randperm(48).int().view(4, 12).npu()

    def test_a_row_is_the_same_alone_and_in_any_batch(self) -> None:
        cache, page_table = self.cache()
        q = rand(4, 2, 16, dtype=torch.float16).npu()
        options = {"max_seqlen_q": 1, "causal": True, "return_softmax_lse": True}
        seqlens = ints(*self.LENGTHS).npu()
        cu_seqlens = ints(0, 1, 2, 3, 4).npu()
        out, lse = fa3_ops.flash_attn_with_kvcache(
            q,
            **cache,
            page_table=page_table,
            cache_seqlens=seqlens,
            cu_seqlens_q=cu_seqlens,
            **options,
        )
        for b in range(4):
            alone, alone_lse = fa3_ops.flash_attn_with_kvcache(
                q[b : b + 1],
                **cache,
                page_table=page_table[b : b + 1],
                cache_seqlens=seqlens[b : b + 1],
                cu_seqlens_q=ints(0, 1).npu(),
                **options,
            )
            assert torch.equal(out[b : b + 1].cpu(), alone.cpu())
            assert torch.equal(lse[:, b : b + 1].cpu(), alone_lse.cpu())

    def test_decode_is_prefill_is_training(self) -> None:
        cache, page_table = self.cache()
        length, last = 1100, 6
        k, v = (
            cache[name][page_table[0].long()].flatten(0, 1)[:length]
            for name in ("k_cache", "v_cache")
        )
        q = rand(last, 2, 16, dtype=torch.float16).npu()
        trained, _ = fa3_ops.flash_attn_varlen_func(
            *(q, k, v, ints(0, last).npu(), ints(0, length).npu(), last, length),
            causal=True,
            return_attn_probs=True,
        )
        for i in range(last):
            decoded = fa3_ops.flash_attn_with_kvcache(
                q[None, i : i + 1],
                **cache,
                page_table=page_table[:1],
                cache_seqlens=ints(length - last + 1 + i).npu(),
                causal=True,
            )
            assert torch.equal(decoded[0, 0].cpu(), trained[i].cpu())


@st.composite
def long_calls(draw: Any) -> dict[str, Any]:
    """A few rows over 1000 to 5000 keys in pages, which flash_attn_npu's flash-decode cuts, with
    what may go wrong there: short and empty sequences beside, windows, splits."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([HALF, torch.bfloat16]))
    batch, rows = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 5]))
    nheads, nheads_k = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]))
    page_size = draw(st.sampled_from([16, 128, 1024]))
    longest = draw(st.integers(1000, 5000))
    lengths = [longest, *draw(st.lists(st.integers(0, longest), min_size=2, max_size=2))][:batch]
    columns = -(-longest // page_size)
    shape = (batch * columns, page_size, nheads_k, 16)
    call: dict[str, Any] = {
        "k_cache": rand(*shape, dtype=dtype),
        "v_cache": rand(*shape, dtype=dtype),
        "cache_seqlens": ints(*lengths),
        "page_table": torch.randperm(batch * columns).int().view(batch, columns),
        "causal": draw(st.booleans()),
        "window_size": draw(st.sampled_from([(-1, -1), (-1, -1), (700, 0), (30, 4)])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 3.0])),
        "num_splits": draw(st.sampled_from([0, 1, 3])),
    }
    q_rows: tuple[int, ...] = (batch, rows)
    if draw(st.booleans()):
        call["cu_seqlens_q"] = cumulative(torch.randint(1, rows + 1, (batch,)))
        call["max_seqlen_q"] = rows
        q_rows = (int(call["cu_seqlens_q"][-1]),)
    return call | {"q": rand(*q_rows, nheads, 16, dtype=dtype)}


@pytest.mark.usefixtures("any_kernel")
class TestManyKeys:
    @examples_of(15)
    @given(long_calls())
    def test_eager(self, call: dict[str, Any]) -> None:
        out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), return_softmax_lse=True)
        plain = {k: v for k, v in call.items() if k not in ("max_seqlen_q", "num_splits")}
        want, want_lse = reference.flash_attn_with_kvcache(**plain)
        assert_close(out, want, call["q"].dtype)
        assert_lse(lse, want_lse, call["q"].dtype, rounds_keys(call))


@st.composite
def int8_decodes(draw: Any) -> dict[str, Any]:
    """One row of q a sequence over an int8 cache."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, nheads_k, columns = (draw(st.integers(1, 3)) for _ in range(3))
    d, page_size = draw(st.sampled_from([32, 64, 128])), draw(st.sampled_from([16, 32, 96, 128]))
    q_rows: tuple[int, ...] = (batch, 1)
    cache_rows = (batch, columns * page_size)
    call: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        call |= {"cu_seqlens_q": torch.arange(batch + 1).int(), "max_seqlen_q": 1}
        q_rows = (batch,)
    if draw(st.booleans()):
        call["page_table"] = torch.randperm(batch * columns).int().view(batch, columns)
        cache_rows = (batch * columns, page_size)
    call["cache_seqlens"] = lengths(draw, batch, columns * page_size)
    if draw(st.booleans()):
        call["cache_leftpad"] = (torch.rand(batch) * (call["cache_seqlens"] + 1)).int()
    for x in "kv":
        cache = (*cache_rows, nheads_k, d)
        call[f"{x}_cache"] = tensor(draw, cache, torch.int8, any_last=False)
        call[f"{x}_descale"] = descale(draw, batch, nheads_k) * INT8_UNIT
    nheads = nheads_k * draw(st.sampled_from([1, 2, 7]))
    dtype = draw(st.sampled_from([HALF, torch.bfloat16]))
    return call | {"q": rand(*q_rows, nheads, d, dtype=dtype)}


@examples
@given(int8_decodes())
def test_int8_is_read_by_the_fused_operator(call: dict[str, Any]) -> None:
    function, device = fa3_ops.flash_attn_with_kvcache, to_npu(call)
    explanation = fa3_ops.explain(function, **device)
    assert explanation.backend == "fused_infer_attention"
    assert "dequantised" not in str(explanation)
    out, lse = function(**device, return_softmax_lse=True)
    plain = {name: x for name, x in call.items() if name != "max_seqlen_q"}
    want, want_lse = reference.flash_attn_with_kvcache(**plain)
    assert_close(out, want, call["q"].dtype)
    assert_lse(lse, want_lse, call["q"].dtype)
