"""What the layers of a rollout took and gave, by the names that transformers has for them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

Token = tuple[int, int]  # a sequence, and a position in it
HEAD = "lm_head"  # gives logits


def tokens_first(x: Tensor, count: int) -> Tensor:
    """A view with tokens before heads. Some models norm their heads the other way round, in memory
    that lies as if they did not."""
    if x.dim() != 4:
        return x
    heads_first = x.shape[1] != count or (x.shape[2] == count and x.stride(1) < x.stride(2))
    return x.transpose(1, 2) if heads_first else x


@dataclass
class Layer:
    """All calls of a layer: a row is a token."""

    tokens: list[Token] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def record(self, tokens: list[Token], taken: Tensor, given: Tensor) -> None:
        self.tokens += tokens
        for calls, x in ((self.inputs, taken), (self.outputs, given)):
            calls.append(tokens_first(x, len(tokens)).reshape(len(tokens), -1).clone())


@dataclass
class Rollout:
    """`layers` has embeddings, linear layers and norms by their own names, attention, which takes
    queries and keys side by side, by the name of the module around it."""

    made_by: str
    layers: dict[str, Layer] = field(default_factory=lambda: defaultdict(Layer))
    sequences: list[list[int]] = field(default_factory=list)  # prompts and what was generated
    generated: list[Token] = field(default_factory=list)  # the tokens that have log_probs
    log_probs: list[float] = field(default_factory=list)

    def finish(self, prompt: list[int], tokens: list[int], log_probs: list[float]) -> None:
        """Adds a sequence that is complete."""
        places = range(len(prompt), len(prompt) + len(tokens))
        self.generated += [(len(self.sequences), position) for position in places]
        self.sequences.append([*prompt, *tokens])
        self.log_probs += log_probs

    def rows(self, tokens: list[Token]) -> Tensor:
        """Where these tokens are when the sequences lie one behind the other."""
        starts = torch.tensor([0, *map(len, self.sequences)]).cumsum(0).tolist()
        return torch.tensor([starts[sequence] + position for sequence, position in tokens])
