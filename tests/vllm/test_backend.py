"""The backend without an engine: every feature against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata

from fa3_ops import reference
from fa3_ops.integrations.vllm.backend import Fa3Impl
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
    lengths: list[tuple[int, int]], causal: Any = True, padding: int = 0, **sizes: int
) -> Step:
    """Random; `padding` tokens at the end have no sequence and no slot."""
    headdim_v = sizes.get("headdim_v", HEADDIM)
    keys = [torch.randn(n, HEADS_K, HEADDIM) for _, n in lengths]
    values = [torch.randn(n, HEADS_K, headdim_v) for _, n in lengths]
    pages = torch.randperm(PAGES - 1)[: sum(-(-n // PAGE) for _, n in lengths)] + 1
    table = torch.zeros(len(lengths), -(-max(n for _, n in lengths) // PAGE), dtype=torch.int32)
    slots, taken = [], 0
    for b, (rows, n) in enumerate(lengths):
        own = pages[taken : taken + -(-n // PAGE)]
        taken += len(own)
        table[b, : len(own)] = own
        at = torch.arange(n - rows, n)
        slots.append(own[at // PAGE] * PAGE + at % PAGE)
    rows = [rows for rows, _ in lengths]
    starts = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    nothing = torch.full((padding,), float("nan"))
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([n for _, n in lengths], dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=sum(rows),
        max_query_len=max(rows),
        max_seq_len=max(n for _, n in lengths),
        block_table_tensor=table,
        slot_mapping=torch.cat([*slots, torch.full((padding,), -1)]),
        causal=causal,
    )
    new = [
        torch.cat(
            [
                *(x[n - r :] for x, (r, n) in zip(xs, lengths, strict=True)),
                nothing[:, None, None].expand(-1, *xs[0].shape[1:]),
            ]
        )
        for xs in (keys, values)
    ]
    query = torch.cat(
        [torch.randn(sum(rows), HEADS, HEADDIM), nothing[:, None, None].expand(-1, HEADS, HEADDIM)]
    )
    return Step(query, new[0], new[1], keys, values, common)


def cache_of(step: Step, side_by_side: bool) -> Tensor:
    """vLLM's cache with the tokens before the step in it, NaN elsewhere; the heads of a token lie
    side by side, or a head's tokens do."""
    width = HEADDIM + step.value.shape[-1]
    shape = (PAGES, PAGE, HEADS_K, width) if side_by_side else (PAGES, HEADS_K, PAGE, width)
    cache = torch.full(shape, float("nan"))
    cache = cache.transpose(1, 2) if side_by_side else cache
    before = step.common.seq_lens - step.common.query_start_loc.diff()
    for b, n in enumerate(before.tolist()):
        for t in range(n):
            page = step.common.block_table_tensor[b, t // PAGE]
            both = torch.cat([step.keys[b][t], step.values[b][t]], dim=-1)
            cache[page, :, t % PAGE] = both
    return cache


def run(step: Step, impl: Fa3Impl, cache: Tensor, write: bool = True) -> Tensor:
    """What a layer of vLLM does: the write, then the attention."""
    metadata = Fa3MetadataBuilder(None, [], None, torch.device("cpu")).build(0, step.common)
    output = torch.full((len(step.query), HEADS, step.value.shape[-1]), float("nan"))
    if write:
        impl.do_kv_cache_update(None, step.key, step.value, cache, metadata.slot_mapping)
    returned = impl.forward(None, step.query, step.key, step.value, cache, metadata, output)
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


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", [AttentionType.ENCODER_ONLY, AttentionType.ENCODER])
def test_an_encoder_has_no_cache(kind: AttentionType, window: int | None) -> None:
    whole = step([(40, 40), (1, 1), (65, 65)], causal=False)
    output = run(whole, impl(attn_type=kind, sliding_window=window), torch.tensor([]))
    check(output, expected(whole, [False] * 3, window))


def test_warming_up_is_no_attention() -> None:
    query, output = torch.randn(4, HEADS, HEADDIM), torch.zeros(4, HEADS, HEADDIM)
    assert impl().forward(None, query, query, query, torch.tensor([]), None, output) is output
