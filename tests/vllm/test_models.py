"""The tokens of vLLM's own kernel, model by model."""

from __future__ import annotations

import statistics
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


def test_a_cache_in_fp8(folder: Path) -> None:
    """Of logits that spread by some 1.5: with two bits of mantissa for three, they are further off
    those of a cache in float32. (vLLM's own kernel has FP8 caches on some machines alone.)"""
    model, batch = make("qwen3", folder), prompts(16)

    def first_logits(kv_cache_dtype: str) -> list[dict[int, float]]:
        with engine(model, kv_cache_dtype=kv_cache_dtype, **OURS) as llm:
            return [answer.logits[0] for answer in answers(llm, batch, new_tokens=1)]

    def off(some: list[dict[int, float]], others: list[dict[int, float]]) -> float:
        pairs = zip(some, others, strict=True)
        return statistics.mean(abs(a[t] - b[t]) for a, b in pairs for t in a.keys() & b.keys())

    wide = first_logits("auto")
    three, two = (off(first_logits(name), wide) for name in ("fp8", "fp8_e5m2"))
    print(f"FP8 caches: logits off by {three:.2g} with e4m3, by {two:.2g} with e5m2")
    assert 0 < three < two < 0.5
