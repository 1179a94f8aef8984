"""FlashAttention-3 and FlashAttention-4 as backends, by stand-ins for their kernels on CPU tensors.

On a GPU: tests/cuda/test_flash_attention.py.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import hopper_kernels
import pytest
import torch
from hopper_calls import (
    BY_3,
    BY_BOTH,
    CAUSAL,
    F8,
    F16,
    FUNCTIONS,
    MADE,
    NAMES,
    cached,
    dense,
    expected,
    ints,
    packed,
    paged,
    rand,
)
from hypothesis import given
from hypothesis import strategies as st
from launches import launches
from strategies import (
    assert_exact,
    assert_lse,
    dense_calls,
    examples,
    hide_pages,
    kvcache_calls,
    varlen_calls,
)
from torch import Tensor

import fa3_ops
from fa3_ops.backends import Attention, Backend, Gradient, add_backend, remove_backend
from fa3_ops.backends.cuda import flash_attn_3, flash_attn_4
from fa3_ops.backends.cuda.capabilities import (
    FA3_FWD,
    FLASH_ATTN_3,
    FLASH_ATTN_4,
    not_supported,
    of_build,
)
from fa3_ops.backends.cuda.flash_attention import HOPPER, Package


@contextmanager
def added() -> Iterator[None]:
    backends: tuple[tuple[Any, Backend[Any]], ...] = (
        (Attention, flash_attn_3.FlashAttn3()),
        (Attention, flash_attn_4.FlashAttn4()),
        (Gradient, flash_attn_3.FlashAttn3Gradient()),
        (Gradient, flash_attn_4.FlashAttn4Gradient()),
    )
    for kind, backend in backends:
        add_backend("cpu", kind, backend)
    try:
        yield
    finally:
        for kind, backend in backends:
            remove_backend("cpu", kind, backend)


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    hopper_kernels.put(monkeypatch)
    with added():
        yield


def served(name: str, kind: str, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """By the backend of this name, and by nobody else."""
    with fa3_ops.use_backend(name), launches("cpu") as launched:
        out, lse = FUNCTIONS[kind](**call, return_softmax_lse=True)
    assert launched[-1] == name
    return out, lse


def assert_right(name: str, kind: str, call: dict[str, Any]) -> None:
    want, want_lse = expected(
        kind, {k: x.clone() if torch.is_tensor(x) else x for k, x in call.items()}
    )
    out, lse = served(name, kind, call)
    dtype = call["q"].dtype
    assert out.dtype == (torch.bfloat16 if dtype == F8 else dtype)
    # With sinks out is rounded twice.
    rounding = 2 if call.get("sinks") is not None else 1
    assert_exact(out, want, dtype, slack=rounding * torch.finfo(out.dtype).eps)
    assert_lse(lse, want_lse)


class TestRight:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("case", BY_BOTH)
    def test_by_both(self, name: str, case: str) -> None:
        kind, more = BY_BOTH[case]
        assert_right(name, kind, MADE[kind](**more))

    @pytest.mark.parametrize("case", BY_3)
    def test_by_flash_attn_3(self, case: str) -> None:
        kind, more = BY_3[case]
        assert_right("flash_attn_3", kind, MADE[kind](**more))

    @pytest.mark.parametrize("name", NAMES)
    def test_new_keys_are_appended_first(self, name: str) -> None:
        call = paged(k=rand(2, 3, 2, 32), v=rand(2, 3, 2, 32), **CAUSAL)
        assert_right(name, "cache", call)

    @pytest.mark.parametrize("name", NAMES)
    def test_activations_in_any_memory(self, name: str) -> None:
        call = dense()
        odd = {n: torch.randn(*x.shape[:-1], 37).half()[..., 1:33] for n, x in call.items()}
        assert_right(name, "dense", odd)
        one = {n: x[:1].expand(2, -1, -1, -1) for n, x in call.items()}
        assert_right(name, "dense", one)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_result_goes_where_the_caller_wants_it(self, name: str) -> None:
        call = packed()
        out = torch.empty_like(call["q"])
        with fa3_ops.use_backend(name):
            torch.ops.fa3npu.flash_attn_varlen_func.out(**call, out=out)
        assert_exact(out, expected("packed", call)[0], F16, slack=1e-3)


HEADDIMS = st.sampled_from([(16, 16), (64, 64), (64, 32), (8, 8), (32, 32), (192, 128)])
DTYPES = (torch.float16, torch.bfloat16, F8)


def plainer(call: dict[str, Any]) -> dict[str, Any]:
    """Without what is mostly refused."""
    return {n: x for n, x in call.items() if n not in ("alibi_slopes", "qv", "cache_start")}


class TestRandomCalls:
    """Whatever is not refused is right."""

    def check(self, name: str, kind: str, call: dict[str, Any]) -> None:
        try:
            with fa3_ops.use_backend(name):
                by = fa3_ops.explain(FUNCTIONS[kind], **call).backend
        except NotImplementedError:
            return
        if by != "nothing":
            assert_right(name, kind, call)

    @pytest.mark.parametrize("name", NAMES)
    @given(data=st.data())
    @examples(60)
    def test_dense(self, name: str, data: st.DataObject) -> None:
        self.check(name, "dense", plainer(data.draw(dense_calls(DTYPES, HEADDIMS, narrow=False))))

    @pytest.mark.parametrize("name", NAMES)
    @given(data=st.data())
    @examples(60)
    def test_packed(self, name: str, data: st.DataObject) -> None:
        call = plainer(data.draw(varlen_calls(DTYPES, HEADDIMS, narrow=False)))
        self.check(name, "packed", call | {"max_seqlen_q": 40, "max_seqlen_k": 70})

    @pytest.mark.parametrize("name", NAMES)
    @given(data=st.data())
    @examples(60)
    def test_cache(self, name: str, data: st.DataObject) -> None:
        call = plainer(data.draw(kvcache_calls(DTYPES, HEADDIMS, narrow=False)))
        if call["attention_chunk"] == 0:  # see docs/cuda.md
            hide_pages(call)
        self.check(name, "cache", call)


REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "alibi_slopes": ("34", "dense", {"alibi_slopes": torch.rand(4)}),
    "softmax_scale that is not positive": ("34", "dense", {"softmax_scale": -0.2}),
    "dtype torch.float32": ("34", "dense", dense(dtype=torch.float32)),
    "dtype torch.float8_e4m3fn": ("4", "dense", dense(dtype=F8)),
    "headdim 20": ("34", "dense", dense(20, 20)),
    "headdim 264": ("34", "dense", dense(264, 264)),
    "headdim 40": ("3", "dense", dense(40, 40, F8)),
    "headdim_v 64 beside headdim 128": ("34", "dense", dense(128, 64)),
    "headdim_v 128 beside headdim 64": ("3", "dense", dense(64, 128, F8)),
    "headdim 24": ("4", "cache", paged(**{
        name: rand(*shape, 24) for name, shape in
        {"q": (2, 3, 4), "k_cache": (9, 8, 2), "v_cache": (9, 8, 2)}.items()
    })),
    "qv": ("34", "dense", {"qv": rand(2, 5, 4, 32)}),
    "attention_chunk": ("4", "dense", {"attention_chunk": 4, "causal": True}),
    "attention_chunk without a causal mask": ("3", "dense", {"attention_chunk": 4}),
    "attention_chunk with cache_start": (
        "3", "cache", {"attention_chunk": 4, "causal": True, "cache_start": ints(3, 0)}
    ),
    "cache_leftpad": ("4", "cache", {"cache_leftpad": ints(4, 0)}),
    "cache_batch_idx of a dense cache": ("4", "cache", {"cache_batch_idx": ints(1, 0)}),
    "k and v of torch.int8 beside q of torch.float16": (
        "34", "cache", {n: torch.ones(2, 24, 2, 32, dtype=torch.int8) for n in ("k_cache", "v_cache")}
    ),
    "a cache that is not aligned to 16 bytes": (
        "34", "cache", {"k_cache": rand(2, 24, 2, 36)[..., :32]}
    ),
}  # fmt: skip


class TestRefusals:
    @pytest.mark.parametrize("reason", REFUSED)
    def test_with_a_reason(self, reason: str) -> None:
        by, kind, more = REFUSED[reason]
        call = MADE[kind](**more)
        for name in (f"flash_attn_{n}" for n in by):
            with pytest.raises(NotImplementedError) as refusal, fa3_ops.use_backend(name):
                FUNCTIONS[kind](**call)
            why = f"fa3_ops: backend {name} cannot serve the call: {reason}"
            assert str(refusal.value) == why

    def test_packed_keys_beside_dense_q(self) -> None:
        call = {"q": rand(2, 5, 4, 32), "k": rand(9, 2, 32), "v": rand(9, 2, 32)}
        call |= {"cu_seqlens_k": ints(0, 4, 9)}
        for name in NAMES:
            with pytest.raises(NotImplementedError, match="cu_seqlens_k without cu_seqlens_q"):
                self.run_varlen(name, call)

    def run_varlen(self, name: str, call: dict[str, Any]) -> None:
        with fa3_ops.use_backend(name):
            torch.ops.fa3npu.flash_attn_varlen_func(
                **call, cu_seqlens_q=None, max_seqlen_q=None, max_seqlen_k=5
            )

    @pytest.mark.parametrize(
        ("reason", "kind", "more"),
        [
            ("dtype torch.float16", "dense", {}),
            ("window_size", "dense", dense(dtype=torch.bfloat16, window_size=(3, 0))),
            ("page_table", "cache", {n: x.bfloat16() if x.is_floating_point() else x
                                     for n, x in paged().items()}),
            ("attention_chunk", "dense", dense(dtype=torch.bfloat16, attention_chunk=4, causal=True)),
        ],
    )  # fmt: skip
    def test_a_build_refuses_what_it_leaves_out(
        self, monkeypatch: pytest.MonkeyPatch, reason: str, kind: str, more: dict[str, Any]
    ) -> None:
        hopper_kernels.put(monkeypatch, FA3_FWD)
        call = MADE[kind](**more)
        with pytest.raises(NotImplementedError) as refusal, fa3_ops.use_backend("flash_attn_3"):
            FUNCTIONS[kind](**call)
        assert str(refusal.value).endswith(f"cannot serve the call: {reason}")

    def test_what_other_builds_leave_out(self) -> None:
        call = Attention(**dense(softcap=2.0), seqused_k=ints(3, 4))
        without = {"SOFTCAP": "softcap", "VARLEN": "lengths", "HDIM192": None, "FP16": "dtype"}
        for flag, reason in without.items():
            can = of_build("flash_attn_3", {f"FLASHATTENTION_DISABLE_{flag}": True})
            reasons = not_supported(call, can)
            assert [r.split()[0] for r in reasons] == ([] if reason is None else [reason])
        small = of_build("flash_attn_3", {"FLASHATTENTION_DISABLE_HDIM256": True})
        assert small.headdims == range(8, 193, 8)

    def test_other_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (HOPPER + 1, 0))
        for name in NAMES:
            with (
                pytest.raises(NotImplementedError, match=r"call: compute capability 10\.0$"),
                fa3_ops.use_backend(name),
            ):
                fa3_ops.flash_attn_func(**dense())


class TestChoice:
    def test_nobody_is_served_by_them_who_does_not_ask(self) -> None:
        with launches("cpu") as launched:
            fa3_ops.flash_attn_func(**dense())
        assert launched == ["cpu"]

    @pytest.mark.parametrize("name", NAMES)
    def test_explain_says_that_the_bits_are_not_promised(self, name: str) -> None:
        with fa3_ops.use_backend(name):
            explained = fa3_ops.explain(fa3_ops.flash_attn_func, **dense(), causal=True)
        assert explained.backend == name
        assert not explained.bitwise
        assert str(explained) == f"flash_attn_func: {name}\n  the bitwise contract is not kept"
        assert fa3_ops.explain(fa3_ops.flash_attn_func, **dense()).bitwise

    @pytest.mark.parametrize("name", NAMES)
    def test_lengths_stay_on_the_device(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def wait(*arguments: Any) -> None:
            raise AssertionError("waits for the device")

        monkeypatch.setattr(fa3_ops.backends.lowering.lengths.Lengths, "of", wait)
        served(name, "packed", packed(causal=True))

    @pytest.mark.parametrize("splits", [0, 1, 300])
    def test_splits_are_those_of_the_caller(
        self, splits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        fwd = hopper_kernels.Kernels3.fwd

        def noted(self: Any, *tensors: Tensor, num_splits: int, **more: Any) -> Any:
            asked.append(num_splits)
            return fwd(self, *tensors, num_splits=num_splits, **more)

        monkeypatch.setattr(hopper_kernels.Kernels3, "fwd", noted)
        served("flash_attn_3", "cache", cached(num_splits=splits))
        hopper_kernels.put(monkeypatch, replace(FLASH_ATTN_3, max_num_splits=1))
        served("flash_attn_3", "cache", cached(num_splits=splits))
        assert asked == [min(splits, 256), min(splits, 1)]


GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"causal": True}),
    "window, softcap": ("dense", {"window_size": (3, 1), "softcap": 3.0}),
    "sinks": ("dense", {"sinks": rand(4), "deterministic": True}),
    "packed": ("packed", {"causal": True}),
    "packed, used in part": (
        "packed",
        {"seqused_q": ints(2, 0, 5, 1), "seqused_k": ints(7, 0, 0, 3)},
    ),
}


class TestGradients:
    @pytest.fixture(autouse=True)
    def fresh_memory_holds_nan(self) -> Iterator[None]:
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    def gradients(
        self, name: str, kind: str, call: dict[str, Any], of_lse: bool = False
    ) -> list[Tensor]:
        inputs = {n: call[n].clone().requires_grad_() for n in ("q", "k", "v")}
        with fa3_ops.use_backend(name), launches("cpu") as launched:
            out, lse = FUNCTIONS[kind](**call | inputs, return_softmax_lse=True)
            loss = out.float().square().sum()
            if of_lse:
                loss = loss + lse.masked_fill(lse.isinf(), 0).sum()
            loss.backward()
        assert launched == [name, name, "cpu"]  # whose kernel stands in for the backward
        return [x.grad for x in inputs.values() if x.grad is not None]

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("case", GRADIENTS)
    def test_right(self, name: str, case: str) -> None:
        kind, more = GRADIENTS[case]
        call = MADE[kind](**more)
        self.compare(self.gradients(name, kind, call), kind, call)

    def test_of_softmax_lse(self) -> None:
        call = packed()
        found = self.gradients("flash_attn_4", "packed", call, of_lse=True)
        self.compare(found, "packed", call, of_lse=True)
        with pytest.raises(NotImplementedError, match="call: a gradient of softmax_lse"):
            self.gradients("flash_attn_3", "packed", call, of_lse=True)

    def compare(
        self, found: list[Tensor], kind: str, call: dict[str, Any], of_lse: bool = False
    ) -> None:
        inputs = {n: call[n].double().requires_grad_() for n in ("q", "k", "v")}
        more = {n: x for n, x in call.items() if n != "deterministic"}
        out, lse = expected(kind, more | inputs)
        loss = out.square().sum()
        if of_lse:
            loss = loss + lse.masked_fill(lse.isinf(), 0).sum()
        loss.backward()
        for got, x in zip(found, inputs.values(), strict=True):
            assert got.dtype == F16
            torch.testing.assert_close(got.double(), x.grad, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize(
        ("by", "reason", "call"),
        [
            ("3", "deterministic with headdim 256", dense(256, 256, deterministic=True)),
            ("3", "headdim_v 512 in the backward", dense(64, 512)),
            ("4", "GQA with headdim_v 128", dense(192, 128)),
            ("3", "attention_chunk in the backward", dense(attention_chunk=4, causal=True)),
        ],
    )
    def test_refused_with_a_reason(self, by: str, reason: str, call: dict[str, Any]) -> None:
        name = f"flash_attn_{by}"
        with pytest.raises(NotImplementedError) as refusal:
            self.gradients(name, "dense", call)
        assert str(refusal.value) == f"fa3_ops: backend {name} cannot serve the call: {reason}"

    def test_a_build_without_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hopper_kernels.put(monkeypatch, FA3_FWD)
        with pytest.raises(NotImplementedError, match=r"flash_attn_3.*: no backward in fa3_fwd$"):
            self.gradients("flash_attn_3", "dense", dense(dtype=torch.bfloat16))


class TestPackages:
    @pytest.fixture(autouse=True)
    def none_known(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.undo()
        for module in (flash_attn_3, flash_attn_4):
            module.package.cache_clear()
        yield
        for module in (flash_attn_3, flash_attn_4):
            module.package.cache_clear()

    def install(self, at: Path, name: str, flags: dict[str, bool], config: str) -> None:
        """The files of a wheel: an extension, and Python that must not run."""
        (at / name).mkdir()
        (at / name / "__init__.py").write_text("raise AssertionError('imported')")
        (at / name / "_C.abi3.so").write_bytes(b"")
        (at / f"{config}.py").write_text(f"CONFIG = {{'build_flags': {flags}}}")
        (at / f"{name}-1.2.dist-info").mkdir()
        (at / f"{name}-1.2.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.2\n")

    def test_none(self) -> None:
        assert flash_attn_3.package() == "neither flash_attn_3 nor fa3_fwd is installed"
        assert flash_attn_4.package() == "flash-attn-4 is not installed"

    def test_the_extension_is_loaded_and_no_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded: list[str] = []
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        monkeypatch.syspath_prepend(tmp_path)
        flags = {"FLASHATTENTION_DISABLE_BACKWARD": True, "FLASHATTENTION_DISABLE_FP8": False}
        self.install(tmp_path, "fa3_fwd", flags, "fa3_fwd_config")
        found = flash_attn_3.package()
        assert isinstance(found, Package)
        assert found == Package("1.2", torch.ops.fa3_fwd, of_build("fa3_fwd", flags))
        assert loaded == [str(tmp_path / "fa3_fwd" / "_C.abi3.so")]
        self.install(tmp_path, "flash_attn_3", {}, "flash_attn_config")
        flash_attn_3.package.cache_clear()
        found = flash_attn_3.package()
        assert isinstance(found, Package)
        assert found.can == FLASH_ATTN_3

    def test_one_that_does_not_load(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(tmp_path)
        self.install(tmp_path, "fa3_fwd", {}, "fa3_fwd_config")
        found = flash_attn_3.package()
        assert isinstance(found, str)
        assert found.startswith("fa3_fwd does not load: ")

    def test_flash_attn_4(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.metadata, "version", {"flash-attn-4": "4.0"}.__getitem__)
        found = flash_attn_4.package()
        assert isinstance(found, str)
        assert found.startswith("flash-attn-4 does not load: ")
        flash_attn_4.package.cache_clear()
        names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        assert flash_attn_4.package() == Package("4.0", sys.modules[names[-1]], FLASH_ATTN_4)

    def test_importing_fa3_ops_looks_for_none(self) -> None:
        code = (
            "import importlib.util, sys; find = importlib.util.find_spec\n"
            "def spy(name, *more):\n"
            "    assert 'flash' not in name and 'fa3_fwd' not in name, name\n"
            "    return find(name, *more)\n"
            "importlib.util.find_spec = spy\n"
            "import fa3_ops, fa3_ops.backends.cuda.flash_attn_3, fa3_ops.backends.cuda.flash_attn_4"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
