"""Which kernel serves a call on NPU, what explain() says of it, and the tables of every release."""

from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import nullcontext
from typing import Any, ClassVar

import expecttest
import pytest
import torch
from npu_calls import assert_close, assert_lse, to_npu
from npu_kernels import put
from sample_inputs import fp8, ints, rand
from strategies import INT8_UNIT, NARROW_DTYPES, narrowed
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.backends import Attention, Run
from fa3_ops.backends.lowering.lengths import Lengths
from fa3_ops.backends.npu import NPU, device
from fa3_ops.backends.npu.fused_infer_attention import FusedInferAttention

HALF = torch.float16


def decode(d: int = 128, page_size: int = 128, dtype: torch.dtype = HALF) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "q": rand(2, 1, 8, d, dtype=dtype),
        "k_cache": rand(6, page_size, 2, d, dtype=dtype),
        "v_cache": rand(6, page_size, 2, d, dtype=dtype),
        "cache_seqlens": ints(2 * page_size + 1, page_size),
        "page_table": ints(4, 2, 0, 1, 5, 3).view(2, 3),
        "causal": True,
    }


class TestExplain(expecttest.TestCase):
    def test_decode(self) -> None:
        text = str(fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **to_npu(decode())))
        self.assertExpectedInline(
            text,
            """flash_attn_kvcache: flash_attn_npu""",
        )

    def test_everything_lowered(self) -> None:
        call = decode(64, 32)
        call |= {
            "k": rand(2, 1, 2, 64, dtype=HALF),
            "v": rand(2, 1, 2, 64, dtype=HALF),
            "rotary_cos": rand(300, 16, dtype=HALF),
            "rotary_sin": rand(300, 16, dtype=HALF),
            "cache_leftpad": ints(3, 5),
            "cache_batch_idx": ints(1, 0),
            "sinks": rand(8),
        }
        npu = to_npu(call)
        before = npu["k_cache"].cpu()
        text = str(fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **npu))
        self.assertExpectedInline(
            text,
            """\
apply_rotary: torch
apply_rotary: torch
kvcache_append_: npu_scatter_pa_kv_cache
flash_attn_kvcache: flash_attn_npu
  cache_batch_idx selects rows of the page table
  k and v are read in place as pages of one token
  sinks rescale the result by its softmax_lse""",
        )
        assert torch.equal(npu["k_cache"].cpu(), before)

    def test_what_no_fused_kernel_has(self) -> None:
        call = decode(64, 7) | {"alibi_slopes": torch.rand(8), "attention_chunk": 8}
        with warnings.catch_warnings(record=True):
            text = str(fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **to_npu(call)))
        self.assertExpectedInline(
            text,
            """\
flash_attn_kvcache: torch
  copies what is read of k and v, because plain torch operators read them dense
  not flash_attn_npu: alibi_slopes, attention_chunk
  not fused_infer_attention: alibi_slopes, attention_chunk
  not triton: triton-ascend is not installed""",
        )

    def test_a_cache_that_has_to_be_copied(self) -> None:
        call = decode(64, 32)
        call["k_cache"] = call["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
        with warnings.catch_warnings(record=True):
            text = str(fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **to_npu(call)))
        self.assertExpectedInline(
            text,
            """\
flash_attn_kvcache: flash_attn_npu
  copies what is read of k and v, because its strides are not whole tokens""",
        )

    def test_on_cpu(self) -> None:
        text = str(fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **decode()))
        self.assertExpectedInline(text, """flash_attn_kvcache: cpu""")


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize(
    ("change", "bitwise"),
    [
        ({}, True),
        ({"num_splits": 2}, False),
        ({"sinks": rand(8)}, False),
        ({"attention_chunk": 8}, False),
    ],
    ids=str,
)
def test_bits_are_promised_where_they_are(change: dict[str, Any], bitwise: bool) -> None:
    call = to_npu(decode() | change)
    assert fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **call).bitwise == bitwise


def test_a_fallback_warns_once_with_the_reasons() -> None:
    call = to_npu(decode() | {"attention_chunk": 64})

    def three_times() -> None:
        for _ in range(3):
            fa3_ops.flash_attn_with_kvcache(**call)

    with pytest.warns(fa3_ops.FallbackWarning) as caught:
        three_times()
    assert [str(w.message) for w in caught] == [
        "fa3_ops: served by torch, because flash_attn_npu: attention_chunk; "
        "fused_infer_attention: attention_chunk; triton: triton-ascend is not installed"
    ]


def test_strict_makes_a_fallback_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3NPU_STRICT", "1")
    fa3_ops.flash_attn_with_kvcache(**to_npu(decode()))
    with pytest.raises(NotImplementedError, match=r"attention_chunk.*FA3NPU_STRICT=1"):
        fa3_ops.flash_attn_with_kvcache(**to_npu(decode() | {"attention_chunk": 64}))
    strided = decode(64, 32)
    strided["k_cache"] = strided["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(NotImplementedError, match="copies what is read of the cache"):
        fa3_ops.flash_attn_with_kvcache(**to_npu(strided))


def test_a_backend_asked_for_by_name_serves_or_says_why_not() -> None:
    call = to_npu(decode())
    results = []
    for name in ("flash_attn_npu", "fused_infer_attention", "torch"):
        with fa3_ops.use_backend(name):
            results.append(fa3_ops.flash_attn_with_kvcache(**call).cpu())
    for result in results:
        assert_close(result, results[2].double(), HALF)
    assert not torch.equal(results[0], results[2])  # they really are different kernels
    with (
        fa3_ops.use_backend("fused_infer_attention"),
        pytest.raises(NotImplementedError, match="cannot serve the call: softcap"),
    ):
        fa3_ops.flash_attn_with_kvcache(**call, softcap=3.0)
    with fa3_ops.use_backend("cuda"), pytest.raises(ValueError, match="got cuda"):
        fa3_ops.flash_attn_with_kvcache(**call)


def test_float64_is_refused_with_the_reasons() -> None:
    call = to_npu(decode(dtype=torch.float64))
    with pytest.raises(NotImplementedError, match=r"torch: dtype torch\.float64"):
        fa3_ops.flash_attn_with_kvcache(**call)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
def test_without_flash_attn_npu_the_fused_operator_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "none")
    for call in (decode(), decode() | {"window_size": (60, 0)}, decode() | {"sinks": rand(8)}):
        want, want_lse = reference.flash_attn_with_kvcache(**call)
        explanation = fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **to_npu(call))
        windowed = "window_size" in call  # a rule of the operator for one row of q
        assert explanation.backend == ("torch" if windowed else "fused_infer_attention")
        out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), return_softmax_lse=True)
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize(
    "call",
    [
        {"causal": True},
        {"causal": True, "window_size": (30, 0)},
        {"window_size": (9, 20)},
        {"cache_leftpad": ints(3, 60)},
        {"cache_batch_idx": ints(1, 0)},
        {"cache_seqlens": ints(3, 0), "causal": True},
        {"sinks": rand(8), "causal": True},
    ],
    ids=lambda call: " ".join(call),
)
def test_the_fused_operator_with_many_rows(
    call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, "none")
    call = decode() | {"q": rand(2, 40, 8, 128, dtype=HALF), "causal": False} | call
    want, want_lse = reference.flash_attn_with_kvcache(**call)
    with fa3_ops.use_backend("fused_infer_attention"):
        out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), return_softmax_lse=True)
    assert_close(out, want, HALF)
    assert_lse(lse, want_lse, HALF)


@pytest.mark.parametrize(("first", "behind"), [(3, 0), (0, 3)])
def test_the_fused_operator_with_packed_keys_before_the_first_sequence(
    first: int, behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the ends of sequences only, the first of which begins at 0."""
    put(monkeypatch, "none")
    torch.manual_seed(0)
    keys = {name: rand(30 + first + behind, 2, 128, dtype=HALF) for name in "kv"}
    call = {"q": rand(8, 8, 128, dtype=HALF), **keys}
    call |= {"cu_seqlens_q": ints(0, 5, 8), "cu_seqlens_k": ints(0, 17, 30) + first}
    want, want_lse = reference.batched(**call, causal=True)
    with fa3_ops.use_backend("fused_infer_attention"):
        out, lse = fa3_ops.flash_attn_varlen_func(
            **to_npu(call), max_seqlen_q=5, max_seqlen_k=17, causal=True, return_attn_probs=True
        )
    assert_close(out, want, HALF)
    assert_lse(lse, want_lse, HALF)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_the_fused_operator_with_packed_q(
    paged: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, "none")
    torch.manual_seed(0)
    call: dict[str, Any] = {"q": rand(14, 8, 128, dtype=HALF), "cu_seqlens_q": ints(0, 5, 5, 13)}
    if paged:
        name = "flash_attn_with_kvcache"
        cache = decode()
        call |= {x: cache[x] for x in ("k_cache", "v_cache")}
        call |= {"page_table": ints(4, 2, 0, 1, 5, 3).view(3, 2), "cache_seqlens": ints(200, 3, 0)}
        truth, flag = reference.flash_attn_with_kvcache, "return_softmax_lse"
    else:
        name = "flash_attn_varlen_func"
        call |= {"k": rand(40, 2, 128, dtype=HALF), "v": rand(40, 2, 128, dtype=HALF)}
        call |= {"cu_seqlens_k": ints(0, 17, 17, 40)}
        if used:
            call |= {"seqused_q": ints(4, 0, 6), "seqused_k": ints(9, 0, 20)}
        truth, flag = reference.batched, "return_attn_probs"
    want, want_lse = truth(**call, causal=True)
    bounds = {"max_seqlen_q": 8} | ({} if paged else {"max_seqlen_k": 23})
    with fa3_ops.use_backend("fused_infer_attention"):
        function = getattr(fa3_ops, name)
        out, lse = function(**to_npu(call), **bounds, causal=True, **{flag: True})
    assert_close(out, want, HALF)
    assert_lse(lse, want_lse, HALF)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
class TestFusedOperatorOfRelease:
    """Layout TND: what CANN documents of each release; see capabilities.py."""

    @pytest.fixture(autouse=True)
    def none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        put(monkeypatch, "none")

    def packed(
        self, headdim: int = 128, headdim_v: int = 128, dtype: torch.dtype = HALF, nheads: int = 8
    ) -> dict[str, Any]:
        torch.manual_seed(0)
        return {
            "q": rand(8, nheads, headdim, dtype=dtype),
            "k": rand(30, 8, headdim, dtype=dtype),
            "v": rand(30, 8, headdim_v, dtype=dtype),
            "cu_seqlens_q": ints(0, 5, 8),
            "cu_seqlens_k": ints(0, 17, 30),
        }

    BOUNDS: ClassVar = {"max_seqlen_q": 5, "max_seqlen_k": 28}
    BFLOAT: ClassVar = {"dtype": torch.bfloat16}

    def reasons(self, call: dict[str, Any], **keywords: Any) -> str:
        """Of FIA against the call; empty if it serves."""
        function = fa3_ops.flash_attn_varlen_func
        explanation = fa3_ops.explain(function, **to_npu(call), **self.BOUNDS, **keywords)
        why = explanation.steps[-1].refusals.get("fused_infer_attention", [])
        assert explanation.backend == ("torch" if why else "fused_infer_attention")
        return ", ".join(why)

    @pytest.mark.parametrize(
        ("release", "call", "keywords", "why"),
        [
            ((8, 2), {"headdim": 192, **BFLOAT}, {"causal": True}, ""),
            ((8, 2), {"headdim": 192, "headdim_v": 192, **BFLOAT}, {"causal": True}, ""),
            ((8, 2), BFLOAT, {"causal": True}, "headdim 128 and headdim_v 128 of packed q"),
            ((8, 2), {"headdim": 192}, {"causal": True}, "dtype torch.float16 of packed q"),
            ((8, 2), {"headdim": 192, **BFLOAT}, {}, "packed q without a causal mask"),
            (
                (8, 2),
                {"headdim": 192, "nheads": 16, **BFLOAT},
                {"causal": True},
                "nheads 16 of nheads_k 8 of packed q",
            ),
            (None, BFLOAT, {"causal": True}, "CANN 8.2 or unknown"),
            ((8, 3), BFLOAT, {"causal": True}, ""),
            ((8, 3), BFLOAT, {}, ""),
            ((8, 3), {}, {"causal": True}, "dtype torch.float16 of packed q (CANN 8.3)"),
            ((8, 5), {}, {"causal": True}, ""),
            ((8, 5), {}, {}, ""),
            ((8, 5), {"headdim": 192}, {}, ""),
            ((8, 5), {"headdim": 192, "headdim_v": 192}, {"causal": True}, ""),
            ((8, 5), {"headdim": 192, "headdim_v": 192}, {}, "without a causal mask"),
            ((8, 5), {"headdim": 64, "headdim_v": 64}, {"causal": True}, "headdim 64"),
            ((9, 1), {}, {}, ""),
        ],
        ids=str,
    )
    def test_packed_keys(
        self,
        release: tuple[int, int] | None,
        call: dict[str, Any],
        keywords: dict[str, Any],
        why: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(device, "cann_release", lambda: release)
        reasons = self.reasons(self.packed(**call), **keywords)
        assert why in reasons
        assert bool(why) == bool(reasons)

    @pytest.mark.parametrize("release", [(8, 2), (8, 3), (8, 5)])
    def test_what_needs_a_page_table(
        self, release: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(device, "cann_release", lambda: release)
        width = 192 if release == (8, 2) else 128
        old = release < (8, 5)
        why = "packed q over keys that need a page table" if old else ""
        plain = self.packed(width, **self.BFLOAT)
        assert self.reasons(plain, causal=True) == ""
        for more in (
            {"seqused_k": ints(17, 9)},
            {"seqused_q": ints(5, 2)},
            {"cu_seqlens_q": ints(1, 5, 8)},
            {"cu_seqlens_k": ints(0, 17, 29)},
        ):
            assert why in self.reasons(plain | more, causal=True)
        few = plain | {"cu_seqlens_k": ints(0, 2, 30)}
        why = "causal packed q with more rows than keys" if old else ""
        assert why in self.reasons(few, causal=True)
        cache = decode(dtype=torch.bfloat16) | {"cu_seqlens_q": ints(0, 1, 2)}
        cache["q"] = cache["q"].flatten(0, 1)
        function = fa3_ops.flash_attn_with_kvcache
        backend = fa3_ops.explain(function, **to_npu(cache), max_seqlen_q=1).backend
        assert backend == ("torch" if old else "fused_infer_attention")

    def test_what_the_release_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch_npu

        for said, release in (
            ("8.5.0", (8, 5)),
            ("8.3.RC1", (8, 3)),
            ("9.10.1", (9, 10)),
            ("", None),
        ):
            monkeypatch.setattr(torch_npu.npu.utils, "get_cann_version", lambda said=said: said)
            assert device.cann_release.__wrapped__() == release
        monkeypatch.delattr(torch_npu.npu.utils, "get_cann_version")
        assert device.cann_release.__wrapped__() is None

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("rows", [1, 4])
    @pytest.mark.parametrize("layout", ["packed", "paged", "seqused_q"])
    def test_packed_q_never_goes_without_a_mask(
        self, layout: str, rows: int, causal: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """vllm-ascend #13699: sparse_mode 0 in layout TND gives a uniform average."""
        import torch_npu

        modes = []
        fused = torch_npu.npu_fused_infer_attention_score

        def spy(*arguments: Any, **keywords: Any) -> Any:
            assert keywords["input_layout"] == "TND"
            assert keywords["atten_mask"] is not None
            ends = keywords["pre_tokens"], keywords["next_tokens"]
            # A kernel adds lengths to them in 32 bits.
            assert max(ends) + max(keywords["actual_seq_lengths_kv"]) < 2**31
            modes.append(keywords["sparse_mode"])
            return fused(*arguments, **keywords)

        monkeypatch.setattr(torch_npu, "npu_fused_infer_attention_score", spy)
        call = decode() | {"causal": causal, "q": rand(2, rows, 8, 128, dtype=HALF)}
        bounds = {"max_seqlen_q": rows}
        if layout == "seqused_q":
            call = {"q": call["q"], "k": rand(2, 30, 2, 128, dtype=HALF), "causal": causal}
            call |= {"v": call["k"].clone(), "seqused_q": ints(1, rows)}
            function, truth = torch.ops.fa3npu.flash_attn_varlen_func, reference.batched
            device_call = to_npu(call) | {"cu_seqlens_q": None, "cu_seqlens_k": None}
            device_call |= {"max_seqlen_q": None, "max_seqlen_k": None}
        else:
            call |= {"q": call["q"].flatten(0, 1), "cu_seqlens_q": ints(0, rows, 2 * rows)}
            function, truth = fa3_ops.flash_attn_with_kvcache, reference.flash_attn_with_kvcache
            if layout == "packed":
                keys = self.packed()
                call = {x: call[x] for x in ("q", "cu_seqlens_q", "causal")}
                call |= {x: keys[x] for x in ("k", "v", "cu_seqlens_k")}
                function, truth = fa3_ops.flash_attn_varlen_func, reference.batched
                bounds["max_seqlen_k"] = 17
            device_call = to_npu(call) | bounds
        want, _ = truth(**call)
        with fa3_ops.use_backend("fused_infer_attention"):
            out = function(**device_call)
        assert_close(out[0] if isinstance(out, tuple) else out, want, HALF)
        assert modes == [3 if causal else 4]

    def test_limits_of_every_layout(self) -> None:
        """Refused by the operator, or past what its documentation promises."""
        meta = {"device": "meta", "dtype": HALF}

        def reasons(
            q: tuple[int, ...], k: tuple[int, ...], most_k: int = 1, rows: int = 1, **keywords: Any
        ) -> list[str]:
            keys = torch.empty(k, **meta)
            call = Attention(torch.empty(q, **meta), keys, keys, is_cache=True, **keywords)
            lengths = Lengths(None, None, [rows], [most_k], plain=True)
            run = Run(call, NPU, capturing=False, host_may_wait=True, lengths=lengths)
            return FusedInferAttention().not_supported_reasons(call, run)

        assert reasons((1, 1, 128, 256), (9, 128, 128, 256)) == []
        assert "nheads_k 256 of 256" in reasons((1, 1, 256, 256), (9, 128, 256, 256))
        assert "2147483648 elements of k" in reasons((1, 1, 8, 128), (2**14, 128, 8, 128))
        many = {"most_k": 262145}
        assert "262144 keys" in ", ".join(reasons((1, 1, 8, 128), (9, 2**20, 8, 128), **many))
        assert reasons((1, 2, 8, 128), (1, 2**20, 8, 128), rows=2, **many) == []
        ends = {"cu_seqlens_q": torch.empty(4096, device="meta"), "max_seqlen_q": 1}
        assert "4095 packed sequences" in ", ".join(reasons((5, 8, 128), (9, 128, 8, 128), **ends))


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
class TestReleasesBefore03:
    """cu_seqlens_q relative to its first entry, softmax_lse token-major."""

    @pytest.fixture(autouse=True)
    def old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        put(monkeypatch, "0.2 for 910")

    @pytest.mark.parametrize("first", [0, 4])
    def test_packed_q(self, first: int) -> None:
        torch.manual_seed(0)
        call = decode() | {"q": rand(20, 8, 128, dtype=HALF)}
        call["cu_seqlens_q"] = ints(first, first + 3, first + 9)
        want, want_lse = reference.flash_attn_with_kvcache(**call)
        with fa3_ops.use_backend("flash_attn_npu"):
            out, lse = fa3_ops.flash_attn_with_kvcache(
                **to_npu(call), max_seqlen_q=6, return_softmax_lse=True
            )
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)

    def test_dense_q(self) -> None:
        call = decode() | {"q": rand(2, 3, 8, 128, dtype=HALF)}
        want, want_lse = reference.flash_attn_with_kvcache(**call)
        with fa3_ops.use_backend("flash_attn_npu"):
            out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), return_softmax_lse=True)
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)

    def test_activations_have_no_lengths_and_become_pages(self) -> None:
        call = {name: rand(2, 40, h, 64, dtype=HALF) for name, h in (("q", 4), ("k", 2), ("v", 2))}
        want, want_lse = reference.batched(**call, causal=True)
        with fa3_ops.use_backend("flash_attn_npu"):
            out, lse = fa3_ops.flash_attn_func(**to_npu(call), causal=True, return_attn_probs=True)
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)

    @pytest.mark.parametrize(
        "call",
        [
            {"window_size": (5, 0)},
            {"softcap": 2.0},
            {"q": rand(2, 9, 8, 128, dtype=HALF), "cache_seqlens": ints(8, 40)},
        ],
        ids=lambda call: " ".join(call),
    )
    def test_what_it_lacks_is_served_otherwise(self, call: dict[str, Any]) -> None:
        call = decode() | call
        want, _ = reference.flash_attn_with_kvcache(**call)
        explanation = fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **to_npu(call))
        assert explanation.backend in ("fused_infer_attention", "torch")
        assert_close(fa3_ops.flash_attn_with_kvcache(**to_npu(call)), want, HALF)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
class TestRelease03:
    @pytest.fixture(autouse=True)
    def older(self, monkeypatch: pytest.MonkeyPatch) -> None:
        put(monkeypatch, "0.3 for 910")

    @staticmethod
    def packed(longest: int, **call: Any) -> dict[str, Any]:
        """Decode of packed rows, with the longest of two caches."""
        cu_seqlens = {"cu_seqlens_q": ints(0, 1, 2), "cache_seqlens": ints(longest, 70)}
        rows = {"q": rand(2, 8, 128, dtype=HALF), "max_seqlen_q": 1}
        table = {"page_table": torch.randperm(18).int().view(2, 9)}
        cache = {name: rand(18, 128, 2, 128, dtype=HALF) for name in ("k_cache", "v_cache")}
        return decode() | cu_seqlens | rows | table | cache | call

    @pytest.mark.parametrize(
        ("call", "lacks"),
        [
            ({}, ""),
            ({"window_size": (200, 0)}, "window_size over 1024 keys"),
            ({"window_size": (200, 0), "cache_seqlens": ints(1023, 70)}, ""),
            ({"causal": False}, ""),
        ],
        ids=["causal", "window", "window of fewer keys", "no mask"],
    )
    def test_packed_decode(self, call: dict[str, Any], lacks: str) -> None:
        call = self.packed(1100, **call)
        self.check(call, lacks)

    @pytest.mark.parametrize("window_size", [(-1, -1), (40, 0), (39, 0)])
    @pytest.mark.parametrize("seqlens", [(8, 40), (9, 40)])
    def test_causal_of_fewer_keys_than_rows(
        self, seqlens: tuple[int, int], window_size: tuple[int, int]
    ) -> None:
        """A window that reaches past every key is causal to the kernel."""
        call = decode() | {"q": rand(2, 9, 8, 128, dtype=HALF), "cache_seqlens": ints(*seqlens)}
        call |= {"causal": window_size == (-1, -1), "window_size": window_size}
        lost = seqlens[0] < 9 and window_size != (39, 0)
        self.check(call, "causal with more rows" if lost else "")

    @staticmethod
    def check(call: dict[str, Any], lacks: str) -> None:
        plain = {name: x for name, x in call.items() if name != "max_seqlen_q"}
        want, want_lse = reference.flash_attn_with_kvcache(**plain)
        explanation = fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **to_npu(call))
        assert (explanation.backend == "flash_attn_npu") == (not lacks)
        assert lacks in str(explanation)
        out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), return_softmax_lse=True)
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
class TestAscend950:
    @pytest.fixture(autouse=True)
    def newer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        put(monkeypatch, "0.4 for 950")

    @pytest.mark.parametrize(
        "call",
        [
            {},
            {"q": rand(2, 3, 8, 128, dtype=HALF)},
            {"cache_seqlens": ints(0, 40)},
            {"cache_leftpad": ints(3, 60)},  # no pages of one token here: gathered
            {"cache_batch_idx": ints(1, 0)},
            {"window_size": (5, 0)},
            {"softcap": 2.0},
            decode(80),
        ],
        ids=lambda call: " ".join(call) or "plain",
    )
    def test_served(self, call: dict[str, Any]) -> None:
        call = decode() | call
        want, want_lse = reference.flash_attn_with_kvcache(**call)
        with fa3_ops.use_backend("flash_attn_npu"):
            out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), return_softmax_lse=True)
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)

    def test_small_pages_are_gathered(self) -> None:
        call = decode(64, 16)
        want, want_lse = reference.flash_attn_with_kvcache(**call)
        with fa3_ops.use_backend("flash_attn_npu"):
            out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), return_softmax_lse=True)
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)

    @pytest.mark.parametrize("first", [0, 2])
    def test_packed_q_with_sequences_without_rows(self, first: int) -> None:
        call = decode() | {"q": rand(11, 8, 128, dtype=HALF)}
        call |= {"page_table": ints(4, 2, 0, 1, 5, 3).view(3, 2), "cache_seqlens": ints(9, 200, 0)}
        call["cu_seqlens_q"] = ints(0, 4, 4, 7) + first
        want, want_lse = reference.flash_attn_with_kvcache(**call)
        with fa3_ops.use_backend("flash_attn_npu"):
            out, lse = fa3_ops.flash_attn_with_kvcache(
                **to_npu(call), max_seqlen_q=4, return_softmax_lse=True
            )
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)

    def test_no_row_is_one_of_a_sequence(self) -> None:
        call = {name: rand(3, h, 64, dtype=HALF) for name, h in (("q", 4), ("k", 2), ("v", 2))}
        call |= {"cu_seqlens_q": ints(0, 0, 0), "cu_seqlens_k": ints(0, 2, 3)}
        out, lse = fa3_ops.flash_attn_varlen_func(
            **to_npu(call), max_seqlen_q=1, max_seqlen_k=2, return_attn_probs=True
        )
        assert (out == 0).all()
        assert (lse == float("-inf")).all()

    def test_a_window_over_fewer_keys_than_rows(self) -> None:
        """The sequence with most keys has no rows, and so is not seen by the kernel."""
        call = {name: rand(n, h, 64, dtype=HALF) for name, n, h in (("q", 6, 4), ("k", 10, 2))}
        call |= {"v": rand(10, 2, 64, dtype=HALF), "window_size": (0, -1)}
        call |= {"cu_seqlens_q": ints(0, 0, 6), "cu_seqlens_k": ints(0, 8, 10)}
        want, want_lse = reference.batched(**call)
        out, lse = fa3_ops.flash_attn_varlen_func(
            **to_npu(call), max_seqlen_q=6, max_seqlen_k=8, return_attn_probs=True
        )
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)

    @pytest.mark.parametrize("used", [(3, 4), (0, 4), (0, 0)], ids=str)
    def test_unused_rows(self, used: tuple[int, int]) -> None:
        call = {name: rand(7, h, 64, dtype=HALF) for name, h in (("q", 4), ("k", 2), ("v", 2))}
        call |= {"cu_seqlens_q": ints(0, 3, 7), "cu_seqlens_k": ints(0, 3, 7)}
        call["seqused_q"] = ints(*used)
        want, want_lse = reference.batched(**call, causal=True)
        with fa3_ops.use_backend("flash_attn_npu"):
            out, lse = fa3_ops.flash_attn_varlen_func(
                **to_npu(call), max_seqlen_q=4, max_seqlen_k=4, causal=True, return_attn_probs=True
            )
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)

    def test_packed_keys_with_sequences_without_rows(self) -> None:
        torch.manual_seed(0)
        call = {name: rand(20, h, 64, dtype=HALF) for name, h in (("q", 4), ("k", 2), ("v", 2))}
        call |= {"cu_seqlens_q": ints(0, 9, 9, 20), "cu_seqlens_k": ints(0, 8, 15, 20)}
        want, want_lse = reference.batched(**call, causal=True)
        with fa3_ops.use_backend("flash_attn_npu"):
            out, lse = fa3_ops.flash_attn_varlen_func(
                **to_npu(call), max_seqlen_q=11, max_seqlen_k=8, causal=True, return_attn_probs=True
            )
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)

    def test_training(self) -> None:
        leaves = [rand(2, 9, h, 64, dtype=HALF) for h in (4, 2, 2)]
        device_leaves = [x.npu().requires_grad_() for x in leaves]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fa3_ops.flash_attn_func(*device_leaves, causal=True).sum().backward()
        double = [x.double().requires_grad_() for x in leaves]
        reference.batched(*double, causal=True)[0].sum().backward()
        for got, want in zip(device_leaves, double, strict=True):
            assert got.grad is not None
            torch.testing.assert_close(got.grad.cpu().double(), want.grad, rtol=0.02, atol=0.02)

    def test_a_windowed_backward_is_served_otherwise(self) -> None:
        leaves = [rand(1, 9, 2, 64, dtype=HALF).npu().requires_grad_() for _ in range(3)]
        out = fa3_ops.flash_attn_func(*leaves, window_size=(3, 0))
        with pytest.warns(fa3_ops.FallbackWarning, match="flash_attn_npu: window_size"):
            out.sum().backward()

    def test_a_backward_by_the_name_of_its_forward(self) -> None:
        leaves = [rand(1, 9, 2, 64, dtype=HALF).npu().requires_grad_() for _ in range(3)]
        with fa3_ops.use_backend("flash_attn_npu"):
            out = fa3_ops.flash_attn_func(*leaves, window_size=(3, 0))
        with pytest.raises(NotImplementedError, match=r"flash_attn_npu cannot serve.*window_size"):
            out.sum().backward()


def test_importing_us_needs_no_torch_npu() -> None:
    code = (
        "import fa3_ops, sys; "
        "assert not [m for m in sys.modules if m.startswith(('torch_npu', 'torchair'))]"
    )
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
def test_fp8_is_dequantised() -> None:
    descale: Tensor = 0.5 + torch.rand(2, 2)
    call = decode(64, 16)
    call |= {"q": fp8(2, 1, 8, 64), "k_cache": fp8(6, 16, 2, 64), "v_cache": fp8(6, 16, 2, 64)}
    call |= {"q_descale": descale, "k_descale": descale, "v_descale": descale}
    want, _ = reference.flash_attn_with_kvcache(**call)
    out = fa3_ops.flash_attn_with_kvcache(**to_npu(call))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.cpu().double(), want, rtol=2.0**-8, atol=5e-3)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize("cache", NARROW_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2), (2,), (1,), ()], ids=str)
def test_what_is_read_of_a_narrow_cache_is_dequantised(
    cache: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    both = narrowed(torch.randn(6, 2, 16, 128), cache).transpose(1, 2)  # as vLLM has them
    descale = (0.5 + torch.rand(shape)) * (INT8_UNIT if cache == torch.int8 else 1)
    call = decode(64, 16) | {"k_cache": both[..., :64], "v_cache": both[..., 64:]}
    call |= {"q": rand(2, 2, 8, 64, dtype=HALF)}  # one row over int8 is read as it is
    call |= {"q_descale": descale, "k_descale": descale, "v_descale": descale}
    want, want_lse = reference.flash_attn_with_kvcache(**call)
    out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call), return_softmax_lse=True)
    assert out.dtype == call["q"].dtype
    assert_close(out, want, call["q"].dtype)
    assert_lse(lse, want_lse, call["q"].dtype)
    name = "int8" if cache == torch.int8 else "FP8"
    said = f"copies what is read of the cache, because {name} is dequantised"
    text = str(fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **to_npu(call)))
    assert f"because {name} is dequantised" in text
    monkeypatch.setenv("FA3NPU_STRICT", "1")
    with pytest.raises(NotImplementedError, match=said):
        fa3_ops.flash_attn_with_kvcache(**to_npu(call))


def narrow_decode(dtype: torch.dtype = HALF, shape: tuple[int, ...] = (2, 2)) -> dict[str, Any]:
    """One row of q a sequence over an int8 cache."""
    call = decode(64, 32, dtype)
    keys = {x: narrowed(torch.randn(call[x].shape), torch.int8) for x in ("k_cache", "v_cache")}
    scales = {x: (0.5 + torch.rand(shape)) * INT8_UNIT for x in ("k_descale", "v_descale")}
    return call | keys | scales


class TestInt8ReadAsItIs:
    """By FIA's antiquant: nothing is dequantised, and so nothing falls back."""

    @pytest.fixture(autouse=True)
    def strict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FA3NPU_STRICT", "1")

    @staticmethod
    def check(call: dict[str, Any], dtype: torch.dtype = HALF, **bounds: Any) -> str:
        """How it is served."""
        want, want_lse = reference.flash_attn_with_kvcache(**call)
        function, on_npu = fa3_ops.flash_attn_with_kvcache, to_npu(call) | bounds
        out, lse = function(**on_npu, return_softmax_lse=True)
        assert_close(out, want, dtype)
        assert_lse(lse, want_lse, dtype)
        explanation = fa3_ops.explain(function, **on_npu)
        assert explanation.backend == "fused_infer_attention"
        assert not explanation.bitwise
        text = str(explanation)
        assert "k and v of 8 bits are read as they are" in text
        assert "dequantised" not in text
        return text

    @pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(2, 2), (2,), (1,), ()], ids=str)
    def test_descales(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        text = self.check(narrow_decode(dtype, shape), dtype)
        assert "copies" not in text
        assert "not flash_attn_npu" not in text

    @pytest.mark.parametrize(
        "change",
        [
            {"k_descale": None},
            {"sinks": rand(8)},
            {"cache_seqlens": ints(3, 0)},
            {"cache_batch_idx": ints(1, 0)},
            {"page_table": ints(4, 99, 0, 1, 5, 3).view(2, 3), "cache_seqlens": ints(9, 96)},
        ],
        ids=lambda change: " ".join(change),
    )
    def test_calls(self, change: dict[str, Any]) -> None:
        self.check(narrow_decode() | change)

    def test_descales_are_not_rounded(self) -> None:
        """Those of a head would have the dtype of q, in which this one is 0."""
        call = narrow_decode() | {"v_descale": torch.tensor(1e-8)}
        call |= {"v_cache": torch.full((6, 32, 2, 64), 100, dtype=torch.int8)}
        out = fa3_ops.flash_attn_with_kvcache(**to_npu(call))
        torch.testing.assert_close(out.cpu(), torch.full_like(out.cpu(), 1e-6), rtol=0, atol=6e-8)

    def test_packed_rows(self) -> None:
        """As vLLM gives them."""
        call = narrow_decode() | {"cu_seqlens_q": ints(0, 1, 2)}
        call["q"] = call["q"].flatten(0, 1)
        self.check(call, max_seqlen_q=1)

    def test_dense_cache(self) -> None:
        call = {x: t for x, t in narrow_decode().items() if x != "page_table"}
        caches = {x: call[x].view(2, 96, 2, 64) for x in ("k_cache", "v_cache")}
        self.check(call | caches)
        self.check(call | caches | {"cache_seqlens": ints(0, 9), "cache_batch_idx": ints(1, 0)})

    def test_only_the_pages_in_use_get_scales(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch_npu

        shapes = []
        fused = torch_npu.npu_fused_infer_attention_score

        def spy(*arguments: Any, **keywords: Any) -> Any:
            shapes.append(tuple(keywords["key_antiquant_scale"].shape))
            return fused(*arguments, **keywords)

        monkeypatch.setattr(torch_npu, "npu_fused_infer_attention_score", spy)
        self.check(narrow_decode() | {"cache_seqlens": ints(33, 7)})
        assert shapes == [(2, 2, 64)]


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": rand(2, 2, 8, 64, dtype=HALF)}, "not every sequence has one row of q"),
        ({"cu_seqlens_q": ints(0, 2, 2)}, "not every sequence has one row of q"),
        ({"cu_seqlens_q": ints(0, 0, 1)}, "not every sequence has one row of q"),
        ({"softcap": 2.0}, "softcap"),
        ({"window_size": (40, 0)}, "window_size"),
        ({"q": rand(2, 1, 8, 64)}, "dtype torch.float32"),
        ({"name": "flash_attn_npu"}, "flash_attn_npu is asked for"),
        ({"name": "torch"}, "torch is asked for"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_int8_is_dequantised_where_the_fused_operator_does_not_take_it(
    change: dict[str, Any], why: str
) -> None:
    change = dict(change)
    name, call, bounds = change.pop("name", None), narrow_decode() | change, {}
    if "cu_seqlens_q" in call:
        call["q"], bounds = call["q"].flatten(0, 1), {"max_seqlen_q": 2}
    dtype = call["q"].dtype
    want, want_lse = reference.flash_attn_with_kvcache(**call)
    function, on_npu = fa3_ops.flash_attn_with_kvcache, to_npu(call) | bounds
    with fa3_ops.use_backend(name) if name else nullcontext():
        explanation = fa3_ops.explain(function, **on_npu)
        out, lse = function(**on_npu, return_softmax_lse=True)
    assert_close(out, want, dtype)
    assert_lse(lse, want_lse, dtype)
    assert explanation.backend == (
        name or ("torch" if dtype == torch.float32 else "flash_attn_npu")
    )
    text = str(explanation)
    assert "fused_infer_attention does not read 8 bits: " in text
    assert why in text
    assert "because int8 is dequantised" in text


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
def test_nothing_is_known_of_int8_on_a_950(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "0.4 for 950")
    monkeypatch.setattr(device, "is_950", lambda: True)
    text = str(fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **to_npu(narrow_decode())))
    assert "fused_infer_attention does not read 8 bits: k of 8 bits on a 950" in text


@pytest.mark.filterwarnings("error::fa3_ops.FallbackWarning")
def test_pages_stay_within_their_memory() -> None:
    """A slice whose last entry ends with the memory: larger pages would reach behind it."""
    torch.manual_seed(0)
    call = {"q": rand(2, 3, 4, 64, dtype=HALF), "cache_seqlens": ints(60, 31), "causal": True}
    caches = {name: rand(2, 64, 2, 64, dtype=HALF)[:, 4:] for name in ("k_cache", "v_cache")}
    want, want_lse = reference.flash_attn_with_kvcache(**call, **caches)
    out, lse = fa3_ops.flash_attn_with_kvcache(**to_npu(call | caches), return_softmax_lse=True)
    assert_close(out, want, HALF)
    assert_lse(lse, want_lse, HALF)
    text = str(fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **to_npu(call | caches)))
    assert "pages of 4" in text


class TestErrors:
    """Bad values are found before anything is written or read, with the CPU's words."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"cache_seqlens": ints(400, 3)}, r"cache_seqlens\[0\] must be in \[0, 384\], got 400"),
            ({"cache_seqlens": ints(4, -3)}, r"cache_seqlens\[1\] must be in \[0, 384\], got -3"),
            ({"cache_leftpad": ints(4, 200)}, r"cache_leftpad\[1\] must be in \[0, 128\]"),
            ({"cache_batch_idx": ints(4, 0)}, r"cache_batch_idx\[0\] must be in \[0, 2\), got 4"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
    )
    def test_attention(self, change: dict[str, Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fa3_ops.flash_attn_with_kvcache(**to_npu(decode() | change))

    def test_a_bound_that_is_too_small(self) -> None:
        """Rows past it would be left out without a word."""
        q, k, v = (rand(9, h, 64, dtype=HALF).npu() for h in (4, 2, 2))
        cu_seqlens = ints(0, 2, 9).npu()
        for bounds, message in (((6, 7), "max_seqlen_q .* 7, got 6"), ((7, 6), "max_seqlen_k")):
            with pytest.raises(ValueError, match=message):
                fa3_ops.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, *bounds)

    def test_page_ids_are_bounded(self) -> None:
        call = to_npu(decode() | {"page_table": ints(400, -2, 9, 7, 8, 9).view(2, 3)})
        assert not fa3_ops.flash_attn_with_kvcache(**call).cpu().isnan().any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"cache_seqlens": ints(384, 3)}, r"cache_seqlens\[0\] must leave room for 1 new keys"),
            ({"cache_seqlens": ints(5, -1)}, r"cache_seqlens\[1\] must not be negative, got -1"),
            (
                {"page_table": ints(4, 99, 0, 1, 5, 3).view(2, 3), "cache_seqlens": ints(130, 3)},
                r"page_table\[0, 1\] must be in \[0, 6\), got 99",
            ),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
    )
    def test_append_writes_nothing(self, change: dict[str, Tensor], message: str) -> None:
        new = {"k": rand(2, 1, 2, 128, dtype=HALF), "v": rand(2, 1, 2, 128, dtype=HALF)}
        call = to_npu(decode() | new | change)
        before = call["k_cache"].cpu()
        with pytest.raises(ValueError, match=message):
            fa3_ops.flash_attn_with_kvcache(**call)
        assert torch.equal(call["k_cache"].cpu(), before)

    def test_a_rotation_past_the_table_writes_nothing(self) -> None:
        new = {"k": rand(2, 1, 2, 128, dtype=HALF), "v": rand(2, 1, 2, 128, dtype=HALF)}
        tables = {"rotary_cos": rand(200, 16, dtype=HALF), "rotary_sin": rand(200, 16, dtype=HALF)}
        call = to_npu(decode() | new | tables)
        before = call["k_cache"].cpu()
        with pytest.raises(ValueError, match="rotary_cos must reach position 257 of sequence 0"):
            fa3_ops.flash_attn_with_kvcache(**call)
        assert torch.equal(call["k_cache"].cpu(), before)
