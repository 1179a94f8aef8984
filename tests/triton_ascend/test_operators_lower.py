"""The kernels of all operators but attention's forward, as the NPU's backends start them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lint import lint
from lowering import lower
from on_chip import demand
from starts import assert_suits, started, starts_of
from torch import Tensor

from fa3_ops.backends import (
    Append,
    Attention,
    Combination,
    Gradient,
    Linear,
    Rotation,
    Scatter,
    add_backend,
    remove_backend,
    use_backend,
)
from fa3_ops.backends.npu import NPU
from fa3_ops.testing import SampleCall, sample_calls

HALF, BF16, FLOAT, FP8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
DTYPES = (HALF, BF16, FLOAT)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def gradient(
    dtype: torch.dtype = BF16, headdim: int = 128, headdim_v: int | None = None, **more: Any
) -> Gradient:
    """Causal, of groups of 4, unless it has a window."""
    headdim_v = headdim_v or headdim
    q, out = (torch.zeros(2, 300, 8, d, dtype=dtype) for d in (headdim, headdim_v))
    k, v = (torch.zeros(2, 300, 2, d, dtype=dtype) for d in (headdim, headdim_v))
    call = Attention(q=q, k=k, v=v, softmax_scale=0.1, **({"window_size": (-1, 0)} | more))
    return Gradient(call, dout=out, out=out, softmax_lse=torch.zeros(2, 8, 300))


class TestGradient:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "headdims", [(64, 64), (128, 128), (192, 128), (256, 256), (80, 80)], ids=str
    )
    def test_head_dimensions(self, dtype: torch.dtype, headdims: tuple[int, int]) -> None:
        assert_suits(starts_of(gradient(dtype, *headdims)))

    @pytest.mark.parametrize(
        "changes",
        [
            {"window_size": (-1, -1)},
            {"window_size": (64, 20)},
            {"attention_chunk": 64},
            {"softcap": 20.0, "alibi_slopes": torch.zeros(2, 8)},
            {"seqused_q": ints(1, 2), "seqused_k": ints(3, 4)},
        ],
        ids=lambda changes: "+".join(changes),
    )
    def test_features(self, changes: dict[str, Any]) -> None:
        assert_suits(starts_of(gradient(**changes)))

    def test_varlen(self) -> None:
        q, k = torch.zeros(300, 8, 128, dtype=BF16), torch.zeros(500, 2, 128, dtype=BF16)
        offsets = {"cu_seqlens_q": ints(0, 100, 300), "cu_seqlens_k": ints(0, 200, 500)}
        most = {"max_seqlen_q": 200, "max_seqlen_k": 300}
        call = Attention(q=q, k=k, v=k, softmax_scale=0.1, window_size=(-1, 0), **offsets, **most)
        request = Gradient(call, dout=q, out=q, softmax_lse=torch.zeros(8, 300))
        assert_suits(starts_of(request))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 100, 1000])
def test_linear(dtype: torch.dtype, rows: int) -> None:
    x, weight = torch.zeros(rows, 200, dtype=dtype), torch.zeros(300, 200, dtype=dtype)
    assert_suits(starts_of(Linear(x, weight, torch.zeros(300, dtype=dtype))))


def rotation(dtype: torch.dtype, pairs: int, *, interleaved: bool = False) -> Rotation:
    table = torch.zeros(500, pairs, dtype=FLOAT if dtype == FP8 else dtype)
    x = torch.zeros(7, 6, 128, dtype=dtype)
    return Rotation(x, table, table, ints(1, 2), ints(0, 3, 7), rotary_interleaved=interleaved)


@pytest.mark.parametrize("pairs", [16, 64])
@pytest.mark.parametrize("dtype", [*DTYPES, FP8], ids=str)
def test_apply_rotary(dtype: torch.dtype, pairs: int) -> None:
    assert_suits(starts_of(rotation(dtype, pairs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_rotary_interleaved(dtype: torch.dtype) -> None:
    """Every other column is loaded and stored. Plain torch operators do it by default."""
    found = ["strided: an access of [8, 64] elements"]
    assert_suits(starts_of(rotation(dtype, 64, interleaved=True)), found)


NARROW = [(BF16, torch.int8), (HALF, torch.int8), (BF16, FP8), (FLOAT, torch.float8_e5m2)]


def of_descales(dtypes: tuple[torch.dtype, torch.dtype]) -> list[str]:
    """What is found in a write: the descales of two heads, which may be one and the same number."""
    return [] if dtypes[0] == dtypes[1] else ["strided: an access of [2] elements"]


def caches(dtype: torch.dtype, narrow: torch.dtype, descales: int | None) -> dict[str, Any]:
    shape = (2,) if descales is None else (descales, 2)
    given = {"k_descale": torch.ones(shape), "v_descale": torch.ones(shape)}
    named = {name: torch.zeros(10, 128, 2, 128, dtype=narrow) for name in ("k_cache", "v_cache")}
    return named | (given if narrow != dtype else {})


@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES, strict=True), *NARROW], ids=str)
class TestWrites:
    def test_append_to_pages(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        x = torch.zeros(3, 4, 2, 128, dtype=dtypes[0])
        table = torch.zeros(500, 64, dtype=dtypes[0])
        rotary = {"rotary_cos": table, "rotary_sin": table, "rotary_interleaved": False}
        place = {"cache_seqlens": ints(1, 2, 3), "page_table": ints(1, 2, 3).view(3, 1)}
        request = Append(x, x, **caches(*dtypes, 3), **place, **rotary)
        assert_suits(starts_of(request), of_descales(dtypes))

    def test_append_packed(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        x = torch.zeros(9, 2, 128, dtype=dtypes[0])
        place = {"cache_seqlens": ints(1, 2, 3), "cu_seqlens_k_new": ints(0, 2, 5, 9)}
        request = Append(x, x, **caches(*dtypes, 3), **place)
        assert_suits(starts_of(request), of_descales(dtypes))

    def test_scatter(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        x = torch.zeros(9, 2, 128, dtype=dtypes[0])
        request = Scatter(x, x, **caches(*dtypes, None), slot_mapping=torch.arange(9))
        assert_suits(starts_of(request), of_descales(dtypes))


@pytest.mark.parametrize("shape", [(3, 2, 5, 6, 128), (3, 10, 6, 80), (2, 70, 1, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_attn_combine(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_suits(starts_of(Combination(torch.zeros(shape), torch.zeros(shape[:-1]), dtype)))


SAMPLES = {
    f"{call.name}-{dtype}".replace("torch.", ""): call
    for dtype in DTYPES
    for call in sample_calls(dtype=dtype)
    if call.name.startswith(("kvcache_append_", "kvcache_scatter_", "linear", "apply_rotary"))
}


@pytest.fixture
def served_as_on_npu() -> Iterator[None]:
    served = {
        kind: next(b for b in NPU.backends[kind] if b.name == "triton")
        for kind in (Append, Linear, Rotation, Scatter)
    }
    for kind, backend in served.items():
        add_backend("cpu", kind, backend)
    with use_backend("triton"), torch.no_grad():
        yield
    for kind, backend in served.items():
        remove_backend("cpu", kind, backend)


@pytest.mark.usefixtures("served_as_on_npu")
@pytest.mark.parametrize("call", SAMPLES.values(), ids=SAMPLES)
def test_sample_calls(call: SampleCall) -> None:
    """Of all strides; what is found is in descales and interleaved pairs, as above."""
    with started() as starts:
        call.operator(*call.args, **call.kwargs)
    assert starts
    for start in starts:
        text = lower(start.kernel, start.signature, start.constants)
        assert {finding.kind for finding in lint(text)} <= {"strided"}
        assert demand(text).fits, f"{start.name}: {demand(text)}"
