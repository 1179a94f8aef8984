"""torch.compile on NPU tensors with the backends that run our kernels, captured or not. GE, which
converts them, is in test_torchair_ge.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchair
from sample_inputs import ints, rand, rotary
from torch import Tensor

import fa3_ops
from fa3_ops.backends.npu.scatter_pa_kv_cache import ScatterPaKvCache

ops = torch.ops.fa3npu
HALF = torch.float16
B, PAGE, PAGES, D = 2, 16, 8, 64
pytestmark = [
    pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def reduce_overhead() -> Any:
    config = torchair.CompilerConfig()
    config.mode = "reduce-overhead"
    return torchair.get_npu_backend(compiler_config=config)


BACKENDS: dict[str, Callable[[], Any]] = {
    "npugraph_ex": lambda: "npugraph_ex",
    "reduce-overhead": reduce_overhead,
    "aot_eager": lambda: "aot_eager",
    "eager": lambda: "eager",
}


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor,
    tables: tuple[Tensor, Tensor],
    scheduler_metadata: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two layers that share a cache: each append is seen by what comes after it."""
    before = k_cache.float().amax()
    for _ in range(2):
        q, softmax_lse = ops.flash_attn_with_kvcache(
            *(q, k_cache, v_cache, k, v),
            rotary_cos=tables[0],
            rotary_sin=tables[1],
            cache_seqlens=cache_seqlens,
            page_table=page_table,
            causal=True,
            scheduler_metadata=scheduler_metadata,
        )
        k = k + 1
    return q * 2, softmax_lse, k_cache.float().amax() - before


def inputs() -> dict[str, Any]:
    cos, sin = rotary(PAGE * PAGES, D)
    return {
        "q": rand(B, 1, 4, D, dtype=HALF).npu(),
        "k_cache": rand(B * PAGES, PAGE, 2, D, dtype=HALF).npu(),
        "v_cache": rand(B * PAGES, PAGE, 2, D, dtype=HALF).npu(),
        "k": (rand(B, 1, 2, D, dtype=HALF) + 9).npu(),
        "v": rand(B, 1, 2, D, dtype=HALF).npu(),
        "cache_seqlens": ints(3, 40).npu(),
        "page_table": torch.randperm(B * PAGES).int().view(B, PAGES).npu(),
        "tables": (cos.half().npu(), sin.half().npu()),
    }


def metadata(call: dict[str, Any]) -> Tensor:
    return fa3_ops.get_scheduler_metadata(
        *(B, 1, PAGE * PAGES, 4, 2, D, call["cache_seqlens"], HALF),
        page_size=PAGE,
        max_seqlen_k_new=1,
        causal=True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_loop_equals_eager(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(decode, backend=BACKENDS[backend](), fullgraph=True, dynamic=False)
    captures = []
    begin = torch.npu.NPUGraph.capture_begin
    monkeypatch.setattr(
        torch.npu.NPUGraph, "capture_begin", lambda *a, **k: captures.append(begin(*a, **k))
    )
    written = set()
    scatter = ScatterPaKvCache.launch

    def spy(self: ScatterPaKvCache, append: Any, *rest: Any) -> None:
        written.add((append.k_cache.data_ptr(), append.v_cache.data_ptr()))
        scatter(self, append, *rest)

    monkeypatch.setattr(ScatterPaKvCache, "launch", spy)
    torch.manual_seed(1)
    ours = inputs()
    torch.manual_seed(1)
    eager = inputs()
    with torch.no_grad():
        decode(**eager | {"scheduler_metadata": metadata(eager)})  # the kernel makes its mask
        eager["k_cache"].copy_(ours["k_cache"])
        eager["v_cache"].copy_(ours["v_cache"])
        for step in range(6):
            torch.manual_seed(step)
            fresh = rand(B, 1, 4, D, dtype=HALF).npu()
            want = decode(**eager | {"q": fresh, "scheduler_metadata": metadata(eager)})
            if step == 1:
                torch.compiler.set_stance("fail_on_recompile")
                captures_of_the_first_step = len(captures)
            got = compiled(**ours | {"q": fresh, "scheduler_metadata": metadata(ours)})
            for x, y in zip(got, want, strict=True):
                assert torch.equal(x.cpu(), y.cpu())
            for name in ("k_cache", "v_cache"):
                assert torch.equal(ours[name].cpu(), eager[name].cpu())
            for call in (ours, eager):
                call["cache_seqlens"] += 1
    torch.compiler.set_stance("default")
    assert bool(captures) == (backend in ("npugraph_ex", "reduce-overhead"))
    assert len(captures) == captures_of_the_first_step
    if backend == "aot_eager":  # runs the functional graph as it is, with its copies
        return
    # No copy of a cache: the append writes the caches themselves.
    caches = {(x["k_cache"].data_ptr(), x["v_cache"].data_ptr()) for x in (ours, eager)}
    assert written == caches


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache_seqlens = torch.full((q.shape[0],), 5, dtype=torch.int32, device=q.device)
        out, _ = ops.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True
        )
        return out + k_cache.amax()


def test_export() -> None:
    def arguments(batch: int) -> tuple[Tensor, ...]:
        heads = ((1, 4), (32, 2), (32, 2), (1, 2), (1, 2))
        return tuple(rand(batch, rows, h, D, dtype=HALF).npu() for rows, h in heads)

    batch = torch.export.Dim("batch", min=2, max=9)
    shapes = ({0: batch},) * 5
    exported = torch.export.export(Attend(), arguments(3), dynamic_shapes=shapes)
    for size in (2, 3, 7):
        args = arguments(size)
        theirs = tuple(x.clone() for x in args)
        with torch.no_grad():
            got, want = exported.module()(*args), Attend()(*theirs)
        assert torch.equal(got.cpu(), want.cpu())
        assert torch.equal(args[1].cpu(), theirs[1].cpu())


def test_autocast() -> None:
    q, k, v = (rand(2, 9, h, D).npu().requires_grad_() for h in (4, 2, 2))
    with torch.autocast("npu", HALF):
        out, _ = ops.flash_attn_func(q, k, v, causal=True)
    assert out.dtype == HALF
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
