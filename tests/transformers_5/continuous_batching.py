"""A rollout by transformers' continuous batching, and the log-probabilities of a trainer."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
import transformers
from torch import Tensor

PROMPTS = [tiny_models.tokens(1, 3 + 11 * i, seed=i)[0].tolist() for i in range(8)]


def rollout(model: Any, new_tokens: int) -> list[Any]:
    """Results of PROMPTS, in their order, from steps of at most 40 tokens."""
    greedy = transformers.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = transformers.ContinuousBatchingConfig(
        num_blocks=64,
        block_size=16,
        max_batch_tokens=40,
        return_logprobs=True,
        use_cuda_graph=False,
    )
    results = model.generate_batch(
        PROMPTS, generation_config=greedy, continuous_batching_config=batching, progress_bar=False
    )
    by_prompt = {tuple(result.prompt_ids): result for result in results.values()}
    return [by_prompt[tuple(prompt)] for prompt in PROMPTS]


@torch.no_grad()
def trained(model: Any, results: list[Any]) -> list[Tensor]:
    """The log-probabilities of the new tokens, from one packed forward pass."""
    sequences = [result.prompt_ids + result.generated_tokens for result in results]
    ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    given = {"input_ids": ids.to(model.device), "position_ids": positions.to(model.device)}
    logits = model(**given, use_cache=False).logits[0]
    # As continuous batching makes them, on the same device.
    parts = logits.float().softmax(-1).log().cpu().split([len(s) for s in sequences])
    new_tokens = [result.generated_tokens for result in results]
    return [of_new(*pair) for pair in zip(parts, new_tokens, strict=True)]


def of_new(logprobs: Tensor, tokens: list[int]) -> Tensor:
    """Of the last tokens of a sequence, whose rows are those before them."""
    rows = logprobs[-1 - len(tokens) : -1]
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
