"""transformers' continuous batching: requests of all lengths join and leave, prompts come in
chunks, and each token's log-probability has the bits that a trainer's forward pass gives."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny_models
import torch
from continuous_batching import rollout, trained

from fa3_ops.batch_invariant import BatchInvariantMode

NEW_TOKENS = 20
WINDOW = 16


@pytest.mark.parametrize("name", tiny_models.DECODERS)
class TestRollout:
    def test_tokens(self, name: str) -> None:
        """Those of generate with transformers' own attention, one prompt after the other."""
        other = model_of(name, "eager" if name in ("gemma2", "gpt_oss") else "sdpa")
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        for result in rollout(model_of(name), NEW_TOKENS):
            alone = other.generate(torch.tensor([result.prompt_ids]), **settings)
            assert result.generated_tokens == alone[0, len(result.prompt_ids) :].tolist()

    def test_bits_of_the_trainer(self, name: str) -> None:
        model = batch_invariant(model_of(name))
        results = rollout(model, NEW_TOKENS)
        for result, want in zip(results, trained(model, results), strict=True):
            assert torch.equal(torch.tensor(result.logprobs), want)


def batch_invariant(model: Any) -> Any:
    """Enters the mode in forward: generate_batch computes in a thread of its own, and a mode holds
    in the thread that enters it."""
    forward = model.forward

    @functools.wraps(forward)
    def inside(*arguments: Any, **named: Any) -> Any:
        with BatchInvariantMode():
            return forward(*arguments, **named)

    model.forward = inside
    return model


def model_of(name: str, implementation: str = "flash_fa3npu") -> Any:
    differences: dict[str, Any] = {}
    if "sliding_window" in tiny_models.DECODERS[name][2]:
        differences["sliding_window"] = WINDOW
    if name in ("gpt_oss", "qwen3_moe"):
        differences["experts_implementation"] = "batched_mm"
    # gpt-oss has a list of the names with "flash" that it takes: it is asked later, by its config.
    asked_later = name == "gpt_oss" and implementation == "flash_fa3npu"
    model = tiny_models.make(name, "fa3npu" if asked_later else implementation, **differences)
    model.config._attn_implementation = implementation
    return model
