"""Random sequences of decode steps, eager and replayed, of graphs captured for several batch sizes
over one cache, as a server runs them: every step as on CPU."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_calls import assert_close, assert_lse, examples_of
from sample_inputs import rand
from torch import Tensor

import fa3_ops
from fa3_ops import reference

BATCHES, HEADS_K, D, PAGE, COLUMNS = (4, 2), 2, 32, 16, 8
NUM_PAGES = BATCHES[0] * COLUMNS + 2
HALF = torch.float16


class Server:
    """Caches on both sides, and the tensors that every graph reads, as views of the largest."""

    def __init__(self, group: int, packed: bool, stream: bool, call: dict[str, Any]) -> None:
        self.packed, self.call = packed, call
        self.heads, self.stream = group * HEADS_K, torch.npu.Stream() if stream else None
        self.caches = [rand(NUM_PAGES, PAGE, HEADS_K, D, dtype=HALF) for _ in range(2)]
        self.npu_caches = [x.npu() for x in self.caches]
        self.static: dict[int, dict[str, Tensor]] = {}
        self.graphs: dict[int, Any] = {}
        self.results: dict[int, tuple[Tensor, Tensor]] = {}
        self.metadata: dict[int, Tensor] = {}
        self.seqlens = torch.randint(0, 20, (BATCHES[0],), dtype=torch.int32)
        self.move_pages()

    def move_pages(self) -> None:
        pages = torch.randperm(NUM_PAGES)[: BATCHES[0] * COLUMNS]
        self.page_table = pages.int().view(BATCHES[0], COLUMNS)

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """The next token of each of the first sequences."""
        rows = (batch,) if self.packed else (batch, 1)
        step = {"q": rand(*rows, self.heads, D, dtype=HALF)}
        step |= {name: rand(*rows, HEADS_K, D, dtype=HALF) for name in "kv"}
        step["cache_seqlens"] = self.seqlens[:batch].clone()
        step["page_table"] = self.page_table[:batch].clone()
        if self.packed:
            step["cu_seqlens_q"] = step["cu_seqlens_k_new"] = torch.arange(batch + 1).int()
        return step

    def made_metadata(self, step: dict[str, Tensor]) -> Tensor:
        seqlens = step["cache_seqlens"]
        new = {name: step[name] for name in ("cu_seqlens_q", "cu_seqlens_k_new") if name in step}
        return fa3_ops.get_scheduler_metadata(
            *(len(seqlens), 1, PAGE * COLUMNS, self.heads, HEADS_K, D, seqlens, HALF),
            **new,
            page_size=PAGE,
            max_seqlen_k_new=1,
            causal=True,
            **self.call,
        )

    def attend(self, step: dict[str, Tensor], metadata: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.fa3npu.flash_attn_with_kvcache(
            k_cache=self.npu_caches[0],
            v_cache=self.npu_caches[1],
            **step,
            **({"max_seqlen_q": 1} if self.packed else {}),
            causal=True,
            scheduler_metadata=metadata,
            **self.call,
        )

    def capture(self, batch: int) -> None:
        """Warmed up on a copy of the step whose tokens land where the next step writes too."""
        static = {name: x.npu() for name, x in self.inputs(batch).items()}
        metadata = self.made_metadata(static)
        self.attend(static, metadata)
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            self.results[batch] = self.attend(static, metadata)
        self.static[batch], self.graphs[batch], self.metadata[batch] = static, graph, metadata

    def replay(self, step: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        batch = len(step["cache_seqlens"])
        if batch not in self.graphs:
            self.capture(batch)
        static = self.static[batch]
        for name, x in step.items():
            static[name].copy_(x)
        self.metadata[batch].copy_(self.made_metadata(static))
        self.graphs[batch].replay()
        return self.results[batch]

    def run(self, how: str, batch: int) -> None:
        step = self.inputs(batch)
        npu = {name: x.npu() for name, x in step.items()}
        if how == "replayed":
            out, lse = self.replay(step)
        elif how == "with metadata":
            out, lse = self.attend(npu, self.made_metadata(npu))
        else:
            out, lse = self.attend(npu, None)
        want, want_lse = reference.flash_attn_with_kvcache(
            k_cache=self.caches[0], v_cache=self.caches[1], **step, causal=True, **self.call
        )
        assert_close(out, want, HALF)
        assert_lse(lse, want_lse, HALF)
        self.seqlens[:batch] += 1


HOW = ("replayed", "replayed", "with metadata", "eager")
STEP = st.tuples(st.sampled_from(HOW), st.sampled_from(BATCHES), st.booleans())
CALL = st.sampled_from([{}, {}, {"window_size": (9, 0)}, {"softcap": 2.0}, {"softmax_scale": 0.3}])


@examples_of(10)
@given(
    steps=st.lists(STEP, min_size=2, max_size=10),
    group=st.sampled_from([1, 2, 3]),
    packed=st.booleans(),
    stream=st.booleans(),
    call=CALL,
    seed=st.integers(0, 2**31),
)
def test_every_step_as_on_cpu(
    steps: list[Any], group: int, packed: bool, stream: bool, call: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    server = Server(group, packed, stream, call)
    torch.npu.synchronize()
    with torch.npu.stream(server.stream):
        for how, batch, moves in steps:
            if moves:  # other sequences come, to pages that others leave
                server.move_pages()
                server.seqlens = torch.randint(0, 60, (BATCHES[0],), dtype=torch.int32)
            server.run(how, batch)
        torch.npu.current_stream().synchronize()
    for ours, theirs in zip(server.npu_caches, server.caches, strict=True):
        assert torch.equal(ours.cpu(), theirs)
