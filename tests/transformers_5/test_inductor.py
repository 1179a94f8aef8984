"""Models compiled by Inductor, of one layer: it is its compiler that takes the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_models
import torch
import transformers


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class TestForward:
    @torch.no_grad()
    def test_packed(self) -> None:
        model = tiny_models.make("qwen3", num_hidden_layers=1)
        ids, positions = tiny_models.tokens(1, 40), torch.arange(40)[None] % 23
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        logits, want = (function(**given).logits for function in (compiled, model))
        assert graphs() == 1
        assert (logits - want).abs().max() < 1e-6 * want.abs().max()


class TestGenerate:
    def test_tokens(self) -> None:
        model = tiny_models.make("qwen3", num_hidden_layers=1)
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        ids = tiny_models.tokens(1, 20)
        plain = model.generate(ids, **settings)
        config = transformers.CompileConfig(fullgraph=True, backend="inductor", mode=None)
        config._compile_all_devices = True
        model.generation_config.compile_config = config
        compiled = model.generate(ids, cache_implementation="static", **settings)
        assert graphs() > 0
        assert compiled.tolist() == plain.tolist()
