"""The operators beside attention on a GPU: numbers, bits, and that nothing waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import small_operators as check
import torch
import torch.nn.functional as F
from hypothesis import given
from sample_inputs import ints, rand, rotary
from strategies import (
    NARROW_DTYPES,
    WIDE_DTYPES,
    append_calls,
    combine_calls,
    examples,
    linear_calls,
    narrow_append_calls,
    rotary_calls,
    scatter_calls,
)
from torch import Tensor

import fa3_ops
from fa3_ops.testing import sample_calls

ops = torch.ops.fa3npu
OPERATORS = (
    *("kvcache_append_", "kvcache_scatter_", "linear", "apply_rotary", "flash_attn_combine"),
    "get_scheduler_metadata",
)
SAMPLES = [call.name for call in sample_calls() if call.name.startswith(OPERATORS)]
every_dtype = pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3NPU_STRICT", "1")


class TestLinear:
    @examples(60)
    @given(linear_calls(WIDE_DTYPES))
    def test_random_calls(self, call: dict[str, Any]) -> None:
        check.check_linear(call, "cuda")

    @every_dtype
    @pytest.mark.parametrize(("columns", "depth"), [(200, 3000), (64, 64)])
    def test_a_row_is_the_same_anywhere(self, dtype: torch.dtype, columns: int, depth: int) -> None:
        check.check_a_row_of_linear_is_the_same_anywhere(dtype, columns, depth, "cuda")

    @every_dtype
    def test_strides_and_neighbours_change_nothing(self, dtype: torch.dtype) -> None:
        check.check_strides_and_neighbours_change_nothing_of_linear(dtype, "cuda")

    @every_dtype
    def test_a_rows_gradient_is_the_same_anywhere(self, dtype: torch.dtype) -> None:
        check.check_a_rows_gradient_is_the_same_anywhere(dtype, "cuda")

    @every_dtype
    def test_gradients_as_pytorchs_in_float64(self, dtype: torch.dtype) -> None:
        shapes = ((300, 70), (50, 70), (50,))
        given = [rand(*shape, dtype=dtype).cuda().requires_grad_() for shape in shapes]
        dout = rand(300, 50, dtype=dtype).cuda()
        got = torch.autograd.grad(fa3_ops.linear(*given), given, dout)
        doubles = [x.detach().double().requires_grad_() for x in given]
        want = torch.autograd.grad(F.linear(*doubles), doubles, dout.double())
        for x, y in zip(got, want, strict=True):
            slack = 3e-4 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(x.double(), y, rtol=1e-2, atol=slack)

    @pytest.mark.parametrize("depth", [1024, 8192])
    @pytest.mark.parametrize("rows", [2, 64])
    def test_error_of_float32_at_most_twice_pytorchs(self, depth: int, rows: int) -> None:
        check.check_error_of_float32_at_most_twice_pytorchs(rows, depth, "cuda")

    def test_float64_falls_back_to_pytorchs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, weight = rand(3, 5).double().cuda(), rand(4, 5).double().cuda()
        with pytest.raises(NotImplementedError, match=r"triton: dtype torch\.float64"):
            ops.linear(x, weight)
        monkeypatch.setenv("FA3NPU_STRICT", "0")
        assert torch.equal(ops.linear(x, weight), F.linear(x, weight))


class TestCacheWrites:
    @examples(60)
    @given(append_calls())
    def test_random_appends(self, call: dict[str, Any]) -> None:
        check.check_append(call, "cuda")

    @examples(60)
    @given(narrow_append_calls())
    def test_random_appends_to_narrow_caches(self, call: dict[str, Any]) -> None:
        check.check_append(call, "cuda")

    @examples(100)
    @given(scatter_calls())
    def test_random_scatters(self, call: dict[str, Any]) -> None:
        check.check_scatter(call, "cuda")

    def test_what_has_no_place_is_left_out(self) -> None:
        check.check_appends_leave_out_what_has_no_place("cuda")
        check.check_scatters_leave_out_what_has_no_place("cuda")

    def test_new_keys_may_lie_in_the_cache(self) -> None:
        check.check_new_keys_may_lie_in_the_cache("cuda")

    @every_dtype
    def test_appended_keys_have_the_bits_of_apply_rotary(self, dtype: torch.dtype) -> None:
        check.check_appended_keys_have_the_bits_of_apply_rotary(dtype, "cuda")

    @pytest.mark.parametrize("cache_dtype", NARROW_DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_every_number(self, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
        check.check_every_number(dtype, cache_dtype, "cuda")

    def test_a_write_raises_the_versions(self) -> None:
        check.check_a_write_raises_the_versions("cuda")


class TestApplyRotary:
    @examples(100)
    @given(rotary_calls())
    def test_random_calls(self, call: dict[str, Any]) -> None:
        check.check_rotary(call, "cuda")

    def test_positions_are_bounded_by_the_tables(self) -> None:
        check.check_positions_are_bounded_by_the_tables("cuda")


class TestFlashAttnCombine:
    @examples(100)
    @given(combine_calls())
    def test_random_calls(self, call: dict[str, Any]) -> None:
        check.check_combine(call, "cuda")

    def test_rows_are_merged_alone(self) -> None:
        check.check_rows_are_merged_alone("cuda")


class TestGetSchedulerMetadata:
    def test_chunks_of_the_keys(self) -> None:
        check.check_metadata("cuda")


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    (call,) = (call for call in sample_calls("cuda", dtype) if call.name == name)
    results = torch.library.opcheck(
        call.operator, call.args, call.kwargs, test_utils=call.test_utils
    )
    assert set(results.values()) == {"SUCCESS"}


class Appends:
    """New keys for caches of pages, step after step, in tensors that stay where they are."""

    def __init__(self, cu_seqlens_k_new: Tensor | None) -> None:
        shape = (3, 4, 2, 64) if cu_seqlens_k_new is None else (12, 2, 64)
        self.k, self.v = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        self.caches = torch.zeros(2, 40, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
        self.cos, self.sin = (t.cuda() for t in rotary(300, 64))
        self.seqlens = torch.zeros(3, dtype=torch.int32, device="cuda")
        self.table = torch.zeros(3, 12, dtype=torch.int32, device="cuda")
        self.cu_seqlens = None if cu_seqlens_k_new is None else cu_seqlens_k_new.cuda()

    def append(self) -> None:
        arguments = (self.k, self.v, *self.caches, self.seqlens, None, self.table, self.cu_seqlens)
        check.run(ops.kvcache_append_, *arguments, self.cos, self.sin)

    def next(self, step: int) -> None:
        """Other keys, longer sequences, other pages, other counts."""
        torch.manual_seed(step)
        self.k.copy_(torch.randn(self.k.shape))
        self.v.copy_(torch.randn(self.v.shape))
        self.seqlens.copy_(ints(step, 2 * step, 191 - step))
        self.table.copy_(torch.randperm(40)[:36].view(3, 12))
        if self.cu_seqlens is not None:
            self.cu_seqlens.copy_(ints(0, step % 5, 5, 12 - step % 2))


@pytest.mark.parametrize("cu_seqlens_k_new", [None, ints(0, 1, 5, 12)], ids=["uniform", "ragged"])
def test_a_graph_appends_at_the_lengths_of_each_replay(cu_seqlens_k_new: Tensor | None) -> None:
    replayed, eager = Appends(cu_seqlens_k_new), Appends(cu_seqlens_k_new)
    replayed.append()  # compiles
    replayed.caches.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.append()
    for step in range(90):
        replayed.next(step)
        graph.replay()
        eager.next(step)
        eager.append()
        assert torch.equal(replayed.caches, eager.caches)
    assert replayed.caches.count_nonzero() > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu() -> None:
    """While the first one is current."""
    before = torch.cuda.memory_stats(0).get("allocation.all.allocated", 0)
    for name in SAMPLES:
        (call,) = (call for call in sample_calls("cuda:1") if call.name == name)
        results = call.operator(*call.args, **call.kwargs)
        for x in results if isinstance(results, tuple) else (results,):
            assert x is None or x.device == torch.device("cuda:1")
    torch.cuda.synchronize(1)
    assert torch.cuda.memory_stats(0).get("allocation.all.allocated", 0) == before
