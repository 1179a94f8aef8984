"""Sequences packed one behind the other: each has the bits that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

LENGTHS = (33, 1, 90, 17)


def sequences() -> list[Tensor]:
    return [tiny_models.tokens(1, length, seed=length) for length in LENGTHS]


def packed() -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": torch.cat(sequences(), 1), "position_ids": positions}


def offsets() -> dict[str, Any]:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    lengths = {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens} | lengths


@pytest.fixture(params=[name for name in tiny_models.DECODERS if name != "qwen3_moe"])
def model(request: pytest.FixtureRequest) -> Any:
    differences = {"experts_implementation": "batched_mm"} if request.param == "gpt_oss" else {}
    return tiny_models.make(request.param, **differences)


@pytest.mark.usefixtures("batch_invariant")
class TestBits:
    @torch.no_grad()
    def test_by_position_ids(self, model: Any) -> None:
        alone = [model(ids, use_cache=False).logits for ids in sequences()]
        logits = model(**packed(), use_cache=False).logits
        assert torch.equal(logits, torch.cat(alone, 1))

    @torch.no_grad()
    def test_by_offsets(self, model: Any) -> None:
        by_positions = model(**packed(), use_cache=False).logits
        assert torch.equal(model(**packed(), **offsets(), use_cache=False).logits, by_positions)


class TestPacked:
    def test_gradients(self) -> None:
        """Those of the sequences one by one, summed."""
        model = tiny_models.make("mistral")
        weight = model.model.layers[0].self_attn.k_proj.weight
        for ids in sequences():
            model(ids, use_cache=False).logits.square().sum().backward()
        alone, weight.grad = weight.grad, None
        model(**packed(), use_cache=False).logits.square().sum().backward()
        assert (weight.grad - alone).abs().max() < 2e-6 * alone.abs().max()

    @torch.no_grad()
    def test_in_several_rows(self) -> None:
        """Which transformers' flash attention does not split: its eager attention does."""
        ids = tiny_models.tokens(2, 30)
        positions = torch.stack([torch.arange(30) % 13, torch.arange(30) % 30])
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        ours, theirs = (tiny_models.make("qwen3", name)(**given) for name in ("fa3npu", "eager"))
        assert (ours.logits - theirs.logits).abs().max() < 1e-6 * theirs.logits.abs().max()

    @pytest.mark.parametrize("name", ["qwen3", "mistral", "gpt_oss"])
    def test_compiled(self, name: str) -> None:
        """One graph, whether sequences are packed or not."""
        model = tiny_models.make(name, experts_implementation="batched_mm")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        ids, total = packed()["input_ids"], sum(LENGTHS)
        for positions in (packed()["position_ids"], torch.arange(total)[None]):
            given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            with torch.no_grad():
                assert torch.equal(compiled(**given).logits, model(**given).logits)

    @pytest.mark.parametrize("packs", [True, False])
    def test_compiled_gradients(self, packs: bool) -> None:
        """In one graph: of packed sequences, and of a batch with padding."""
        given = packed() if packs else {"input_ids": tiny_models.tokens(2, 40)}
        if not packs:
            given["attention_mask"] = (torch.arange(40) < torch.tensor([[40], [23]])).long()
        model = tiny_models.make("mistral")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        weight = model.model.layers[0].self_attn.k_proj.weight
        gradients = []
        for function in (model, compiled):
            logits = function(**given, use_cache=False).logits
            logits[given.get("attention_mask", given["input_ids"]) > 0].square().sum().backward()
            gradients.append(weight.grad)
            weight.grad = None
        assert (gradients[0] - gradients[1]).abs().max() < 2e-6 * gradients[0].abs().max()
