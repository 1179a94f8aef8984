"""torch.npu.graph: recorded once, replayed with other lengths, pages and queries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from npu_calls import assert_close, assert_lse
from sample_inputs import ints, rand
from strategies import NARROW_DTYPES
from torch import Tensor

import fa3_ops
from fa3_ops import reference
from fa3_ops.backends.lowering.dequantise import VALUES
from fa3_ops.backends.npu import device

B, HEADS, HEADS_K, D, PAGE, PAGES = 3, 4, 2, 64, 16, 12
CAPACITY = PAGE * PAGES


class Decoder:
    """A decode step that appends and attends, its tensors where a graph finds them."""

    def __init__(self, device: str = "npu", **call: Any) -> None:
        torch.manual_seed(0)
        shape, half = (B * PAGES + 2, PAGE, HEADS_K, D), torch.float16
        self.k_cache, self.v_cache = (rand(*shape, dtype=half).to(device) for _ in range(2))
        self.page_table = torch.randperm(B * PAGES).int().view(B, PAGES).to(device)
        self.cache_seqlens = ints(3, 0, 17).to(device)
        self.q = rand(B, 1, HEADS, D, dtype=half).to(device)
        self.k, self.v = (rand(B, 1, HEADS_K, D, dtype=half).to(device) for _ in range(2))
        self.call = call

    def made_metadata(self) -> Tensor:
        return fa3_ops.get_scheduler_metadata(
            *(B, 1, CAPACITY, HEADS, HEADS_K, D, self.cache_seqlens, self.q.dtype),
            page_size=PAGE,
            max_seqlen_k_new=1,
            causal=True,
            **self.call,
        )

    def step(self, scheduler_metadata: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.ops.fa3npu.flash_attn_with_kvcache(
            *(self.q, self.k_cache, self.v_cache, self.k, self.v),
            cache_seqlens=self.cache_seqlens,
            page_table=self.page_table,
            causal=True,
            scheduler_metadata=scheduler_metadata,
            **self.call,
        )

    def advance(self) -> None:
        for x in (self.q, self.k, self.v):
            x.copy_(rand(*x.shape).to(x.dtype))
        self.cache_seqlens += 1


@pytest.mark.parametrize("call", [{}, {"window_size": (20, 0)}, {"softcap": 5.0}], ids=str)
def test_decode_50_times_as_eager(call: dict[str, Any]) -> None:
    graphed, eager = Decoder(**call), Decoder(**call)
    metadata = graphed.made_metadata()
    graphed.step(metadata)  # the first causal call makes its mask and waits
    eager.step()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out, softmax_lse = graphed.step(metadata)
    for step in range(50):
        torch.manual_seed(step)
        graphed.advance()
        torch.manual_seed(step)
        eager.advance()
        if step % 10 == 9:  # pages move, as a server moves them
            for decoder in (graphed, eager):
                decoder.page_table.copy_(decoder.page_table.roll(1, 0))
        metadata.copy_(graphed.made_metadata())
        graph.replay()
        want, want_lse = eager.step()
        assert torch.equal(out.cpu(), want.cpu())
        assert torch.equal(softmax_lse.cpu(), want_lse.cpu())
        assert torch.equal(graphed.k_cache.cpu(), eager.k_cache.cpu())
        assert torch.equal(graphed.v_cache.cpu(), eager.v_cache.cpu())


def test_nothing_runs_while_a_graph_is_recorded() -> None:
    decoder = Decoder()
    metadata = decoder.made_metadata()
    decoder.step(metadata)
    before = decoder.k_cache.cpu()
    decoder.advance()
    with torch.npu.graph(torch.npu.NPUGraph()):
        decoder.step(metadata)
    assert torch.equal(decoder.k_cache.cpu(), before)


def packed(q_lens: list[int], kv_lens: list[int], rows: int) -> dict[str, Tensor]:
    return {
        "cu_seqlens_q": ints(*torch.tensor([0, *q_lens]).cumsum(0).tolist()).npu(),
        "cache_seqlens": ints(*kv_lens).npu(),
        "q": rand(rows, HEADS, D, dtype=torch.float16).npu(),
    }


def test_padded_mixed_batches() -> None:
    """One graph of 5 sequences and 12 rows serves batches of any lengths: sequences without rows or
    keys, rows behind the last sequence, prefill beside decode."""
    torch.manual_seed(0)
    k_cache, v_cache = (rand(70, PAGE, HEADS_K, D, dtype=torch.float16).npu() for _ in range(2))
    page_table = torch.randperm(70)[:60].int().view(5, 12).npu()
    static = packed([1, 1, 1, 0, 0], [5, 1, 9, 0, 0], 12)

    def made(batch: dict[str, Tensor]) -> Tensor:
        return fa3_ops.get_scheduler_metadata(
            *(5, 8, CAPACITY, HEADS, HEADS_K, D, batch["cache_seqlens"], torch.float16),
            cu_seqlens_q=batch["cu_seqlens_q"],
            page_size=PAGE,
            causal=True,
        )

    def attend(batch: dict[str, Tensor], metadata: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.fa3npu.flash_attn_with_kvcache(
            *(batch["q"], k_cache, v_cache),
            cache_seqlens=batch["cache_seqlens"],
            page_table=page_table,
            cu_seqlens_q=batch["cu_seqlens_q"],
            max_seqlen_q=8,
            causal=True,
            scheduler_metadata=metadata,
        )

    metadata = made(static)
    attend(static, metadata)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out, softmax_lse = attend(static, metadata)
    for q_lens, kv_lens in (
        ([1, 1, 1, 0, 0], [5, 1, 9, 0, 0]),
        ([8, 1, 1, 1, 1], [100, 20, 1, 192, 3]),
        ([4, 0, 8, 0, 0], [2, 0, 8, 0, 0]),  # more rows than keys: some see none
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        ([1, 0, 3, 0, 1], [0, 7, 0, 0, 150]),
    ):
        batch = packed(q_lens, kv_lens, 12)
        for name, x in batch.items():
            static[name].copy_(x)
        metadata.copy_(made(static))
        graph.replay()
        eager, eager_lse = attend(batch, None)
        assert torch.equal(out.cpu(), eager.cpu())
        assert torch.equal(softmax_lse.cpu(), eager_lse.cpu())
        want, want_lse = reference.flash_attn_with_kvcache(
            *(x.cpu() for x in (batch["q"], k_cache, v_cache)),
            cache_seqlens=batch["cache_seqlens"].cpu(),
            page_table=page_table.cpu(),
            cu_seqlens_q=batch["cu_seqlens_q"].cpu(),
            causal=True,
        )
        assert_close(out, want, torch.float16)
        assert_lse(softmax_lse, want_lse, torch.float16)


@pytest.mark.parametrize("num_splits", [0, 1, 4])
def test_metadata_copied_from_a_plan_for_other_lengths(num_splits: int) -> None:
    """How the keys are cut is baked into metadata, and what a graph has recorded of the kernel may
    not depend on it: recorded with few keys, replayed with many and few."""
    torch.manual_seed(0)
    pages = 80
    k_cache, v_cache = (rand(3 * pages, PAGE, HEADS_K, D, dtype=torch.float16).npu() for _ in "kv")
    page_table = torch.randperm(3 * pages).int().view(3, pages).npu()
    static = packed([1, 1, 1], [5, 1, 9], 3)

    def made() -> Tensor:
        return fa3_ops.get_scheduler_metadata(
            *(3, 1, PAGE * pages, HEADS, HEADS_K, D, static["cache_seqlens"], torch.float16),
            cu_seqlens_q=static["cu_seqlens_q"],
            page_size=PAGE,
            causal=True,
            num_splits=num_splits,
        )

    def attend(metadata: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.fa3npu.flash_attn_kvcache(
            *(static["q"], k_cache, v_cache),
            cache_seqlens=static["cache_seqlens"],
            page_table=page_table,
            cu_seqlens_q=static["cu_seqlens_q"],
            max_seqlen_q=1,
            causal=True,
            num_splits=num_splits,
            scheduler_metadata=metadata,
        )

    metadata = made()
    attend(metadata)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out, softmax_lse = attend(metadata)
    plans = set()
    for kv_lens in ([1280, 1, 700], [1100, 1280, 1200], [3, 2, 1], [1, 0, 1279]):
        static["cache_seqlens"].copy_(ints(*kv_lens))
        static["q"].copy_(rand(3, HEADS, D, dtype=torch.float16))
        metadata.copy_(made())
        plans.add(bytes(metadata.cpu()))
        graph.replay()
        want, want_lse = attend(None)
        assert torch.equal(out.cpu(), want.cpu())
        assert torch.equal(softmax_lse.cpu(), want_lse.cpu())
        exact, exact_lse = reference.flash_attn_with_kvcache(
            *(x.cpu() for x in (static["q"], k_cache, v_cache)),
            cache_seqlens=ints(*kv_lens),
            page_table=page_table.cpu(),
            cu_seqlens_q=static["cu_seqlens_q"].cpu(),
            causal=True,
        )
        assert_close(out, exact, torch.float16)
        assert_lse(softmax_lse, exact_lse, torch.float16)
    assert len(plans) == 4


@pytest.mark.parametrize("dense", [False, True])
def test_metadata_of_the_first_sequences(dense: bool) -> None:
    """Servers pass the tensors of their largest batch beside the number of sequences that count.
    What lies behind may be anything: also a dummy with rows of q, also offsets that fall."""
    torch.manual_seed(0)
    most, rows = 5, 1 if dense else 9
    k_cache, v_cache = (rand(70, PAGE, HEADS_K, D, dtype=torch.float16).npu() for _ in "kv")
    page_table = torch.randperm(70)[:60].int().view(most, 12).npu()
    q_shape = (most, rows) if dense else (rows,)
    q = rand(*q_shape, HEADS, D, dtype=torch.float16).npu()
    offsets, seqlens = ints(0, 0, 0, 0, 0, 0).npu(), ints(0, 0, 0, 0, 0).npu()
    packing = {} if dense else {"cu_seqlens_q": offsets}

    def made(batch_size: int) -> Tensor:
        return fa3_ops.get_scheduler_metadata(
            *(batch_size, rows, CAPACITY, HEADS, HEADS_K, D, seqlens, torch.float16),
            **packing,
            page_size=PAGE,
            causal=True,
            num_splits=0,
        )

    def attend(metadata: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.fa3npu.flash_attn_kvcache(
            *(q, k_cache, v_cache),
            cache_seqlens=seqlens,
            page_table=page_table,
            **packing,
            **({} if dense else {"max_seqlen_q": rows}),
            causal=True,
            scheduler_metadata=metadata,
        )

    metadata = made(most)
    attend(metadata)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        captured = attend(metadata)
    for batch_size, ends, lens in (
        (3, [0, 1, 2, 3, 9, 9], [40, 1, 192, 10000, -4]),  # a dummy of 6 rows, of any length
        (2, [0, 4, 9, 0, 77, -1], [100, 7, 3, 3, 3]),
        (5, [0, 2, 3, 5, 8, 9], [9, 100, 2, 192, 1]),
        (1, [0, 9, 9, 9, 9, 9], [9, 0, 0, 0, 0]),
    ):
        offsets.copy_(ints(*ends))
        seqlens.copy_(ints(*lens))
        metadata.copy_(made(batch_size))
        graph.replay()
        counted = batch_size if dense else ends[batch_size]
        exact, exact_lse = reference.flash_attn_with_kvcache(
            *(x.cpu() for x in (q[:counted], k_cache, v_cache)),
            cache_seqlens=ints(*lens[:batch_size]),
            page_table=page_table[:batch_size].cpu(),
            **({} if dense else {"cu_seqlens_q": ints(*ends[: batch_size + 1])}),
            causal=True,
        )
        for out, softmax_lse in (captured, attend(metadata)):
            out, softmax_lse = out.cpu(), softmax_lse.cpu()
            lse, behind = (
                (softmax_lse[:counted], softmax_lse[counted:])
                if dense
                else (softmax_lse[:, :counted], softmax_lse[:, counted:])
            )
            assert_close(out[:counted], exact, torch.float16)
            assert_lse(lse, exact_lse, torch.float16)
            assert (out[counted:] == 0).all()
            assert (behind == float("-inf")).all()


@pytest.mark.parametrize("what", ["lengths", "batch", "heads", "scale", "softcap"])
def test_metadata_of_another_call_gives_nan(what: str) -> None:
    """The kernel would believe it, and be wrong without a word."""
    decoder = Decoder()
    metadata = decoder.made_metadata()
    assert not decoder.step(metadata)[0].cpu().isnan().any()
    if what == "lengths":
        decoder.cache_seqlens += 40
    elif what == "batch":
        for name in ("q", "k", "v", "cache_seqlens", "page_table"):
            setattr(decoder, name, getattr(decoder, name)[:2])
        with pytest.raises(ValueError, match=r"made from 2 cache_seqlens, torch.uint8 of shape"):
            decoder.step(metadata)
        return
    elif what == "heads":
        decoder.q = decoder.q.repeat(1, 1, 2, 1)
    elif what == "scale":
        decoder.call = {"softmax_scale": 0.3}
    else:
        decoder.call = {"softcap": 3.0}
    out, softmax_lse = decoder.step(metadata)
    assert out.cpu().isnan().all()
    assert softmax_lse.cpu().isnan().all()


def strided_cache(name: str) -> tuple[Tensor, Tensor]:
    """k_cache and v_cache of B * PAGES pages that are not dense memory."""
    shape = (B * PAGES, PAGE, HEADS_K, D)
    if name == "spare token":  # behind every page
        return tuple(rand(B * PAGES, PAGE + 1, HEADS_K, D).half().npu()[:, :PAGE] for _ in "kv")
    if name == "heads first":
        return tuple(rand(B * PAGES, HEADS_K, PAGE, D).half().npu().transpose(1, 2) for _ in "kv")
    assert name == "interleaved"
    both = rand(B * PAGES, 2, *shape[1:]).half().npu()
    return both[:, 0], both[:, 1]


class Reader(Decoder):
    """A decode step that only attends, over a cache of any layout or dtype, with a q of the same
    dtype or another one."""

    def __init__(self, k_cache: Tensor, v_cache: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.k_cache, self.v_cache = k_cache, v_cache
        self.q = self.q.cpu().to(dtype or k_cache.dtype).npu()

    def made_for(self, dtype: torch.dtype) -> Tensor:
        return fa3_ops.get_scheduler_metadata(
            *(B, 1, CAPACITY, HEADS, HEADS_K, D, self.cache_seqlens, dtype),
            page_size=PAGE,
            causal=True,
        )

    def step(self, scheduler_metadata: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.ops.fa3npu.flash_attn_kvcache(
            *(self.q, self.k_cache, self.v_cache),
            cache_seqlens=self.cache_seqlens,
            page_table=self.page_table,
            causal=True,
            scheduler_metadata=scheduler_metadata,
        )

    def check(self, dtype: torch.dtype) -> None:
        """Metadata changes no number, neither in eager nor in a capture."""
        metadata = self.made_for(dtype)
        eager = self.step(metadata)
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            captured = self.step(metadata)
        for step in range(3):
            self.cache_seqlens += 20 * step
            metadata.copy_(self.made_for(dtype))
            graph.replay()
            want, want_lse = self.step()
            for out, softmax_lse in (
                captured,
                self.step(metadata),
                *([eager] if step == 0 else []),
            ):
                assert_close(out, want.cpu().double(), torch.bfloat16)
                assert_lse(softmax_lse, want_lse.cpu().double(), torch.float16)


@pytest.mark.parametrize("layout", ["spare token", "heads first"])
def test_metadata_of_a_cache_that_is_not_read_in_place(layout: str) -> None:
    """It is made for the pages that the caller has. Eager calls do without it, a captured one
    copies the pages, so that they stay those."""
    reader = Reader(*strided_cache(layout))
    with pytest.warns(fa3_ops.FallbackWarning, match="copies what is read of the cache"):
        reader.check(torch.float16)


def test_metadata_of_interleaved_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3NPU_STRICT", "1")  # nothing is copied
    Reader(*strided_cache("interleaved")).check(torch.float16)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16], ids=str)
def test_metadata_of_an_fp8_cache(dtype: torch.dtype) -> None:
    """The kernel gets float16 pages of another size."""
    shape = (B * PAGES, PAGE, HEADS_K, D)
    Reader(*(rand(*shape).to(torch.float8_e4m3fn).npu() for _ in "kv")).check(dtype)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize("cache", NARROW_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_metadata_of_a_narrow_cache(cache: torch.dtype, dtype: torch.dtype) -> None:
    """Beside a wider q: no kernel gets the pages that it was made for."""
    torch.manual_seed(0)
    shape = (B * PAGES, PAGE, HEADS_K, D)
    values = (torch.randn(*shape) for _ in "kv")
    if cache == torch.int8:  # some units, without a descale
        values = (x.round().clamp(-2, 2) for x in values)
    Reader(*(x.to(cache).npu() for x in values), dtype).check(dtype)


@pytest.mark.parametrize("name", ["fused_infer_attention", "torch"])
def test_metadata_beside_a_backend_that_does_not_read_it(name: str) -> None:
    decoder = Decoder()
    decoder.page_table = decoder.page_table // 8  # of pages that FIA has
    decoder.k_cache, decoder.v_cache = (
        rand(6, 128, HEADS_K, D, dtype=torch.float16).npu() for _ in "kv"
    )
    stale = decoder.made_metadata()
    with fa3_ops.use_backend(name):
        want, got = decoder.step(), decoder.step(stale)
    assert torch.equal(got[0].cpu(), want[0].cpu())


# ---- What is made once -------------------------------------------------------------------------


@pytest.fixture
def nothing_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process."""
    monkeypatch.setattr(device, "_constants", {})


@pytest.mark.usefixtures("nothing_made")
@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize("what", ["mask", "fp8"])
def test_what_one_stream_makes_others_may_use(what: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float8_e4m3fn if what == "fp8" else torch.float16
    q, k, v = (rand(1, 5, 2, 64).to(dtype) for _ in range(3))
    want, _ = reference.batched(q, k, v, causal=True)
    inputs = [x.npu() for x in (q, k, v)]
    torch.npu.synchronize()
    with fa3_ops.use_backend("fused_infer_attention"):
        with torch.npu.stream(torch.npu.Stream()):
            first = fa3_ops.flash_attn_func(*inputs, causal=True)
        with torch.npu.stream(torch.npu.Stream()):
            assert_close(fa3_ops.flash_attn_func(*inputs, causal=True), want, torch.bfloat16)
    torch.npu.synchronize()
    assert_close(first, want, torch.bfloat16)


@pytest.mark.usefixtures("nothing_made")
@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
def test_the_fp8_table_of_a_capture_is_its_own() -> None:
    """Its memory is the graph's, and nothing in it comes from the host."""
    shape = (B * PAGES, PAGE, HEADS_K, D)
    reader = Reader(*(rand(*shape).to(torch.float8_e4m3fn).npu() for _ in "kv"))
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out, _ = reader.step()
    assert device._constants == {}
    for _ in range(2):
        reader.cache_seqlens += 5
        graph.replay()
        assert_close(out, reader.step()[0].cpu().double(), torch.bfloat16)
    del graph, out
    again = reader.step()[0].cpu()  # the first outside of it makes one that stays
    assert not again.isnan().any()


@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_the_fp8_tables(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(dtype).float()
    got = VALUES[dtype](torch.device("npu:0")).cpu()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit(), want.signbit())


def test_without_metadata_plain_torch_is_captured() -> None:
    decoder = Decoder()
    graph = torch.npu.NPUGraph()
    with (
        pytest.warns(fa3_ops.FallbackWarning, match="graph capture without scheduler_metadata"),
        torch.npu.graph(graph),
    ):
        out, softmax_lse = decoder.step()
    for _ in range(3):
        decoder.advance()
        graph.replay()
        lengths = decoder.cache_seqlens.cpu() + 1
        want, want_lse = reference.batched(
            *(x.cpu() for x in (decoder.q, decoder.k_cache, decoder.v_cache)),
            seqused_k=lengths,
            page_table=decoder.page_table.cpu(),
            causal=True,
        )
        assert_close(out, want, torch.float16)
        assert_lse(softmax_lse, want_lse, torch.float16)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
def test_a_window_over_fewer_keys_than_rows() -> None:
    """Nobody knows how few keys there will be, and the kernel would change the window for them."""
    decoder = Decoder()
    window = {"window_size": (2, -1)}
    q = rand(B, 6, HEADS, D, dtype=torch.float16).npu()
    metadata = fa3_ops.get_scheduler_metadata(
        *(B, 6, CAPACITY, HEADS, HEADS_K, D, decoder.cache_seqlens, q.dtype),
        page_size=PAGE,
        **window,
    )

    def attend() -> tuple[Tensor, Tensor]:
        return fa3_ops.flash_attn_with_kvcache(
            *(q, decoder.k_cache, decoder.v_cache),
            cache_seqlens=decoder.cache_seqlens,
            page_table=decoder.page_table,
            scheduler_metadata=metadata,
            return_softmax_lse=True,
            **window,
        )

    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        captured = attend()
    for lengths in ((3, 0, 17), (3, 0, 2)):
        decoder.cache_seqlens.copy_(ints(*lengths))
        graph.replay()
        want, want_lse = reference.batched(
            *(x.cpu() for x in (q, decoder.k_cache, decoder.v_cache)),
            seqused_k=ints(*lengths),
            page_table=decoder.page_table.cpu(),
            **window,
        )
        for out, softmax_lse in (captured, attend()):
            assert_close(out, want, torch.float16)
            assert_lse(softmax_lse, want_lse, torch.float16)


def test_a_host_sync_in_the_path_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fa3_ops.backends.npu import flash_attn_npu

    decoder = Decoder()
    metadata = decoder.made_metadata()
    decoder.step(metadata)
    blind_rows = flash_attn_npu.blind_rows

    def waits(call: Any) -> Tensor:
        call.seqused_k.max().item()
        return blind_rows(call)

    monkeypatch.setattr(flash_attn_npu, "blind_rows", waits)
    with pytest.raises(RuntimeError), torch.npu.graph(torch.npu.NPUGraph()):
        decoder.step(metadata)


def test_making_metadata_makes_the_mask_too() -> None:
    """In a fresh process: the first call of the kernel is the captured one."""
    code = """
import test_npu_capture as t, torch
decoder = t.Decoder()
metadata = decoder.made_metadata()
graph = torch.npu.NPUGraph()
with torch.npu.graph(graph):
    out, _ = decoder.step(metadata)
graph.replay()
assert not out.cpu().isnan().any()
"""
    here = Path(__file__).parent
    paths = [here, here.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    standin = "from cann_emulator import standin; standin.use('0.4')"
    command = [sys.executable, "-c", standin + code]
    subprocess.run(command, check=True, env=environment, timeout=120)


def test_making_metadata_cannot_be_captured_and_says_so() -> None:
    decoder = Decoder()
    with (
        pytest.raises(ValueError, match="cannot be captured: call it before each replay"),
        torch.npu.graph(torch.npu.NPUGraph()),
    ):
        decoder.made_metadata()
    op = torch.ops.fa3npu.get_scheduler_metadata.default
    assert torch.Tag.cudagraph_unsafe in op.tags


def test_what_does_not_fit_is_left_out_of_a_captured_append() -> None:
    """Nothing may be written outside the pages of its sequence."""
    decoder = Decoder()
    metadata = decoder.made_metadata()
    decoder.step(metadata)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        decoder.step(metadata)
    decoder.cache_seqlens.copy_(ints(CAPACITY, 4, 5).npu())
    before = decoder.k_cache.cpu()
    graph.replay()
    after, table = decoder.k_cache.cpu(), decoder.page_table.cpu()
    changed = (before != after).flatten(2).any(-1).nonzero().tolist()
    expected = [[int(table[1, 0]), 4], [int(table[2, 0]), 5]]
    assert sorted(changed) == sorted(expected)
