"""Choosing a backend on any device: by name, by reasons, loudly; and one that comes from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launches import launches
from sample_inputs import appending, cached, dense, varlen
from strategies import (
    assert_exact,
    assert_lse,
    dense_calls,
    examples,
    kvcache_calls,
    varlen_calls,
)
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.backends import (
    Append,
    Attention,
    Backend,
    Gradient,
    Run,
    add_backend,
    choice,
    devices,
    fallback,
    remove_backend,
)
from fa3_ops.backends.lowering.lengths import Lengths

ops = torch.ops.fa3npu


class Toy(Backend[Attention]):
    """Dense attention without a mask, by a softmax over all scores."""

    name = "toy"
    serves = ("q", "k", "v", "softmax_scale", "num_splits", "is_cache", "out")

    def not_supported_reasons(self, request: Attention, run: Run) -> list[str]:
        others = (field for field in fields(request) if field.name not in self.serves)
        return [f.name for f in others if getattr(request, f.name) != f.default]

    def launch(self, request: Attention, lowered: Attention, run: Run) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2).double() for x in (lowered.q, lowered.k, lowered.v))
        k, v = (x.repeat_interleave(lowered.nheads // lowered.nheads_k, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * lowered.softmax_scale
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        return out.to(lowered.out_dtype).contiguous(), scores.logsumexp(-1).float()


@contextmanager
def added(backend: Backend[Any], kind: Any = Attention, first: bool = False) -> Iterator[None]:
    add_backend("cpu", kind, backend, first=first)
    try:
        yield
    finally:
        remove_backend("cpu", kind, backend)


@pytest.fixture(autouse=True)
def every_warning_again() -> None:
    fallback._warned.clear()
    torch.manual_seed(0)


class TestFromOutside:
    def test_it_serves_who_asks_for_it(self) -> None:
        call = dense()
        with added(Toy()), fa3_ops.use_backend("toy"), launches("cpu") as launched:
            out, lse = fa3_ops.flash_attn_func(**call, return_softmax_lse=True)
            raw, raw_lse = ops.flash_attn_func(**call)
        want, want_lse = reference.batched(**call)
        torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
        assert torch.equal(out, raw)
        assert torch.equal(lse, raw_lse)
        assert launched == ["toy", "toy"]

    def test_nobody_else_notices_it(self) -> None:
        call = dense()
        before = fa3_ops.flash_attn_func(**call)
        with added(Toy()), launches("cpu") as launched:
            assert torch.equal(before, fa3_ops.flash_attn_func(**call))
        assert launched == ["cpu"]

    def test_as_the_first_choice_it_serves_what_it_can_and_falls_back_loudly(self) -> None:
        with added(Toy(), first=True), launches("cpu") as launched:
            fa3_ops.flash_attn_func(**dense())
            with pytest.warns(fa3_ops.FallbackWarning) as caught:
                fa3_ops.flash_attn_func(**dense(), softcap=3.0, window_size=(1, 2))
        assert launched == ["toy", "cpu"]
        assert [str(w.message) for w in caught] == [
            "fa3_ops: served by cpu, because toy: window_size, softcap"
        ]

    def test_strictly_there_is_no_fallback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FA3NPU_STRICT", "1")
        with added(Toy(), first=True):
            fa3_ops.flash_attn_func(**dense())
            with pytest.raises(NotImplementedError, match=r"toy: softcap \(FA3NPU_STRICT=1\)"):
                fa3_ops.flash_attn_func(**dense(), softcap=3.0)

    def test_it_refuses_with_reasons(self) -> None:
        call = dense() | {"causal": True, "softcap": 3.0}
        with (
            added(Toy()),
            fa3_ops.use_backend("toy"),
            pytest.raises(NotImplementedError, match="backend toy cannot serve the call: causal"),
        ):
            fa3_ops.flash_attn_func(**call)

    def test_it_is_explained(self) -> None:
        with added(Toy(), first=True):
            text = str(fa3_ops.explain(fa3_ops.flash_attn_func, **dense()))
            assert text == "flash_attn_func: toy"
            text = str(fa3_ops.explain(fa3_ops.flash_attn_func, **dense(), softcap=3.0))
            with pytest.warns(fa3_ops.FallbackWarning):  # which explain() has not used up
                fa3_ops.flash_attn_func(**dense(), softcap=3.0)
        assert text == "flash_attn_func: cpu\n  not toy: softcap"

    def test_its_gradients_are_not_somebody_elses(self) -> None:
        leaves = {name: x.requires_grad_() for name, x in dense().items()}
        with added(Toy()), fa3_ops.use_backend("toy"):
            out = fa3_ops.flash_attn_func(**leaves)
            with pytest.raises(NotImplementedError, match="it has no backward"):
                out.sum().backward()

    def test_compiled_code_finds_it(self) -> None:
        compiled = torch.compile(fa3_ops.flash_attn_func, backend="aot_eager", fullgraph=True)
        compiled(**dense())
        with added(Toy()), fa3_ops.use_backend("toy"), launches("cpu") as launched:
            compiled(**dense())
        assert launched == ["toy"]

    def test_out_is_written_by_whoever_serves(self) -> None:
        call = varlen()
        out = torch.empty_like(call["q"])
        version = out._version

        class Copies(Backend[Attention]):
            name = "copies"

            def launch(self, request: Attention, lowered: Attention, run: Run) -> Any:
                return torch.ones_like(request.q), torch.zeros(request.nheads, len(request.q))

        with added(Copies()), fa3_ops.use_backend("copies"):
            got = fa3_ops.flash_attn_varlen_func(**call, out=out)
        assert got is out
        assert bool((out == 1).all())
        assert out._version > version

    def test_a_device_that_is_none_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="device must be one of cpu, cuda, npu, got cup"):
            add_backend("cup", Attention, Toy())

    def test_float8(self) -> None:
        call = {name: x.to(torch.float8_e4m3fn) for name, x in dense().items()}
        want = fa3_ops.flash_attn_func(**call)
        with added(Toy()), fa3_ops.use_backend("toy"):
            got = fa3_ops.flash_attn_func(**call)
        torch.testing.assert_close(got, want, rtol=0.01, atol=0.01)

    def test_results_of_another_form_are_an_error(self) -> None:
        class Forgets(Toy):
            def launch(self, *arguments: Any) -> Any:
                return super().launch(*arguments)[0]

        with added(Forgets()), fa3_ops.use_backend("toy"), pytest.raises(TypeError, match="toy"):
            fa3_ops.flash_attn_func(**dense())

    def test_a_name_that_is_taken_is_an_error(self) -> None:
        for backend in (devices.named("cpu").backends[Attention][0], Backend()):
            with pytest.raises(ValueError, match="backend must have a name of its own"):
                add_backend("cpu", Attention, backend)

    def test_a_kind_that_is_none_is_an_error(self) -> None:
        with pytest.raises(TypeError, match="kind must be one of Append, Attention"):
            add_backend("cpu", Toy, Toy())

    def test_who_wants_no_lengths_reads_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def read(request: Any) -> Any:
            raise AssertionError("lengths were read")

        class Blind(Toy):
            name = "blind"

            def not_supported_reasons(self, request: Attention, run: Run) -> list[str]:
                return []

        with added(Blind()), monkeypatch.context() as patch:
            patch.setattr(Lengths, "of", read)
            with fa3_ops.use_backend("blind"):
                fa3_ops.flash_attn_func(**dense())
            Blind.reads_lengths = True
            with fa3_ops.use_backend("blind"), pytest.raises(AssertionError, match="were read"):
                fa3_ops.flash_attn_func(**dense())


class TestByName:
    @pytest.mark.parametrize(
        "call",
        [
            lambda: fa3_ops.flash_attn_func(**dense()),
            lambda: fa3_ops.flash_attn_varlen_func(**varlen()),
            lambda: fa3_ops.flash_attn_with_kvcache(**cached(1)),
            lambda: ops.flash_attn_func(**dense()),
        ],
        ids=["dense", "varlen", "cache", "raw"],
    )
    def test_a_name_that_is_none_is_an_error(self, call: Any) -> None:
        call()
        with (
            fa3_ops.use_backend("typo"),
            pytest.raises(ValueError, match="backend must be one of cpu, torch, got typo"),
        ):
            call()
        call()

    def test_nothing_is_written_before_it_is(self) -> None:
        call = appending(1)
        before = call["k_cache"].clone()
        with fa3_ops.use_backend("typo"), pytest.raises(ValueError, match="got typo"):
            fa3_ops.flash_attn_with_kvcache(**call)
        assert torch.equal(call["k_cache"], before)

    def test_a_gradient_too(self) -> None:
        leaves = {name: x.requires_grad_() for name, x in dense().items()}
        out = fa3_ops.flash_attn_func(**leaves)
        with fa3_ops.use_backend("typo"), pytest.raises(ValueError, match="got typo"):
            out.sum().backward()

    def test_of_the_attention_counts_for_its_gradient(self) -> None:
        leaves = {name: x.requires_grad_() for name, x in dense().items()}
        with launches("cpu") as launched:
            with fa3_ops.use_backend("torch"):
                out = fa3_ops.flash_attn_func(**leaves)
            out.sum().backward()
        assert launched == ["torch", "torch"]

    def test_cpu_gives_the_bits_of_no_name(self) -> None:
        torch.manual_seed(0)
        want = fa3_ops.flash_attn_with_kvcache(**appending(1), return_softmax_lse=True)
        torch.manual_seed(0)
        with fa3_ops.use_backend("cpu"):
            got = fa3_ops.flash_attn_with_kvcache(**appending(1), return_softmax_lse=True)
        assert all(map(torch.equal, got, want))

    def test_a_name_counts_in_its_own_thread(self) -> None:
        call, seen = dense(), []
        with fa3_ops.use_backend("typo"):
            other = threading.Thread(target=lambda: seen.append(fa3_ops.flash_attn_func(**call)))
            other.start()
            other.join()
        assert torch.equal(seen[0], fa3_ops.flash_attn_func(**call))

    def test_while_other_threads_call(self) -> None:
        """A kernel that PyTorch frees under a thread is a crash, or another operator's."""
        code = """
import sys, threading, torch, fa3_ops
sys.setswitchinterval(1e-5)
torch.set_num_threads(1)
q = torch.randn(1, 2, 2, 16)
ended = threading.Event()
def call():
    while not ended.is_set():
        fa3_ops.flash_attn_func(q, q, q)
        fa3_ops.linear(q, q[0, 0])
threading.excepthook = lambda error: print(error)
threads = [threading.Thread(target=call) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(1000):
    with fa3_ops.use_backend("cpu"):
        fa3_ops.flash_attn_func(q, q, q)
ended.set()
for thread in threads:
    thread.join()
"""
        got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (got.returncode, got.stdout) == (0, "")

    def test_for_a_whole_process(self) -> None:
        code = (
            "import torch, fa3_ops; q = torch.randn(1, 2, 2, 16); "
            "print(fa3_ops.explain(fa3_ops.flash_attn_func, q, q, q)); "
            "fa3_ops.flash_attn_func(q, q, q)"
        )

        def run(name: str) -> Any:
            environment = os.environ | {"FA3NPU_BACKEND": name}
            command = [sys.executable, "-c", code]
            return subprocess.run(command, env=environment, capture_output=True, text=True)

        assert run("torch").stdout == "flash_attn_func: torch\n"
        assert "ValueError: backend must be one of cpu, torch, got typo" in run("typo").stderr


class TestTorch:
    """The last resort of every device, here beside the reference."""

    @examples(100)
    @given(dense_calls())
    def test_dense(self, call: dict[str, Any]) -> None:
        self.check(fa3_ops.flash_attn_func, reference.batched, call)

    @examples(100)
    @given(varlen_calls())
    def test_varlen(self, call: dict[str, Any]) -> None:
        bounds = {"max_seqlen_q": 40, "max_seqlen_k": 70}
        self.check(fa3_ops.flash_attn_varlen_func, reference.batched, call, bounds)

    def check(self, function: Any, truth: Any, call: Any, bounds: Any = None) -> None:
        if call["q"].dtype == torch.float64:
            return
        with fa3_ops.use_backend("torch"):
            out, lse = function(**call, **(bounds or {}), return_softmax_lse=True)
        want, want_lse = truth(**call)
        assert_exact(out, want, call["q"].dtype)
        assert_lse(lse, want_lse)


class Fickle(Backend[Any]):
    """Refuses by chance, and serves as the next one does."""

    name = "fickle"

    def __init__(self, serves: Any) -> None:
        self.refuses, self.serves = False, serves

    def not_supported_reasons(self, request: Any, run: Run) -> list[str]:
        return ["a mood"] if self.refuses else []

    def lower(self, request: Any, run: Run) -> Any:
        run.note("as the next one would")
        return self.serves.lower(request, run)

    def launch(self, request: Any, lowered: Any, run: Run) -> Any:
        return self.serves.launch(request, lowered, run)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
class TestExplanation:
    """What explain() says is what runs: the launches are looked at."""

    moods = st.booleans()
    names = st.sampled_from([None, "cpu", "torch", "fickle"])

    def check(self, kind: Any, name: str | None, refuses: bool, run: Callable[[], Any]) -> None:
        backend = Fickle(devices.of(torch.device("cpu")).backends[kind][0])
        backend.refuses = refuses
        asked = nullcontext() if name is None else fa3_ops.use_backend(name)
        with added(backend, kind, first=True), asked:
            try:
                said = [s.backend for s in fa3_ops.explain(run).steps if s.backend != "nothing"]
            except (NotImplementedError, ValueError) as error:
                with pytest.raises(type(error)):
                    run()
                return
            with launches("cpu") as launched:
                run()
        # The composite's operators each launch one; a fickle one launches through the next.
        assert [
            n for n, before in zip(launched, ["", *launched], strict=False) if before != "fickle"
        ] == said

    @examples(100)
    @given(call=dense_calls(), name=names, refuses=moods)
    def test_forward(self, call: dict[str, Any], name: str | None, refuses: bool) -> None:
        self.check(Attention, name, refuses, lambda: fa3_ops.flash_attn_func(**call))

    @examples(60)
    @given(call=dense_calls((torch.float32,), narrow=False), name=names, refuses=moods)
    def test_backward(self, call: dict[str, Any], name: str | None, refuses: bool) -> None:
        call = {k: x for k, x in call.items() if k in ("q", "k", "v", "causal", "softcap")}
        out, lse = fa3_ops.flash_attn_func(**call, return_softmax_lse=True)
        arguments = (torch.ones_like(out), call["q"], call["k"], call["v"], out, lse)
        rest = {k: call[k] for k in ("causal", "softcap") if k in call}
        self.check(
            Gradient, name, refuses, lambda: ops.flash_attn_func_backward(*arguments, **rest)
        )

    @examples(100)
    @given(
        call=kvcache_calls(), name=names, refuses=moods, kind=st.sampled_from([Append, Attention])
    )
    def test_append(self, call: dict[str, Any], name: str | None, refuses: bool, kind: Any) -> None:
        def run() -> None:
            fa3_ops.flash_attn_with_kvcache(**call)

        self.check(kind, name, refuses, run)


def test_another_launch_is_not_settled_by_the_one_it_replaces() -> None:
    class Settled(Toy):
        def launch(self, request: Any, lowered: Any, run: Any) -> Any:
            return super().launch(request, lowered, run)

        def settle(self, request: Any) -> Any:
            return print

    class Renamed(Settled):
        name = "renamed"

    class Replaced(Settled):
        def launch(self, request: Any, lowered: Any, run: Any) -> Any:
            return super().launch(request, lowered, run)

    request: Any = None
    assert Settled().settle(request) is Renamed().settle(request) is print
    assert Replaced().settle(request) is None


def test_who_promises_bits_says_so() -> None:
    assert fa3_ops.explain(fa3_ops.flash_attn_with_kvcache, **appending(1)).bitwise
    with fa3_ops.use_backend("torch"):
        assert not fa3_ops.explain(fa3_ops.flash_attn_func, **dense()).bitwise


def test_without_a_wish_calls_go_to_the_kernels_alone() -> None:
    assert choice.asked_for() is None
    with launches("cpu") as launched:
        fa3_ops.flash_attn_func(**dense())
    assert launched == []
