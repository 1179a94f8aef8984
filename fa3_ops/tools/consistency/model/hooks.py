"""Listening to the layers of a model of transformers: to record them, or to compare them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fa3_ops.tools.consistency.model.recording import HEAD, Rollout, Token, tokens_first
from fa3_ops.tools.consistency.outcome import Difference


class Listener(Protocol):
    def before(self, name: str, taken: Tensor) -> None: ...

    def after(self, name: str, taken: Tensor, given: Tensor) -> Tensor:
        """Returns what is to be given instead."""

    def attention(
        self, name: str, query: Tensor, key: Tensor, attend: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """query and key are (1, heads, tokens, headdim); `attend` gives (1, tokens, ...)."""


@contextmanager
def listening(model: Any, listener: Listener) -> Iterator[None]:
    """The listener hears of every layer that has parameters of its own, and of attention."""
    names = {module: name for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    compute = ALL_ATTENTION_FUNCTIONS[attention]

    def attend(module: nn.Module, query: Tensor, key: Tensor, *inputs: Any, **named: Any) -> Any:
        def rest(query: Tensor, key: Tensor) -> Tensor:
            out: Tensor = compute(module, query, key, *inputs, **named)[0]
            return out

        return listener.attention(names[module], query, key, rest), None

    handles = []
    for module, name in names.items():
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(partial(_before, listener, name)))
            handles.append(module.register_forward_hook(partial(_after, listener, name)))
    ALL_ATTENTION_FUNCTIONS[attention] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[attention]  # transformers has the function still
        for handle in handles:
            handle.remove()


def _before(listener: Listener, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    listener.before(name, inputs[0])


def _after(
    listener: Listener, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any
) -> Any:
    if isinstance(output, tuple):
        return (listener.after(name, inputs[0], output[0]), *output[1:])
    return listener.after(name, inputs[0], output)


def beside(query: Tensor, key: Tensor) -> Tensor:
    """The heads of (1, heads, tokens, headdim) in one row for each token."""
    return torch.cat([x[0].transpose(0, 1).flatten(1) for x in (query, key)], -1)


class Recorder:
    """Records a rollout, one sequence at a time."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.tokens: list[Token] = []  # of this step
        self.head_took = torch.empty(0)

    def begin_step(self, positions: Iterable[int]) -> None:
        self.tokens = [(len(self.rollout.sequences), position) for position in positions]

    def end_step(self, logits: Tensor) -> None:
        self.rollout.layers[HEAD].record(self.tokens, self.head_took, logits)

    def before(self, name: str, taken: Tensor) -> None:
        if name == HEAD:
            self.head_took = taken

    def after(self, name: str, taken: Tensor, given: Tensor) -> Tensor:
        if name != HEAD:
            self.rollout.layers[name].record(self.tokens, taken, given)
        return given

    def attention(
        self, name: str, query: Tensor, key: Tensor, attend: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        given = attend(query, key)
        taken = beside(query, key[:, :, -query.shape[2] :])
        self.rollout.layers[name].record(self.tokens, taken, given)
        return given


class Replay:
    """Compares every layer with the rollout's, and goes on with the rollout's numbers."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.differences: dict[str, Difference] = defaultdict(Difference)  # by kind of layer
        self.placed: dict[int, Tensor] = {}  # the rollout's numbers, by their addresses

    def before(self, name: str, taken: Tensor) -> None:
        """What a layer takes is compared where something was computed since the last layer."""
        if self._knows(name, taken) and taken.data_ptr() not in self.placed:
            inputs = self.rollout.layers[name].inputs
            taken.copy_(self._compare(f"what {kind(name)} takes", name, taken, inputs))

    def after(self, name: str, taken: Tensor, given: Tensor) -> Tensor:
        if name == HEAD or not self._knows(name, taken):
            return given
        return self._compare(kind(name), name, given, self.rollout.layers[name].outputs)

    def attention(
        self, name: str, query: Tensor, key: Tensor, attend: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        if name not in self.rollout.layers:
            return attend(query, key)
        layer = self.rollout.layers[name]
        both = self._compare(
            f"queries and keys of {kind(name)}", name, beside(query, key), layer.inputs
        )
        both = both.unflatten(1, (-1, query.shape[-1])).transpose(0, 1)[None]
        given = attend(*both.split([query.shape[1], key.shape[1]], 1))
        return self._compare(f"attention of {kind(name)}", name, given, layer.outputs)

    def logits(self, logits: Tensor) -> Tensor:
        """Those of the head and what the model does behind it; returns the rollout's."""
        return self._compare("logits", HEAD, logits, self.rollout.layers[HEAD].outputs)

    def _knows(self, name: str, taken: Tensor) -> bool:
        """Embeddings, which vLLM may scale outside, are compared with what the first norm takes."""
        return name in self.rollout.layers and taken.is_floating_point()

    def _compare(self, what: str, name: str, ours: Tensor, theirs: list[Tensor]) -> Tensor:
        """Counts, and returns `ours` with the rollout's numbers in place of its own."""
        rows = self.rollout.rows(self.rollout.layers[name].tokens)
        count = sum(map(len, self.rollout.sequences))
        flat = tokens_first(ours, count).reshape(count, -1).clone()
        recorded = torch.cat(theirs)
        self.differences[what].count(recorded, flat[rows])
        flat[rows] = recorded
        placed = ours.clone()
        seen = tokens_first(placed, count)
        seen.copy_(flat.view(seen.shape))
        self.placed[placed.data_ptr()] = placed
        return placed


def kind(name: str) -> str:
    """A layer's name without its number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
