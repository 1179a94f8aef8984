"""compat/flash_attn_npu_v3: the module that vLLM-Ascend imports, called as it calls it."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sample_inputs import ints, rand, rotary
from torch import Tensor

import fa3_ops
from fa3_ops import reference

FOLDER = Path(__file__).parents[1] / "compat" / "flash_attn_npu_v3"
NHEADS, NHEADS_K, HEADDIM, PAGE_SIZE = 4, 2, 32, 16


@pytest.fixture(scope="module")
def v3() -> Iterator[ModuleType]:
    """The module, found without being installed."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("flash_attn_npu_v3")
    sys.path.remove(str(FOLDER))
    del sys.modules["flash_attn_npu_v3"]


@dataclass
class Batch:
    """What a serving engine holds of one step: requests in order, decodes before prefills. The K
    and V caches are views of one tensor, all pages of each."""

    query_lens: list[int]
    seq_lens: list[int]
    num_decodes: int

    def __post_init__(self) -> None:
        self.query = rand(sum(self.query_lens), NHEADS, HEADDIM)
        self.query_start_loc = ints(0, *torch.tensor(self.query_lens).cumsum(0).tolist())
        pages = len(self.seq_lens) * 4
        self.key_cache, self.value_cache = rand(2, pages, PAGE_SIZE, NHEADS_K, HEADDIM)
        self.block_tables = torch.randperm(pages).int().view(len(self.seq_lens), 4)

    @property
    def num_decode_tokens(self) -> int:
        return sum(self.query_lens[: self.num_decodes])

    def call(
        self, v3: ModuleType, requests: slice, tokens: slice, causal: bool, **more: Any
    ) -> Any:
        """Its keyword arguments; max_seqlen_q is the longest k, a tensor of no dimension."""
        seq_lens = ints(*self.seq_lens)[requests]
        first, last = requests.indices(len(self.seq_lens))[:2]
        arguments = {
            "cache_seqlens": seq_lens,
            "page_table": self.block_tables[requests],
            "cu_seqlens_q": self.query_start_loc[first : last + 1],
            "max_seqlen_q": max(seq_lens),
            "causal": causal,
            "window_size": [-1, -1],
            "rotary_interleaved": False,
            "num_splits": 1,
            "softcap": 0.0,
            "attention_chunk": 0,
            "sm_margin": 0,
            "return_softmax_lse": False,
        }
        caches = (self.key_cache, self.value_cache)
        return v3.flash_attn_with_kvcache(self.query[tokens], *caches, **(arguments | more))

    def two_calls(self, v3: ModuleType) -> Tensor:
        outs = []
        if self.num_decodes:
            decodes = slice(0, self.num_decodes)
            outs.append(self.call(v3, decodes, slice(0, self.num_decode_tokens), False))
        if self.num_decodes < len(self.seq_lens):
            prefills = slice(self.num_decodes, None)
            outs.append(self.call(v3, prefills, slice(self.num_decode_tokens, None), True))
        return torch.cat(outs)

    def expected(self, b: int, causal: bool) -> tuple[Tensor, Tensor]:
        """Request b by itself: out (query_len, nheads, headdim), softmax_lse (nheads, query_len)."""
        first = int(self.query_start_loc[b])
        keys, values = (
            cache[self.block_tables[b].long()].flatten(0, 1)[: self.seq_lens[b]]
            for cache in (self.key_cache, self.value_cache)
        )
        q = self.query[first : first + self.query_lens[b]]
        return reference.attention(q, keys, values, causal=causal)

    def assert_right(self, out: Tensor, causal: list[bool]) -> None:
        wanted = torch.cat([self.expected(b, c)[0] for b, c in enumerate(causal)])
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "num_decodes"),
    [
        pytest.param([1, 1, 20, 7], [33, 64, 20, 7], 2, id="mixed"),
        pytest.param([1, 1, 1], [33, 1, 64], 3, id="decode only"),
        pytest.param([20, 64, 1], [20, 64, 1], 0, id="prefill only"),
        pytest.param([1, 16, 5], [40, 48, 64], 1, id="chunked prefill"),
        pytest.param([1, 0, 9, 0], [40, 1, 9, 1], 2, id="padded with requests without rows"),
    ],
)
def test_batches_as_vllm_ascend_calls_them(
    v3: ModuleType, query_lens: list[int], seq_lens: list[int], num_decodes: int
) -> None:
    batch = Batch(query_lens, seq_lens, num_decodes)
    is_prefill = [b >= num_decodes for b in range(len(seq_lens))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = batch.two_calls(v3)
    batch.assert_right(out, is_prefill)
    # One call for all is what it should do; causal changes nothing for one row of q.
    batch.assert_right(batch.call(v3, slice(None), slice(None), True), is_prefill)


def test_speculative_tokens(v3: ModuleType) -> None:
    """causal=False is done as asked, and warned of; with causal=True it is what decoding means."""
    batch = Batch([3, 2, 20], [33, 40, 20], 2)
    with pytest.warns(UserWarning, match="up to 3 rows of q a sequence"):
        out = batch.call(v3, slice(0, 2), slice(0, 5), False)
    torch.testing.assert_close(
        out.double(), torch.cat([batch.expected(b, False)[0] for b in (0, 1)]), rtol=0, atol=1e-5
    )
    batch.assert_right(batch.call(v3, slice(None), slice(None), True), [True] * 3)


def test_block_tables_sliced_by_tokens(v3: ModuleType) -> None:
    """As vLLM-Ascend does, with 2 decodes of 5 tokens in all and a table padded to 9 rows."""
    batch = Batch([3, 2, 20, 7], [33, 40, 20, 7], 2)
    padded = torch.cat([batch.block_tables, torch.zeros(5, 4, dtype=torch.int32)])
    for table in (padded[2:], padded[:1], batch.block_tables[5:]):
        with pytest.raises(ValueError, match="slice it by requests, like cache_seqlens") as info:
            batch.call(v3, slice(2, None), slice(5, None), True, page_table=table)
        assert f"each of the 2 sequences, got {len(table)} rows" in str(info.value)


def test_q_that_is_not_sliced(v3: ModuleType) -> None:
    """Rows counted from 0, as since flash_attn_npu 0.3, are not taken for rows of the slice."""
    batch = Batch([1, 1, 20, 7], [33, 64, 20, 7], 2)
    with pytest.raises(ValueError, match=r"q must be the rows that cu_seqlens_q bounds, q\[2:29\]"):
        batch.call(v3, slice(2, None), slice(None), True)
    with pytest.raises(ValueError, match="must be at most the 20 rows of its tensor, got 27"):
        batch.call(v3, slice(2, None), slice(2, 22), True)


def test_max_seqlen_q(v3: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets the longest sequence of q, whatever came; with scheduler_metadata nobody
    looks."""
    batch = Batch([1, 1, 20, 7], [33, 64, 20, 7], 2)
    got: list[int] = []
    kernel = fa3_ops.flash_attn_with_kvcache

    def seen(*args: Any, **kwargs: Any) -> Any:
        got.append(args[14])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(fa3_ops, "flash_attn_with_kvcache", seen)
    batch.two_calls(v3)
    assert got == [1, 20]
    metadata = ints(0, 0)
    batch.call(v3, slice(2, None), slice(2, None), True, scheduler_metadata=metadata)
    assert got[2] == 20  # max_seqlen_q as it came: the longest k
    batch.call(
        v3, slice(2, None), slice(2, None), True, scheduler_metadata=metadata, max_seqlen_q=64
    )
    assert got[3] == 64
    batch.call(v3, slice(2, None), slice(2, None), True, max_seqlen_q=19)
    assert got[4] == 20


def test_a_first_prefill_beside_a_dummy_of_more_rows(v3: ModuleType) -> None:
    """vLLM-Ascend pads a batch by one request and takes max_seqlen_q from the real ones."""
    batch = Batch([2, 6], [2, 6], 2)
    out = batch.call(v3, slice(None), slice(None), True, max_seqlen_q=2)
    assert torch.equal(out, batch.call(v3, slice(None), slice(None), True, max_seqlen_q=6))


def test_softmax_lse_is_token_major(v3: ModuleType) -> None:
    batch = Batch([1, 20, 7], [33, 20, 7], 1)
    _, lse, *rest = batch.call(v3, slice(1, None), slice(1, None), True, return_softmax_lse=True)
    assert lse.shape == (27, NHEADS)
    assert lse.is_contiguous()
    wanted = torch.cat([batch.expected(b, True)[1] for b in (1, 2)], dim=1).T
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-5, atol=1e-5)
    assert [x.numel() for x in rest] == [0, 0]

    q = rand(2, 3, NHEADS, HEADDIM)
    cache = rand(2, 2, 30, NHEADS_K, HEADDIM)
    _, lse, *_ = v3.flash_attn_with_kvcache(q, *cache, cache_seqlens=9, return_softmax_lse=True)
    _, wanted = reference.batched(q, *cache, seqused_k=ints(9, 9))
    assert lse.shape == (2, 3, NHEADS)
    torch.testing.assert_close(lse.double(), wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_everything_else_is_passed_on(v3: ModuleType) -> None:
    """By position, in the order of the old releases: append, rotary and batch index."""
    cos, sin = rotary(32, 8)
    q, new = rand(2, 3, NHEADS, HEADDIM), rand(2, 2, 3, NHEADS_K, HEADDIM)
    caches = rand(2, 3, 30, NHEADS_K, HEADDIM)
    ours, theirs = caches.clone(), caches.clone()
    more = (None, cos, sin, ints(4, 20), ints(2, 0))
    masks = {"causal": True, "softcap": 3.0, "rotary_interleaved": False, "softmax_scale": 0.2}
    got = v3.flash_attn_with_kvcache(q, *ours, *new, *more, **masks)
    wanted = fa3_ops.flash_attn_with_kvcache(q, *theirs, *new, *more, **masks)
    assert torch.equal(got, wanted)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, caches)


def test_scheduler_metadata_is_made_for_the_same_offsets(
    v3: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (2, 20, 64, NHEADS, NHEADS_K, HEADDIM, ints(20, 7))
    got: dict[str, Any] = {}
    monkeypatch.setattr(fa3_ops, "get_scheduler_metadata", lambda **keywords: got.update(keywords))
    v3.get_scheduler_metadata(*sizes, cu_seqlens_q=ints(5, 25, 32), causal=True)
    assert got.pop("cu_seqlens_q").tolist() == [0, 20, 27]
    assert got.pop("cache_seqlens") is sizes[-1]
    assert got.pop("causal")
    assert list(got.values()) == list(sizes[:-1])


def test_a_capture_waits_for_nothing(v3: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a graph is captured the offsets are not read, only subtracted on the device."""
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    monkeypatch.setattr(v3, "_host", lambda cu_seqlens_q: None)
    got: list[Any] = []

    def seen(*args: Any, **kwargs: Any) -> Any:
        got.extend((args[12], args[14]))
        return torch.empty(0), torch.empty(0)

    monkeypatch.setattr(fa3_ops, "flash_attn_with_kvcache", seen)
    table = torch.empty(2, 4, dtype=torch.int32, device="meta")
    q, cache = (torch.empty(8, 4, 32, device="meta") for _ in range(2))
    v3.flash_attn_with_kvcache(
        q, cache, cache, page_table=table, cu_seqlens_q=offsets, max_seqlen_q=64
    )
    assert got[0].device.type == "meta"  # a value could not have been read
    assert got[1] == 64


def test_compiles_whole(v3: ModuleType) -> None:
    batch = Batch([1, 1, 20, 7], [33, 64, 20, 7], 2)

    def prefill(query: Tensor) -> Tensor:
        out: Tensor = v3.flash_attn_with_kvcache(
            *(query, batch.key_cache, batch.value_cache),
            cache_seqlens=ints(*batch.seq_lens[2:]),
            page_table=batch.block_tables[2:],
            cu_seqlens_q=batch.query_start_loc[2:],
            max_seqlen_q=64,
            causal=True,
        )
        return out

    compiled = torch.compile(prefill, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(batch.query[2:]), prefill(batch.query[2:]))


def test_what_the_module_offers(v3: ModuleType) -> None:
    assert v3.__version__ == fa3_ops.__version__
    assert v3.flash_attn_func is fa3_ops.flash_attn_func
    assert v3.flash_attn_varlen_func is fa3_ops.flash_attn_varlen_func
