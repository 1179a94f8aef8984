"""What must not change a bit: the block size, speculation, the other requests, the threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import OURS, answers, engine, prompts
from generate import in_a_process
from tiny_models import make

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


def bits(answer: Any) -> tuple[list[int], list[dict[str, float]]]:
    """Tokens and logits; JSON keeps every bit of a float, and makes the keys strings."""
    said = answer if isinstance(answer, dict) else vars(answer)
    return said["tokens"], [{str(t): x for t, x in step.items()} for step in said["logits"]]


def same_bits(some: list[Any], others: list[Any]) -> int:
    return sum(bits(a) == bits(b) for a, b in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return make("qwen3", folder)


@pytest.fixture(scope="module")
def plain(model: Path) -> list[Any]:
    with engine(model, **OURS) as llm:
        return answers(llm, prompts())


@pytest.mark.parametrize("block_size", [16, 128])
def test_the_block_size(model: Path, plain: list[Any], block_size: int) -> None:
    with engine(model, block_size=block_size, max_num_batched_tokens=96, **OURS) as llm:
        said = answers(llm, prompts())
    same = same_bits(said, plain)
    print(f"block size {block_size}, chunks of 96 tokens for 256: the same bits {same} of 64")
    assert same == 64


def test_speculation(model: Path, plain: list[Any], tmp_path: Path) -> None:
    """In another process: vLLM cannot make a second engine after one that speculates."""
    settings = {"speculative_config": NGRAM}
    said = in_a_process(model, tmp_path / "ours", settings=settings | OURS)["batch"]
    same = same_bits(said, plain)
    print(f"ngram speculation and none: the same bits {same} of 64")
    assert same == 64


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 2), ("bfloat16", 1)])
def test_the_other_requests(dtype: str, threads: int, model: Path, tmp_path: Path) -> None:
    """Log-probabilities end to end, alone with weights that were loaded into the running engine."""
    wishes = {"threads": threads, "prompts": 8, "reload": True, "alone": True}
    settings = {"dtype": dtype, "logprobs_mode": "raw_logprobs"}
    file = tmp_path / "said"
    said = in_a_process(model, file, batch_invariant=True, settings=settings, **wishes)
    same = same_bits(said["batch"], said["alone"])
    print(f"VLLM_BATCH_INVARIANT=1, {dtype}: the same bits alone and in a batch {same} of 8")
    assert same == 8
