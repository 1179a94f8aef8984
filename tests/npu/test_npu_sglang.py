"""SGLang's call of flash_attn_npu_v3 (ASCEND_USE_FA=1), as its Ascend backend makes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from npu_calls import assert_close
from sample_inputs import rand
from torch import Tensor

from fa3_ops import reference

FOLDER = Path(__file__).parents[2] / "compat" / "flash_attn_npu_v3"
NHEADS, NHEADS_K, HEADDIM, PAGE_SIZE = 4, 2, 64, 128


@pytest.fixture(scope="module")
def v3() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    import flash_attn_npu_v3

    yield flash_attn_npu_v3
    sys.path.remove(str(FOLDER))
    del sys.modules["flash_attn_npu_v3"]


def call(
    v3: ModuleType, q: Tensor, caches: Tensor, table: Tensor, extend_lens: Tensor, seq_lens: Tensor
) -> Tensor:
    """The keywords of its extend, num_splits=0 among them. Lengths come from the host, offsets are
    summed on the device, and the pool of tokens is viewed as pages."""
    zero = torch.zeros(1, dtype=torch.int32, device="npu")
    extend_lens = extend_lens.npu()
    out: Tensor = v3.flash_attn_with_kvcache(
        q.npu(),
        *(pool.npu().view(-1, PAGE_SIZE, NHEADS_K, HEADDIM) for pool in caches),
        cache_seqlens=seq_lens.npu(),
        page_table=table.npu(),
        cu_seqlens_q=torch.cat([zero, extend_lens.cumsum(0).to(torch.int32)]),
        max_seqlen_q=extend_lens.max().item(),
        softmax_scale=0.2,
        causal=True,
        window_size=[-1, -1],
        softcap=0.0,
        rotary_interleaved=False,
        num_splits=0,
        sm_margin=0,
        return_softmax_lse=False,
    )
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("extend_lens", "seq_lens"),
    [([200, 65], [200, 65]), ([3, 129, 1], [300, 129, 70]), ([1, 1], [400, 5])],
    ids=["extend", "extend of a prefix", "one token each"],
)
def test_extend(
    extend_lens: list[int],
    seq_lens: list[int],
    index_dtype: torch.dtype,
    dtype: torch.dtype,
    v3: ModuleType,
) -> None:
    q = rand(sum(extend_lens), NHEADS, HEADDIM, dtype=dtype)
    pools = rand(2, 16 * PAGE_SIZE, NHEADS_K, HEADDIM, dtype=dtype)
    table = torch.randperm(16)[: 4 * len(seq_lens)].int().view(-1, 4)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    out = call(v3, q, pools, table, torch.tensor(extend_lens, dtype=index_dtype), lens)
    wanted, _ = reference.flash_attn_with_kvcache(
        q,
        *(pool.view(-1, PAGE_SIZE, NHEADS_K, HEADDIM) for pool in pools),
        cache_seqlens=lens,
        page_table=table,
        cu_seqlens_q=torch.tensor([0, *torch.tensor(extend_lens).cumsum(0)], dtype=torch.int32),
        softmax_scale=0.2,
        causal=True,
    )
    assert_close(out, wanted, dtype)
