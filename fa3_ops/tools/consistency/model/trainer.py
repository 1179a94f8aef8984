"""The model in transformers: the trainer's forward pass, and a rollout through its own cache."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import fa3_ops.integrations.transformers.registered  # noqa: F401
from fa3_ops.batch_invariant import BatchInvariantMode
from fa3_ops.tools.consistency.model.hooks import Recorder, Replay, listening
from fa3_ops.tools.consistency.model.recording import Rollout
from fa3_ops.tools.consistency.outcome import Difference


class Trainer:
    def __init__(self, name: str, dtype: str, stock: bool = False) -> None:
        self.mode: Any = contextlib.nullcontext if stock else BatchInvariantMode
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa" if stock else "fa3npu"
        ).eval()
        self.vocabulary: int = self.model.config.get_text_config().vocab_size

    def logits(self, rollout: Rollout) -> Tensor:
        """(tokens, vocabulary), of one forward pass over all sequences, packed."""
        tokens = [token for sequence in rollout.sequences for token in sequence]
        positions = [i for sequence in rollout.sequences for i in range(len(sequence))]
        ids, position_ids = torch.tensor([tokens]), torch.tensor([positions])
        with torch.no_grad(), self.mode():
            made = self.model(input_ids=ids, position_ids=position_ids, use_cache=False)
        logits: Tensor = made.logits[0]
        return logits

    def log_probs(self, rollout: Rollout) -> Difference:
        """How the log-probabilities of the generated tokens differ."""
        return of_log_probs(rollout, self.logits(rollout))

    def layers(self, rollout: Rollout) -> dict[str, Difference]:
        """How each kind of layer differs, given the rollout's own numbers."""
        replay = Replay(rollout)
        with listening(self.model, replay):
            logits = self.logits(rollout)
        theirs = replay.logits(logits)
        return replay.differences | {"log_softmax": of_log_probs(rollout, theirs)}

    def roll_out(self, prompts: list[list[int]], new_tokens: int) -> Rollout:
        """Decodes greedily through a cache, one sequence after another, and records the layers."""
        rollout = Rollout(f"transformers {transformers.__version__}")
        recorder = Recorder(rollout)
        with listening(self.model, recorder), torch.no_grad(), self.mode():
            for prompt in prompts:
                cache = DynamicCache(config=self.model.config)
                tokens, log_probs = list(prompt), []
                for _ in range(new_tokens):
                    done = cache.get_seq_length()
                    recorder.begin_step(range(done, len(tokens)))
                    ids = torch.tensor([tokens[done:]])
                    logits = self.model(input_ids=ids, past_key_values=cache).logits
                    recorder.end_step(logits)
                    probabilities = log_softmax(logits[0, -1])
                    tokens.append(int(probabilities.argmax()))
                    log_probs.append(float(probabilities[tokens[-1]]))
                rollout.finish(prompt, tokens[len(prompt) :], log_probs)
        return rollout


def of_log_probs(rollout: Rollout, logits: Tensor) -> Difference:
    """How log-probabilities that these logits give differ from the rollout's."""
    before = rollout.rows(rollout.generated) - 1  # whose logits they come from
    tokens = torch.tensor([rollout.sequences[b][i] for b, i in rollout.generated])
    difference = Difference()
    difference.count(
        torch.tensor(rollout.log_probs), log_softmax(logits[before])[range(len(tokens)), tokens]
    )
    return difference


def log_softmax(logits: Tensor) -> Tensor:
    """By the formula of vLLM's sampler."""
    return logits.log_softmax(-1, dtype=torch.float32)
