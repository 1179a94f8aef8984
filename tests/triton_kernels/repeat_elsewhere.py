"""Calls like earlier ones where something else is new: what was decided must not outlive it. On CPU
tensors served as CUDA's are, by Triton's interpreter (TRITON_INTERPRET=1).

python repeat_elsewhere.py  prints the name of each check that holds
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from decode_calls import Call, changed, decode
from repeat_calls import public, results, serve_by_triton
from torch import Tensor

from fa3_ops.backends import Append, Attention, add_backend, dispatch, remove_backend, repeated
from fa3_ops.backends.cuda import prefill
from fa3_ops.backends.triton import TritonAttention, TritonWrites


class Zeros(TritonAttention):
    """Serves short sequences, if it may read lengths, by zeros."""

    name = "zeros"

    def __init__(self, reads_lengths: bool = False) -> None:
        super().__init__()
        self.reads_lengths = reads_lengths

    def not_supported_reasons(self, request: Attention, run: Any) -> list[str]:
        longest = int(request.seqused_k.max()) if request.seqused_k is not None else 0
        return ["too long"] if self.reads_lengths and longest > 9 else []

    def settle(self, request: Attention) -> Callable[[Attention], tuple[Tensor, Tensor]]:
        return lambda call: call.empty_results()


class Nested(TritonWrites):
    """Attends while it appends."""

    name = "nested"

    def settle(self, request: Any) -> Any:
        write = super().settle(request)

        def launch(a: Any) -> None:
            write(a)
            public(**decode())

        return launch


def is_zero(call: Call) -> bool:
    return not public(**call)[0].any()


def a_backend_that_is_added_meanwhile() -> None:
    """By another thread, while a first call is on its way."""
    call, zeros = decode(), Zeros()
    settled = dispatch.settled

    def slow(*arguments: Any) -> Any:
        found = settled(*arguments)
        add_backend("cpu", Attention, zeros, first=True)
        return found

    with mock.patch.object(dispatch, "settled", slow):
        assert not is_zero(call)
    assert is_zero(call)
    remove_backend("cpu", Attention, zeros)
    assert not is_zero(call)


def a_backend_that_reads_lengths() -> None:
    zeros, call = Zeros(reads_lengths=True), decode()
    add_backend("cpu", Attention, zeros, first=True)
    short = call | {"cache_seqlens": torch.full_like(call["cache_seqlens"], 5)}
    assert is_zero(short)
    assert not is_zero(call | {"cache_seqlens": short["cache_seqlens"] + 9})
    assert is_zero(short)
    remove_backend("cpu", Attention, zeros)


def a_call_within_a_call() -> None:
    nested = Nested()
    add_backend("cpu", Append, nested, first=True)
    call = decode(1, rotary=True)
    first, again = results(call, public), results(call, public)
    assert all(map(torch.equal, first, again))
    remove_backend("cpu", Append, nested)


def a_kernel_of_somebody_else() -> None:
    library = torch.library.Library("fa3npu", "IMPL")

    def zeros(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), q.new_zeros(1)

    library.impl("flash_attn_kvcache", zeros, "CPU", allow_override=True)
    for call in (decode(), decode(1), decode(1, rotary=True)):
        assert is_zero(call)
        assert is_zero(changed(call))
    library._destroy()  # type: ignore[no-untyped-call]


def a_profiler() -> None:
    """It is told whose the kernels are."""
    call = decode(1)
    for _ in range(3):
        with torch.profiler.profile() as profile:
            public(**call)
        assert any(event.name.startswith("fa3npu::") for event in profile.events())


if __name__ == "__main__":
    serve_by_triton()
    prefill.is_hopper = lambda device: False
    with torch.no_grad():
        for check in (
            a_backend_that_is_added_meanwhile,
            a_backend_that_reads_lengths,
            a_call_within_a_call,
            a_kernel_of_somebody_else,
            a_profiler,
        ):
            repeated.forget()
            torch.manual_seed(0)
            check()
            print(check.__name__)
