"""Fused attention of one row of q over int8 keys and values, against plain torch in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

B, N, GROUP, D, BLOCK, BLOCKS = 2, 2, 3, 64, 32, 3
S = BLOCK * BLOCKS
LENGTHS = [70, 33]
HALF = torch.float16

# The scales of every mode by their documented shapes, and what they are of keys (B, S, N, D).
MODES: dict[str, tuple[int, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "one number": (0, (1,), lambda s: s),
    "per channel": (0, (1, N, D), lambda s: s),
    "per channel, BSH": (0, (1, N * D), lambda s: s.view(N, D)),
    "per token": (1, (1, B, S), lambda s: s.view(B, S, 1, 1)),
    "per head": (2, (N,), lambda s: s.view(N, 1)),
    "per token and head": (3, (B, N, S), lambda s: s.transpose(1, 2).unsqueeze(-1)),
}


def call(mode: int = 3, shape: tuple[int, ...] = (B, N, S), dtype: torch.dtype = HALF) -> Any:
    """Arguments over a paged cache of (blocks, block_size, heads * headdim)."""
    torch.manual_seed(0)
    k, v = (torch.randint(-128, 128, (B * BLOCKS, BLOCK, N * D), dtype=torch.int8) for _ in "kv")
    scales = ((0.5 + torch.rand(2, *shape)) / 64).to(torch.float32 if mode % 2 else dtype)
    return {
        "query": torch.randn(B, 1, N * GROUP, D).to(dtype),
        "key": k,
        "value": v,
        "block_table": torch.tensor([[4, 2, 0], [1, 5, 3]], dtype=torch.int32),
        "key_antiquant_scale": scales[0],
        "value_antiquant_scale": scales[1],
        "key_antiquant_mode": mode,
        "value_antiquant_mode": mode,
    }


def fused(given: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    settings = {"num_heads": N * GROUP, "num_key_value_heads": N, "input_layout": "BSND"}
    settings |= {"block_size": BLOCK, "actual_seq_lengths_kv": LENGTHS, "scale": 0.1}
    arguments = settings | {"softmax_lse_flag": True} | given | more
    arguments = {x: t.npu() if isinstance(t, Tensor) else t for x, t in arguments.items()}
    qkv = [arguments.pop(name) for name in ("query", "key", "value")]
    result: tuple[Tensor, Tensor] = torch_npu.npu_fused_infer_attention_score(*qkv, **arguments)
    return result


def truth(given: dict[str, Any], factor: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    def numbers(name: str) -> Tensor:
        rows = given[name][given["block_table"]].view(B, S, N, D).double()
        rows = rows * factor(given[f"{name}_antiquant_scale"].double())
        return rows.transpose(1, 2).repeat_interleave(GROUP, 1)

    scores = given["query"].double().transpose(1, 2) @ numbers("key").mT * 0.1
    scores[
        torch.arange(S).expand_as(scores) >= torch.tensor(LENGTHS).view(-1, 1, 1, 1)
    ] = -torch.inf
    return (scores.softmax(-1) @ numbers("value")).transpose(1, 2), scores.logsumexp(-1)[..., None]


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, dtype: torch.dtype) -> None:
    number, shape, factor = MODES[mode]
    given = call(number, shape, dtype)
    out, lse = fused(given)
    want, want_lse = truth(given, factor)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().double(), want, rtol=eps, atol=1e-4)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
def test_dense_keys(layout: str) -> None:
    given = call()
    out, lse = fused(given)
    dense = {x: given[x][given["block_table"]].view(B, S, N, D) for x in ("key", "value")}
    dense |= {"query": given["query"], "input_layout": layout, "block_table": None}
    if layout == "BNSD":
        dense |= {x: dense[x].transpose(1, 2).contiguous() for x in ("query", "key", "value")}
    again, again_lse = fused(given | dense, block_size=0)
    assert torch.equal((again.transpose(1, 2) if layout == "BNSD" else again).cpu(), out.cpu())
    assert torch.equal(again_lse.cpu(), lse.cpu())


def split(given: dict[str, Any], block_size: int) -> dict[str, Any]:
    """A cache of smaller blocks."""
    few = {x: given[x].view(-1, block_size, N * D) for x in ("key", "value")}
    blocks = torch.arange(B * S // block_size, dtype=torch.int32).view(B, -1)
    return few | {"block_table": blocks, "block_size": block_size}


REFUSED: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "no scales": (
        lambda c: {"key_antiquant_scale": None, "value_antiquant_scale": None},
        "int8 keys and values need key_antiquant_scale and value_antiquant_scale",
    ),
    "scales of wider keys": (
        lambda c: {x: c[x].half() for x in ("key", "value")},
        "antiquant scales need int8 keys and values",
    ),
    "offsets": (
        lambda c: {f"{x}_antiquant_offset": c[f"{x}_antiquant_scale"] for x in ("key", "value")},
        "quantisation but for key_antiquant_scale and value_antiquant_scale",
    ),
    "rows": (lambda c: {"query": c["query"].expand(-1, 2, -1, -1).contiguous()}, "multiple of 128"),
    "blocks of 16": (lambda c: split(c, 16), "block_size must be a multiple of 32 with int8"),
    "modes": (lambda c: {"value_antiquant_mode": 1}, "value_antiquant_mode must be equal"),
    "mode 5": (
        lambda c: {f"{x}_antiquant_mode": 5 for x in ("key", "value")},
        "the emulated antiquant modes are 0 to 3",
    ),
    "dtype": (
        lambda c: {
            f"{x}_antiquant_scale": c[f"{x}_antiquant_scale"].half() for x in ("key", "value")
        },
        "antiquant scales must be float32 per token, else of the dtype of query",
    ),
    "fewer scales than the blocks hold": (
        lambda c: {
            f"{x}_antiquant_scale": torch.ones(B, N, max(LENGTHS)) for x in ("key", "value")
        },
        r"\(B, N, S\) in mode 3, with S for all that block_table addresses",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str) -> None:
    given = call()
    change, message = REFUSED[what]
    with pytest.raises(RuntimeError, match=message):
        fused(given | change(given))


def test_rows_of_dense_q_are_refused() -> None:
    given = call()
    dense = {x: given[x][given["block_table"]].view(B, S, N, D) for x in ("key", "value")}
    rows = {"query": given["query"].expand(-1, 2, -1, -1).contiguous(), "block_table": None}
    with pytest.raises(RuntimeError, match="int8 keys and values are emulated for Q_S 1"):
        fused(given | dense | rows, block_size=0)
