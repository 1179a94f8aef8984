"""Continuous batching of a causal language model of transformers over a paged KV cache.

Requests join when a place is free and leave when they are done. Every step is one packed forward
pass of the model: single tokens of requests that generate, beside chunks of prompts, up to a budget
of tokens. The model's own layers run; only its attention function is one of the two here, which
append to the cache and attend. transformers hands them the Pages as a keyword argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import fa3_ops


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The one formula by which rollout and trainer take log-probabilities, (n,) float32."""
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


@dataclass
class Request:
    prompt: list[int]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)  # generated
    log_probs: list[float] = field(default_factory=list)  # of each, when it was drawn
    cached: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)

    @property
    def all_tokens(self) -> list[int]:
        return self.prompt + self.tokens


@dataclass
class Pages:
    """The cache of all layers, and where the sequences of one step stand in it."""

    k_cache: list[Tensor]  # per layer (num_pages, page_size, nheads_k, headdim)
    v_cache: list[Tensor]
    page_table: Tensor  # (batch_size, max_num_pages_per_seq) int32
    cache_seqlens: Tensor  # (batch_size,) int32, before the step
    cu_seqlens: Tensor  # (batch_size + 1,) int32, of the step's tokens
    max_seqlen: int


# ---- Attention ---------------------------------------------------------------------------------
# query is (1, nheads, total, headdim), key and value (1, nheads_k, total, headdim), of packed
# tokens; the result (1, total, nheads, headdim).


def paged_fa3npu(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **given: Any
) -> tuple[Tensor, None]:
    pages: Pages = given["pages"]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = fa3_ops.flash_attn_with_kvcache(
        q,
        pages.k_cache[module.layer_idx],
        pages.v_cache[module.layer_idx],
        k,
        v,
        cache_seqlens=pages.cache_seqlens,
        page_table=pages.page_table,
        cu_seqlens_q=pages.cu_seqlens,
        cu_seqlens_k_new=pages.cu_seqlens,
        max_seqlen_q=pages.max_seqlen,
        softmax_scale=given["scaling"],
        causal=True,
    )
    return out[None], None


def paged_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **given: Any
) -> tuple[Tensor, None]:
    """What the other computes, by PyTorch's attention: one sequence after the other, its keys
    gathered from their pages."""
    pages: Pages = given["pages"]
    caches = [
        (new[0].transpose(0, 1), cache[module.layer_idx].flatten(0, 1))
        for new, cache in ((key, pages.k_cache), (value, pages.v_cache))
    ]
    page_size = pages.k_cache[0].shape[1]
    out = []
    for i, used in enumerate(pages.cache_seqlens.tolist()):
        begin, end = pages.cu_seqlens[i : i + 2].tolist()
        positions = torch.arange(used + end - begin, device=query.device)
        slots = pages.page_table[i, positions // page_size] * page_size + positions % page_size
        for new, cache in caches:
            cache[slots[used:]] = new[begin:end]
        k, v = (cache[slots].transpose(0, 1)[None] for _, cache in caches)
        is_visible = positions <= positions[used:, None]
        out.append(
            F.scaled_dot_product_attention(
                query[:, :, begin:end],
                k,
                v,
                attn_mask=is_visible if end - begin > 1 else None,
                scale=given["scaling"],
                enable_gqa=True,
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2), None


for function in (paged_fa3npu, paged_sdpa):
    AttentionInterface.register(function.__name__, function)
    AttentionMaskInterface.register(function.__name__, lambda *args, **kwargs: None)


# ---- Scheduler ---------------------------------------------------------------------------------


class Engine:
    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: str,
        slots: int = 24,
        budget: int = 96,
        page_size: int = 16,
        pages_per_seq: int = 16,
    ) -> None:
        """slots: requests at a time; budget: tokens of a step."""
        c: Any = model.config
        self.model, self.attention = model, attention
        self.slots, self.budget, self.page_size = slots, budget, page_size
        shape = (slots * pages_per_seq, page_size, c.num_key_value_heads, c.head_dim)
        empty = [
            torch.zeros(shape, dtype=model.dtype, device=model.device)
            for _ in range(2 * c.num_hidden_layers)
        ]
        self.k_cache, self.v_cache = empty[::2], empty[1::2]
        self.free = torch.randperm(shape[0]).tolist()  # as after a server has run for a while

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> int:
        """Fills the requests' tokens and log_probs. Returns the number of steps."""
        self.model.set_attn_implementation(self.attention)
        waiting, running, steps = list(requests), [], 0
        while waiting or running:
            while waiting and len(running) < self.slots:
                running.append(waiting.pop(0))
            batch = self._batch(running)
            self._step(batch)
            steps += 1
            for request, _ in batch:
                if len(request.tokens) == request.max_new_tokens:
                    running.remove(request)
                    self.free += request.pages
                    request.pages = []
        return steps

    def _batch(self, running: Sequence[Request]) -> list[tuple[Request, list[int]]]:
        """Requests and the tokens that each brings to the next step, within the budget."""
        batch, left = [], self.budget
        for request in running:
            tokens = request.all_tokens[request.cached :][:left]
            if tokens:
                batch.append((request, tokens))
                left -= len(tokens)
        return batch

    def _step(self, batch: Sequence[tuple[Request, list[int]]]) -> None:
        lengths = [len(tokens) for _, tokens in batch]
        pages, positions = self._place(batch, lengths)
        tokens = self._tensor([t for _, tokens in batch for t in tokens])
        logits = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=(pages.cu_seqlens[1:] - 1).long(),
            pages=pages,
        ).logits[0]
        drawn = torch.multinomial(logits.float().softmax(-1).cpu(), 1)[:, 0]
        log_probs = token_log_probs(logits, drawn.to(logits.device)).tolist()
        for (request, new), token, log_prob in zip(batch, drawn.tolist(), log_probs, strict=True):
            request.cached += len(new)
            if request.cached == len(request.all_tokens):  # the last chunk of what it has
                request.tokens.append(token)
                request.log_probs.append(log_prob)

    def _place(
        self, batch: Sequence[tuple[Request, list[int]]], lengths: Sequence[int]
    ) -> tuple[Pages, Tensor]:
        """Takes pages for the new tokens. Returns the Pages and the tokens' positions."""
        for request, tokens in batch:
            while len(request.pages) * self.page_size < request.cached + len(tokens):
                request.pages.append(self.free.pop())
        most = max(len(request.pages) for request, _ in batch)
        used = [request.cached for request, _ in batch]
        pages = Pages(
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            page_table=self._tensor(
                [r.pages + [0] * (most - len(r.pages)) for r, _ in batch], torch.int32
            ),
            cache_seqlens=self._tensor(used, torch.int32),
            cu_seqlens=F.pad(self._tensor(lengths).cumsum(0), (1, 0)).int(),
            max_seqlen=max(lengths),
        )
        positions = [n + i for n, length in zip(used, lengths, strict=True) for i in range(length)]
        return pages, self._tensor(positions)

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.model.device)
