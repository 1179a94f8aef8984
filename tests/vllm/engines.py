"""One vLLM engine at a time, and what it says to prompts."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

OURS = {"attention_backend": "CUSTOM"}
THEIRS: dict[str, str] = {}  # vLLM's default, its own kernel
# Prompts of up to 700 tokens come in chunks of at most 256, 16 of them at once.
SETTINGS = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 128 << 20,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "disable_log_stats": True,
    "logprobs_mode": "raw_logits",
    "seed": 0,
}


@dataclass
class Answer:
    tokens: list[int]
    logits: list[dict[int, float]]  # of the likeliest tokens, for each token
    cached: int  # tokens of the prompt that the prefix cache had


def prompts(n: int = 64) -> list[list[int]]:
    """Of 1 to 700 tokens; every fourth begins with tokens that others begin with, too."""
    draw = random.Random(7)
    shared = draw.choices(range(3, VOCABULARY), k=300)
    lengths = [1, 2, 5, 17, 31, 64, 65, 100, 128, 200, 333, 500, 700]
    made = []
    for i in range(n):
        prompt = draw.choices(range(3, VOCABULARY), k=draw.choice(lengths))
        common = draw.choice([128, 200, 256, 300])
        made.append(shared[:common] + prompt[:200] if i % 4 == 0 else prompt)
    return made


@contextmanager
def engine(model: Path, **settings: Any) -> Iterator[LLM]:
    llm = LLM(str(model), **SETTINGS | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        torch._dynamo.reset()


def answers(llm: LLM, batch: list[list[int]], new_tokens: int = 32) -> list[Answer]:
    """Greedy, with the logits of the 5 likeliest tokens."""
    greedy = SamplingParams(
        temperature=0, max_tokens=new_tokens, logprobs=5, ignore_eos=True, detokenize=False
    )
    results = llm.generate([{"prompt_token_ids": p} for p in batch], greedy, use_tqdm=False)
    return [
        Answer(
            list(result.outputs[0].token_ids),
            [{t: x.logprob for t, x in step.items()} for step in result.outputs[0].logprobs],
            result.num_cached_tokens,
        )
        for result in results
    ]


def attention_of(llm: LLM) -> set[str]:
    """The classes that serve the engine's attention layers."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return {type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")}
