"""The backend without an engine: every feature against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata

from fa3_ops import reference
from fa3_ops.integrations.vllm.backend import Fa3Backend, Fa3Impl
from fa3_ops.integrations.vllm.metadata import Fa3MetadataBuilder

HEADS, HEADS_K, HEADDIM, PAGE, PAGES = 8, 2, 32, 16, 64
# (rows of the query, keys): a prefill, a chunk, a decode, a step of speculation, another decode
MIXED = [(40, 40), (30, 100), (1, 65), (4, 20), (1, 1)]


@dataclass
class Step:
    """One step of an engine: what the layer gets, and the dense tensors that it stands for."""

    query: Tensor
    key: Tensor  # the new tokens' alone
    value: Tensor
    keys: list[Tensor]  # of each sequence, all of them
    values: list[Tensor]
    common: CommonAttentionMetadata


def step(
    lengths: list[tuple[int, int]],
    causal: bool | Tensor = True,
    padding: int = 0,
    headdim_v: int = HEADDIM,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Random; `padding` tokens at the end have no sequence and no slot."""
    keys = [torch.randn(n, HEADS_K, HEADDIM).to(dtype) for _, n in lengths]
    values = [torch.randn(n, HEADS_K, headdim_v).to(dtype) for _, n in lengths]
    starts = torch.tensor([0, *(rows for rows, _ in lengths)]).cumsum(0).to(torch.int32)
    table, slots = places(lengths)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([n for _, n in lengths], dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(rows for rows, _ in lengths),
        max_seq_len=max(n for _, n in lengths),
        block_table_tensor=table,
        slot_mapping=F.pad(slots, (0, padding), value=-1),
        causal=causal,
    )

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, padding), value=float("nan"))

    key, value = (
        padded(torch.cat([x[n - rows :] for x, (rows, n) in zip(xs, lengths, strict=True)]))
        for xs in (keys, values)
    )
    query = padded(torch.randn(int(starts[-1]), HEADS, HEADDIM).to(dtype))
    return Step(query, key, value, keys, values, common)


def places(lengths: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The block table, of pages in disorder, and the slots of the new tokens."""
    counts = [-(-n // PAGE) for _, n in lengths]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    slots = []
    pages = (torch.randperm(PAGES - 1) + 1)[: sum(counts)].split(counts)
    for b, (own, (rows, n)) in enumerate(zip(pages, lengths, strict=True)):
        table[b, : len(own)] = own
        at = torch.arange(n - rows, n)
        slots.append(own[at // PAGE] * PAGE + at % PAGE)
    return table, torch.cat(slots)


def cache_of(step: Step, side_by_side: bool) -> Tensor:
    """vLLM's cache with the tokens before the step in it, NaN elsewhere; the heads of a token lie
    side by side, or a head's tokens do."""
    width = HEADDIM + step.value.shape[-1]
    shape = (PAGES, PAGE, HEADS_K, width) if side_by_side else (PAGES, HEADS_K, PAGE, width)
    cache = torch.full(shape, float("nan"), dtype=step.key.dtype)
    cache = cache.transpose(1, 2) if side_by_side else cache
    before = step.common.seq_lens - step.common.query_start_loc.diff()
    for b, n in enumerate(before.tolist()):
        for t in range(n):
            page = step.common.block_table_tensor[b, t // PAGE]
            both = torch.cat([step.keys[b][t], step.values[b][t]], dim=-1)
            cache[page, :, t % PAGE] = both
    return cache


def run(step: Step, impl: Fa3Impl, cache: Tensor, write: bool = True, layer: Any = None) -> Tensor:
    """What a layer of vLLM does: the write, then the attention."""
    metadata = Fa3MetadataBuilder(None, [], None, torch.device("cpu")).build(0, step.common)
    output = step.query.new_full((len(step.query), HEADS, step.value.shape[-1]), float("nan"))
    if write:
        impl.do_kv_cache_update(layer, step.key, step.value, cache, metadata.slot_mapping)
    returned = impl.forward(layer, step.query, step.key, step.value, cache, metadata, output)
    assert returned is output
    return output


def expected(step: Step, causal: list[bool], window: int | None = None, **scores: Any) -> Tensor:
    rows = step.common.query_start_loc.tolist()
    outs = []
    for b, (k, v) in enumerate(zip(step.keys, step.values, strict=True)):
        left = -1 if window is None else window - 1
        out, _ = reference.attention(
            step.query[rows[b] : rows[b + 1]],
            k,
            v,
            causal=causal[b],
            window_size=(left, 0 if causal[b] else left),
            softmax_scale=0.2,
            **scores,
        )
        outs.append(out)
    return torch.cat(outs)


def impl(**arguments: Any) -> Fa3Impl:
    return Fa3Impl(HEADS, HEADDIM, 0.2, HEADS_K, **arguments)


def check(output: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(output[: len(wanted)].double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side_by_side", [True, False])
class TestACache:
    def test_a_mixed_batch_is_one_call(
        self, side_by_side: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import fa3_ops

        calls = []
        real = fa3_ops.flash_attn_varlen_func
        mixed, ours = step(MIXED), impl()
        ours.told = True
        monkeypatch.setattr(
            fa3_ops, "flash_attn_varlen_func", lambda **a: calls.append(a) or real(**a)
        )
        cache = cache_of(mixed, side_by_side)
        check(run(mixed, ours, cache), expected(mixed, [True] * 5))
        (call,) = calls
        storage = cache.untyped_storage().data_ptr()
        assert call["k"].untyped_storage().data_ptr() == storage
        assert call["v"].untyped_storage().data_ptr() == storage

    def test_padding_is_neither_read_nor_written(self, side_by_side: bool) -> None:
        padded = step(MIXED, padding=7)
        cache = cache_of(padded, side_by_side)
        before = cache.clone()
        output = run(padded, impl(), cache)
        check(output, expected(padded, [True] * 5))
        assert output[-7:].isnan().all()
        written = (cache.nan_to_num(1e9) != before.nan_to_num(1e9)).any(-1).any(1).flatten()
        slots = padded.common.slot_mapping
        assert written.nonzero().flatten().tolist() == sorted(slots[slots >= 0].tolist())

    @pytest.mark.parametrize("window", [1, 5, 64])
    def test_a_window_counts_the_query_itself(self, side_by_side: bool, window: int) -> None:
        mixed = step(MIXED)
        output = run(mixed, impl(sliding_window=window), cache_of(mixed, side_by_side))
        check(output, expected(mixed, [True] * 5, window))

    def test_softcap_sinks_and_alibi(self, side_by_side: bool) -> None:
        mixed, sinks = step(MIXED), torch.randn(HEADS)
        slopes = [2.0 ** -(h + 1) for h in range(HEADS)]
        ours = impl(logits_soft_cap=3.0, sinks=sinks, alibi_slopes=slopes)
        wanted = expected(
            mixed, [True] * 5, softcap=3.0, sinks=sinks, alibi_slopes=torch.tensor(slopes)
        )
        check(run(mixed, ours, cache_of(mixed, side_by_side)), wanted)

    def test_values_of_another_width(self, side_by_side: bool) -> None:
        mixed = step(MIXED, headdim_v=48)
        check(run(mixed, impl(), cache_of(mixed, side_by_side)), expected(mixed, [True] * 5))

    @pytest.mark.parametrize("window", [None, 5])
    def test_without_causality(self, side_by_side: bool, window: int | None) -> None:
        mixed = step(MIXED, causal=False)
        output = run(mixed, impl(sliding_window=window), cache_of(mixed, side_by_side))
        check(output, expected(mixed, [False] * 5, window))

    @pytest.mark.parametrize("window", [None, 5])
    def test_causality_of_each_sequence(self, side_by_side: bool, window: int | None) -> None:
        causal = [True, False, True, False, True]
        mixed = step(MIXED, causal=torch.tensor(causal), padding=2)
        output = run(mixed, impl(sliding_window=window), cache_of(mixed, side_by_side))
        check(output, expected(mixed, causal, window))

    def test_a_layer_that_shares_anothers_cache_only_reads(self, side_by_side: bool) -> None:
        mixed = step(MIXED)
        cache = cache_of(mixed, side_by_side)
        first = run(mixed, impl(), cache)
        shared = impl(kv_sharing_target_layer_name="first")
        assert torch.equal(run(mixed, shared, cache, write=False), first)


class TestNarrowCaches:
    """As vLLM keeps them: bytes, and a factor for the layer or for each head."""

    @pytest.mark.parametrize("scales", [(0.5, 2.0), ([0.5, 0.25], [2.0, 3.0])])
    @pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2"])
    def test_is_written_and_read(self, name: str, scales: tuple[Any, Any]) -> None:
        dtype = torch.float8_e5m2 if name == "fp8_e5m2" else torch.float8_e4m3fn
        factors = [torch.tensor(scale) for scale in scales]

        def narrowed(x: Tensor, factor: Tensor) -> Tensor:
            return (x.float() / factor.view(-1, 1)).to(dtype)

        mixed = step(MIXED, dtype=torch.bfloat16)
        wide = cache_of(mixed, side_by_side=True).transpose(1, 2)  # the heads beside the factors
        halves = zip(wide.split(HEADDIM, dim=-1), factors, strict=True)
        cache = torch.cat([narrowed(x, f).view(torch.uint8) for x, f in halves], dim=-1)
        layer = SimpleNamespace(_k_scale=factors[0], _v_scale=factors[1])
        output = run(mixed, impl(kv_cache_dtype=name), cache.transpose(1, 2), layer=layer)

        for xs, factor in zip((mixed.keys, mixed.values), factors, strict=True):
            xs[:] = [narrowed(x, factor).float() * factor.view(-1, 1) for x in xs]
        wanted = expected(mixed, [True] * 5)
        assert (output.double() - wanted).abs().max() < 4 * 2**-8 * wanted.abs().max()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", [AttentionType.ENCODER_ONLY, AttentionType.ENCODER])
def test_an_encoder_has_no_cache(kind: AttentionType, window: int | None) -> None:
    whole = step([(40, 40), (1, 1), (65, 65)], causal=False)
    output = run(whole, impl(attn_type=kind, sliding_window=window), torch.tensor([]))
    check(output, expected(whole, [False] * 3, window))


def test_a_decoder_attends_to_an_encoder() -> None:
    """Rows 3 and 2 of the decoder; what the encoder said is written in the first step alone."""
    whole = step([(20, 20), (40, 40)])
    decoder = torch.tensor([0, 3, 5], dtype=torch.int32)
    query = torch.randn(5, HEADS, HEADDIM)
    spec = SimpleNamespace(block_size=PAGE)
    backend = create_cross_attention_backend(Fa3Backend)
    ours = backend.get_impl_cls()(
        HEADS, HEADDIM, 0.2, HEADS_K, attn_type=AttentionType.ENCODER_DECODER
    )
    builder = backend.get_builder_cls()(spec, [], None, torch.device("cpu"))
    layer = SimpleNamespace(kv_sharing_target_layer_name=None)
    cache = torch.full((PAGES, HEADS_K, PAGE, 2 * HEADDIM), float("nan"))
    wanted = torch.cat(
        [
            reference.attention(rows, k, v, softmax_scale=0.2)[0]
            for rows, k, v in zip(query.split([3, 2]), whole.keys, whole.values, strict=True)
        ]
    )
    for before, key, value in ((0, whole.key, whole.value), (4, None, None)):
        common = whole.common.replace(
            query_start_loc=decoder,
            query_start_loc_cpu=decoder,
            num_actual_tokens=5,
            max_query_len=3,
            seq_lens_cpu_upper_bound=decoder.diff() + before,
            encoder_seq_lens=whole.common.seq_lens,
            encoder_seq_lens_cpu=whole.common.seq_lens.numpy(),
        )
        output = torch.full_like(query, float("nan"))
        metadata = builder.build(0, common)
        ours.forward(layer, query, key, value, cache, metadata, output)
        check(output, wanted)


def test_warming_up_is_no_attention() -> None:
    query, output = torch.randn(4, HEADS, HEADDIM), torch.zeros(4, HEADS, HEADDIM)
    assert impl().forward(None, query, query, query, torch.tensor([]), None, output) is output
