"""Token by token through a cache: the bits of the whole forward pass, and transformers' tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor

LENGTH, PROMPT, CHUNK = 150, 40, 45
WINDOW = 70  # so that what is dropped leaves the grid of 64 keys


def model_of(name: str) -> Any:
    windowed = "sliding_window" in tiny_models.DECODERS[name][2]
    differences: dict[str, Any] = {"sliding_window": WINDOW} if windowed else {}
    if name in ("gpt_oss", "qwen3_moe"):
        differences["experts_implementation"] = "batched_mm"
    return tiny_models.make(name, **differences)


def cache_of(kind: str, model: Any) -> Any:
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 40)
    return transformers.DynamicCache(config=model.config)


@torch.no_grad()
def through_cache(model: Any, cache: Any, ids: Tensor, **masks: Tensor) -> Tensor:
    """The logits of a prompt, of a chunk behind it, and then of single tokens."""
    ends = [PROMPT, PROMPT + CHUNK, *range(PROMPT + CHUNK + 1, ids.shape[1] + 1)]
    parts = []
    for begin, end in zip([0, *ends], ends, strict=False):
        given = {"input_ids": ids[:, begin:end], "use_cache": True, "cache": cache}
        if masks:
            given["attention_mask"] = masks["attention_mask"][:, :end]
            given["position_ids"] = masks["position_ids"][:, begin:end]
        parts.append(model(**given).logits)
    return torch.cat(parts, 1)


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", tiny_models.DECODERS)
class TestBits:
    def test_of_the_whole_pass(self, name: str, kind: str) -> None:
        model, ids = model_of(name), tiny_models.tokens(1, LENGTH)
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
        assert torch.equal(through_cache(model, cache_of(kind, model), ids), whole)

    def test_behind_left_padding(self, name: str, kind: str) -> None:
        model, ids = model_of(name), tiny_models.tokens(1, LENGTH)
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
        padding = 17
        batch = tiny_models.tokens(2, LENGTH + padding, seed=5)
        batch[0, padding:] = ids
        live = torch.ones_like(batch)
        live[0, :padding] = 0
        positions = (live.cumsum(1) - 1).clamp(min=0)
        masks = {"attention_mask": live, "position_ids": positions}
        logits = through_cache(model, cache_of(kind, model), batch, **masks)
        assert torch.equal(logits[:1, padding:], whole)


def greedy(model: Any, **settings: Any) -> list[list[int]]:
    ids = tiny_models.tokens(3, 20)
    live = (torch.arange(20) >= torch.tensor([0, 3, 11])[:, None]).long()
    out = model.generate(
        ids, attention_mask=live, max_new_tokens=24, min_new_tokens=24, do_sample=False, **settings
    )
    return out[:, 20:].tolist()


class TestGenerate:
    @pytest.mark.parametrize("cache", [None, "static"])
    @pytest.mark.parametrize("name", tiny_models.DECODERS)
    def test_tokens(self, name: str, cache: str | None) -> None:
        settings = {"cache_implementation": cache, "disable_compile": True}
        # gpt-oss and Gemma-2 have no other attention in transformers than eager on CPU.
        other = "eager" if name in ("gpt_oss", "gemma2") else "sdpa"
        theirs = greedy(tiny_models.make(name, other))
        assert greedy(tiny_models.make(name), **settings) == theirs

    def test_bart(self) -> None:
        assert greedy_bart("fa3npu") == greedy_bart("sdpa")

    @pytest.mark.parametrize("name", ["qwen3", "gemma3"])
    def test_compiled(self, name: str) -> None:
        model = tiny_models.make(name)
        plain = greedy(model)
        torch._dynamo.reset()
        compiled = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        settings = {"cache_implementation": "static", "compile_config": compiled}
        model.generation_config.compile_config = compiled
        compiled._compile_all_devices = True
        torch._dynamo.utils.counters.clear()
        assert greedy(model, **settings) == plain
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def greedy_bart(implementation: str) -> list[list[int]]:
    model = tiny_models.make("bart", implementation)
    live = (torch.arange(20) < torch.tensor([20, 17, 9])[:, None]).long()
    ids = tiny_models.tokens(3, 20)
    return model.generate(
        ids, attention_mask=live, max_new_tokens=16, min_new_tokens=16, do_sample=False, num_beams=2
    ).tolist()
