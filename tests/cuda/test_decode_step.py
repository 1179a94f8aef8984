"""A decode step on a GPU as servers run it: recorded in a CUDA graph, compiled by Inductor, packed
by AOTInductor. All give what the eager call gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sample_inputs import ints, rotary
from small_operators import run
from torch import Tensor
from torch.export import Dim, export

import fa3_ops  # noqa: F401  (registers the operators)

PAGES, PAGE_SIZE, NHEADS, NHEADS_K, HEADDIM = 40, 16, 8, 2, 64
SEQUENCES, MOST_NEW = 3, 4
every_kind = pytest.mark.parametrize(
    "cu_seqlens_k_new", [None, ints(0, 1, 4, 8)], ids=["uniform", "ragged"]
)


class Step(torch.nn.Module):
    """Appends k and v and attends. Ragged rows of q come with the keys they belong to."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        page_table: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        out, softmax_lse = torch.ops.fa3npu.flash_attn_with_kvcache(
            *(q, k_cache, v_cache, k, v, None, rotary_cos, rotary_sin, cache_seqlens),
            page_table=page_table,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k_new=cu_seqlens,
            max_seqlen_q=None if cu_seqlens is None else MOST_NEW,
            causal=True,
        )
        return out, softmax_lse


def inputs_of(cu_seqlens: Tensor | None, new: int = 1) -> tuple[Tensor, ...]:
    rows = (SEQUENCES, new) if cu_seqlens is None else (SEQUENCES * MOST_NEW,)
    shapes = ((*rows, NHEADS, HEADDIM), *[(*rows, NHEADS_K, HEADDIM)] * 2)
    caches = torch.zeros(2, PAGES, PAGE_SIZE, NHEADS_K, HEADDIM, dtype=torch.bfloat16)
    inputs = (
        *(torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes),
        *caches,
        torch.zeros(SEQUENCES, dtype=torch.int32),
        torch.zeros(SEQUENCES, PAGES // SEQUENCES, dtype=torch.int32),
        *rotary(300, HEADDIM),
        *(() if cu_seqlens is None else (cu_seqlens,)),
    )
    return tuple(t.cuda() for t in inputs)


def refill(inputs: tuple[Tensor, ...], step: int) -> None:
    """Other queries and keys, longer sequences, other pages, other counts, in the same memory."""
    torch.manual_seed(step)
    q, k, v, _, _, cache_seqlens, page_table, _, _, *cu_seqlens = inputs
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    cache_seqlens.copy_(ints(step, 2 * step % 191, 191 - step))
    page_table.copy_(torch.randperm(PAGES)[: page_table.numel()].view(page_table.shape))
    for x in cu_seqlens:
        x.copy_(ints(0, step % 4, 4, 8 - step % 2))


@every_kind
def test_a_graph_decodes_at_the_lengths_of_each_replay(cu_seqlens_k_new: Tensor | None) -> None:
    replayed, eager = (inputs_of(cu_seqlens_k_new) for _ in range(2))
    step = Step()
    run(step, *replayed)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*replayed)
    for i in range(100):
        refill(replayed, i)
        graph.replay()
        refill(eager, i)
        rows = slice(None if cu_seqlens_k_new is None else int(eager[-1][-1]))
        for got, want in zip(results, run(step, *eager), strict=True):
            of_rows = (rows,) if got is results[0] else (..., rows)
            assert torch.equal(got[of_rows], want[of_rows])
        if i == 0:  # what was there before the first replay
            replayed[3].copy_(eager[3])
            replayed[4].copy_(eager[4])
        assert all(torch.equal(replayed[n], eager[n]) for n in (3, 4))


def check(module: object, inputs: tuple[Tensor, ...], step: int) -> None:
    """module gives what Step gives, and writes the same caches."""
    refill(inputs, step)
    copies = tuple(t.clone() for t in inputs)
    results = module(*inputs)  # type: ignore[operator]
    for got, want in zip(results, Step()(*copies), strict=True):
        assert torch.equal(got, want)
    assert all(torch.equal(inputs[n], copies[n]) for n in (3, 4))
    assert inputs[3].count_nonzero() > 0


@every_kind
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole_by_inductor(cu_seqlens_k_new: Tensor | None, mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Step(), fullgraph=True, mode=mode)
    inputs = inputs_of(cu_seqlens_k_new)
    for step in range(5):
        check(compiled, inputs, step)


def test_packed_by_aot_inductor(tmp_path: Path) -> None:
    sequences = {0: Dim("sequences")}
    shapes = (*[sequences] * 3, None, None, sequences, sequences, None, None)
    inputs = inputs_of(None)
    program = export(Step(), inputs, dynamic_shapes=shapes)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "step.pt2")
    )
    module = torch._inductor.aoti_load_package(path)
    for step in range(5):
        check(module, inputs, step)
