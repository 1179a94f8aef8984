"""The tokens of vLLM's own kernel, model by model."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import OURS, THEIRS, answers, attention_of, engine, prompts
from tiny_models import make

MODELS = ["qwen3", "qwen3_moe", "llama", "gemma2", "gemma3", "gpt_oss"]


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_vllms_own_kernel(name: str, folder: Path) -> None:
    model = make(name, folder)
    with engine(model, **THEIRS) as llm:
        assert attention_of(llm) == {"CPUAttentionBackendImpl"}
        theirs = answers(llm, prompts())
    with engine(model, **OURS) as llm:
        assert attention_of(llm) == {"Fa3Impl"}
        ours = answers(llm, prompts())
    same = sum(a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True))
    off = max(
        abs(x[token] - y[token])
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a.logits, b.logits, strict=True)
        for token in x.keys() & y.keys()
    )
    cached = sum(a.cached > 0 for a in ours)
    print(
        f"{name}: {same} of {len(ours)} prompts with the same tokens, {cached} of them began in "
        f"the prefix cache; logits differ by at most {off:.1g}"
    )
    assert same == len(ours)
    assert cached > 0
    assert off < 1e-3
