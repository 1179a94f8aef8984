"""The attention kernels as the NPU's backend starts them: they lower, access memory in rectangles
and fit on the chip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowering import lower
from on_chip import demand
from starts import assert_suits, starts_of

from fa3_ops.backends import Attention
from fa3_ops.backends.triton import attention

CORES = 24
LONG = 2048  # two chunks


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def call(
    seqlen_q: int = 70,
    nheads: int = 8,
    nheads_k: int = 2,
    headdim: int = 128,
    headdim_v: int | None = None,
    keys: int = 1000,
    page_size: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    **more: Any,
) -> Attention:
    """Causal, unless it has a window."""
    rows = (batch_size, keys)
    if page_size is not None:
        rows = (batch_size * keys // page_size, page_size)
        more["page_table"] = torch.zeros(batch_size, keys // page_size, dtype=torch.int32)
        more["seqused_k"] = torch.full((batch_size,), keys, dtype=torch.int32)
    return Attention(
        q=torch.zeros(batch_size, seqlen_q, nheads, headdim, dtype=dtype),
        k=torch.zeros(*rows, nheads_k, headdim, dtype=dtype),
        v=torch.zeros(*rows, nheads_k, headdim_v or headdim, dtype=dtype),
        softmax_scale=headdim**-0.5,
        **({"window_size": (-1, 0)} | more),
    )


def varlen(dtype: torch.dtype = torch.bfloat16) -> Attention:
    q, k = torch.zeros(300, 8, 128, dtype=dtype), torch.zeros(500, 2, 128, dtype=dtype)
    lengths = {"cu_seqlens_q": ints(0, 100, 300), "cu_seqlens_k": ints(0, 200, 500)}
    most = {"max_seqlen_q": 200, "max_seqlen_k": 300}
    return Attention(q=q, k=k, v=k, softmax_scale=0.1, window_size=(-1, 0), **lengths, **most)


@pytest.fixture(autouse=True)
def an_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number of cores decides whether chunks are work items."""
    monkeypatch.setattr(attention, "processors", lambda device: CORES)


CALLS = {
    "prefill": {},
    "prefill of two chunks": {"keys": LONG},
    "not causal": {"window_size": (-1, -1)},
    "window": {"window_size": (100, 0), "keys": LONG},
    "window to both sides": {"window_size": (100, 20)},
    "attention_chunk": {"attention_chunk": 64},
    "softcap": {"softcap": 20.0},
    "alibi_slopes": {"alibi_slopes": torch.zeros(8)},
    "sinks": {"sinks": torch.zeros(8)},
    "everything": {
        "softcap": 20.0,
        "alibi_slopes": torch.zeros(8, 8),
        "sinks": torch.zeros(8),
        "window_size": (100, 0),
        "keys": LONG,
    },
    "seqused_q": {"seqused_q": ints(*range(8))},
    "cache_leftpad": {"seqused_k": ints(*range(8)), "cache_leftpad": ints(*range(8))},
    "cache_batch_idx": {"seqused_k": ints(*range(8)), "cache_batch_idx": ints(*range(8))},
    "cache_start": {"seqused_k": ints(*range(8)), "cache_start": ints(*range(8))},
    "a head each": {"nheads_k": 8},
    "groups of 7": {"nheads": 14},
    "head dimension 64": {"headdim": 64},
    "head dimension 80": {"headdim": 80},
    "head dimensions 192 and 128": {"headdim": 192, "headdim_v": 128},
    "head dimension 256": {"headdim": 256, "keys": LONG},
    "paged prefill": {"page_size": 128, "keys": LONG},
    "paged decode": {"page_size": 128, "keys": LONG, "seqlen_q": 1, "batch_size": 32},
    "paged decode by chunks": {"page_size": 128, "keys": LONG, "seqlen_q": 1},
    "paged decode of groups of 7": {"page_size": 64, "keys": LONG, "seqlen_q": 1, "nheads": 14},
    "qv": {"headdim": 64, "headdim_v": 256, "qv": torch.zeros(8, 70, 8, 256, dtype=torch.bfloat16)},
}
IN_EVERY_DTYPE = ("everything", "head dimension 256", "paged decode", "paged decode by chunks")


@pytest.mark.parametrize("changes", CALLS.values(), ids=CALLS)
def test_lowers(changes: dict[str, Any]) -> None:
    assert_suits(starts_of(call(**changes)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", IN_EVERY_DTYPE)
def test_lowers_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    assert_suits(starts_of(call(**CALLS[name], dtype=dtype)))


def test_varlen() -> None:
    assert_suits(starts_of(varlen()))


def test_pages_of_less_than_a_block_are_gathered_by_rows() -> None:
    for seqlen_q in (1, 70):
        found = starts_of(call(page_size=16, keys=LONG, seqlen_q=seqlen_q, batch_size=32))
        assert_suits(found, ["scattered rows: loaded by rows of 128, in a loop of products"])


def test_chunks_are_work_items_where_there_are_cores_to_spare() -> None:
    whole = starts_of(call(**CALLS["paged decode"]))
    parts = starts_of(call(**CALLS["paged decode by chunks"]))
    assert [start.name for start in whole] == ["attention"]
    assert [start.name for start in parts] == ["attention", "combine"]


def test_there_are_fewer_rows_than_on_a_gpu() -> None:
    """64 rows of head dimension 128 would not fit."""
    (start,) = starts_of(call(keys=LONG))
    assert start.constants["TOKENS"] * start.constants["HEADS"] == 32
    more = start.constants | {"TOKENS": 2 * start.constants["TOKENS"]}
    assert not demand(lower(start.kernel, start.signature, more)).fits
