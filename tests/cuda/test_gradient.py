"""The gradient on a GPU by Triton: against autograd through the reference, its bits, a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import moved
from gradients import (
    UNSEEN,
    Problem,
    assert_same_in_a_batch,
    assert_same_when_packed,
    assert_unseen_is_not_read,
    dense,
    varlen,
)
from hypothesis import given
from hypothesis import strategies as st
from sample_inputs import rand
from strategies import dense_calls, examples, varlen_calls
from test_operators import assert_gradients, gradients

from fa3_ops import reference
from fa3_ops.testing import sample_calls

ops = torch.ops.fa3npu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADDIMS = st.sampled_from([(16, 16), (40, 24), (64, 64), (72, 80), (128, 128), (192, 128)])
BACKWARDS = (ops.flash_attn_func_backward, ops.flash_attn_varlen_func_backward)
FORWARDS = (ops.flash_attn_func, ops.flash_attn_varlen_func)
SAMPLES = [
    call.name
    for call in sample_calls()
    if call.operator in [op.default for op in (*FORWARDS, *BACKWARDS)]
]
of_all = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3NPU_STRICT", "1")


def check(function: Any, call: dict[str, Any]) -> None:
    for name in ("qv", "q_descale", "k_descale", "v_descale"):
        call.pop(name, None)
    names = [name for name in ("q", "k", "v", "sinks") if name in call]
    inputs, there = [call[name] for name in names], moved(call)
    got = gradients(function, [there[name] for name in names], there, double=False)
    want = gradients(reference.batched, inputs, call, double=True)
    assert_gradients([x.cpu() for x in got], want, inputs)


class TestNumbers:
    @examples(100)
    @given(dense_calls(DTYPES, HEADDIMS, narrow=False))
    def test_dense_calls(self, call: dict[str, Any]) -> None:
        check(dense, call)

    @examples(100)
    @given(varlen_calls(DTYPES, HEADDIMS, narrow=False))
    def test_packed_calls(self, call: dict[str, Any]) -> None:
        check(varlen, call)

    @of_all
    @pytest.mark.parametrize(
        ("d", "dv"),
        [
            *((d, d) for d in (16, 32, 64, 80, 96, 128, 160, 192, 256, 320, 512)),
            *((192, 128), (128, 192), (1, 512), (512, 1), (24, 200), (500, 72)),
        ],
    )
    def test_head_dims(self, d: int, dv: int, dtype: torch.dtype) -> None:
        shapes = (150, 4, d), (170, 2, d), (170, 2, dv)
        q, k, v = (rand(2, *shape, dtype=dtype) for shape in shapes)
        check(dense, {"q": q, "k": k, "v": v, "causal": True})

    @of_all
    @pytest.mark.parametrize(
        "options",
        [
            {"causal": True},
            {},
            {"window_size": (200, 0)},
            {"window_size": (-1, 90), "softcap": 2.0},
            {"attention_chunk": 300, "alibi_slopes": torch.tensor([0.1, 0.02, 0.5, 0.0])},
        ],
        ids=lambda options: "-".join(options) or "full",
    )
    @pytest.mark.parametrize("seqlens", [(1000, 1000), (640, 1300), (1100, 500)])
    def test_long_sequences(
        self, seqlens: tuple[int, int], options: dict[str, Any], dtype: torch.dtype
    ) -> None:
        m, n = seqlens
        q, k, v = (rand(1, s, h, 128, dtype=dtype) for s, h in ((m, 4), (n, 2), (n, 2)))
        check(dense, {"q": q, "k": k, "v": v} | options)


class TestBits:
    @of_all
    @pytest.mark.parametrize(
        "options",
        [{"causal": True}, {"window_size": (300, 11), "softcap": 3.0}],
        ids=lambda options: "-".join(options),
    )
    @pytest.mark.parametrize("headdims", [(64, 64), (128, 128), (192, 128), (256, 256)])
    def test_packed(
        self, headdims: tuple[int, int], options: dict[str, Any], dtype: torch.dtype
    ) -> None:
        lengths = (500, 500), (33, 700), (257, 300), (1, 900)
        problems = [Problem.random(pair, dtype, "cuda", (8, 2), headdims) for pair in lengths]
        assert_same_when_packed(problems, **options)

    @of_all
    @pytest.mark.parametrize("seqlens", [(1000, 1000), (300, 777)])
    def test_in_a_batch(self, seqlens: tuple[int, int], dtype: torch.dtype) -> None:
        problem = Problem.random(seqlens, dtype, "cuda", (8, 2), (128, 128))
        assert_same_in_a_batch(problem, causal=True)

    @of_all
    def test_repeated(self, dtype: torch.dtype) -> None:
        problem = Problem.random((2048, 2048), dtype, "cuda", (8, 2), (128, 128))
        want = problem.gradients(causal=True)
        for _ in range(20):
            got = problem.gradients(causal=True)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))

    @of_all
    def test_one_key_has_no_gradient_through_the_softmax(self, dtype: torch.dtype) -> None:
        problem = Problem.random((300, 1), dtype, "cuda", (8, 2), (128, 128))
        problem.dlse.zero_()
        dq, dk, _ = problem.gradients()
        assert not dq.any()
        assert not dk.any()


@of_all
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "masks"), UNSEEN)
def test_unseen_is_not_read(
    seqlen_q: int, seqlen_k: int, masks: dict[str, Any], dtype: torch.dtype
) -> None:
    problem = Problem.random((seqlen_q, seqlen_k), dtype, "cuda", (4, 2), (128, 128))
    assert_unseen_is_not_read(problem, **masks)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    (call,) = (call for call in sample_calls("cuda", dtype) if call.name == name)
    results = torch.library.opcheck(
        call.operator, call.args, call.kwargs, test_utils=call.test_utils
    )
    assert set(results.values()) == {"SUCCESS"}


def test_a_graph_records_it_without_waiting() -> None:
    """Lengths change between replays; nothing waits for the device."""
    bounds = torch.tensor([0, 100, 300, 512], dtype=torch.int32, device="cuda")
    other = torch.tensor([0, 200, 201, 450], dtype=torch.int32, device="cuda")
    q, k, v = (rand(512, h, 64, dtype=torch.bfloat16).cuda() for h in (4, 2, 2))
    dout = torch.randn_like(q)

    def run(cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        lengths = (cu_seqlens, cu_seqlens, 512, 512)
        out, lse = ops.flash_attn_varlen_func(q, k, v, *lengths, causal=True)
        grads: tuple[torch.Tensor, ...] = ops.flash_attn_varlen_func_backward(
            dout, q, k, v, out, lse, *lengths, causal=True
        )
        return grads

    wants = [run(bounds), run(other)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph, held = torch.cuda.CUDAGraph(), bounds.clone()
        with torch.cuda.graph(graph):
            got = run(held)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for lengths, want in zip((bounds, other), wants, strict=True):
        held.copy_(lengths)
        graph.replay()
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
