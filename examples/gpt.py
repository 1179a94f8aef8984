"""A small GPT whose attention is torch.ops.fa3npu: RoPE, grouped query heads, RMSNorm, SwiGLU.

One forward serves three uses, told apart by what it is given:
    packed            training: sequences one behind the other, no padding, differentiable
    packed and cache  prefill: prompts of different lengths, appended to a paged KV cache
    cache             decode: one token for every sequence of the cache
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa3_ops  # registers torch.ops.fa3npu, too

ops = torch.ops.fa3npu


@dataclass(frozen=True)
class Config:
    vocab_size: int = 256  # bytes
    context: int = 512
    n_layers: int = 4
    d_model: int = 192
    nheads: int = 6
    nheads_k: int = 2
    d_hidden: int = 512

    @property
    def headdim(self) -> int:
        return self.d_model // self.nheads


@dataclass
class Packed:
    """Where the sequences of a packed batch begin and end."""

    cu_seqlens: Tensor  # (batch_size + 1,) int32
    max_seqlen: int
    positions: Tensor  # (total,) place of each token in its sequence

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Packed:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        return Packed(cu_seqlens, max(lengths), positions)


@dataclass
class PagedCache:
    """The keys and values of all layers, in pages that sequences own in any order."""

    k_cache: list[Tensor]  # per layer (num_pages, page_size, nheads_k, headdim)
    v_cache: list[Tensor]
    page_table: Tensor  # (batch_size, max_num_pages_per_seq) int32
    cache_seqlens: Tensor  # (batch_size,) int32
    scheduler_metadata: Tensor | None = None  # of the next decode step, see plan()

    @staticmethod
    def empty(
        c: Config, batch_size: int, dtype: torch.dtype, device: torch.device, page_size: int = 16
    ) -> PagedCache:
        """Room for batch_size sequences of c.context tokens."""
        pages_per_seq = -(-c.context // page_size)
        num_pages = batch_size * pages_per_seq
        shape = (num_pages, page_size, c.nheads_k, c.headdim)
        # Shuffled, as pages are after a server has run for a while.
        page_table = torch.randperm(num_pages).view(batch_size, pages_per_seq)
        return PagedCache(
            k_cache=[torch.zeros(shape, dtype=dtype, device=device) for _ in range(c.n_layers)],
            v_cache=[torch.zeros(shape, dtype=dtype, device=device) for _ in range(c.n_layers)],
            page_table=page_table.to(device, torch.int32),
            cache_seqlens=torch.zeros(batch_size, dtype=torch.int32, device=device),
        )

    def plan(self, c: Config) -> None:
        """Before each decode step, once for all layers: what a captured graph on an NPU needs to
        know of the lengths. Elsewhere nothing reads it."""
        dtype = self.k_cache[0].dtype
        if self.cache_seqlens.device.type != "npu" or dtype not in (torch.float16, torch.bfloat16):
            return
        page_size = self.k_cache[0].shape[1]
        self.scheduler_metadata = fa3_ops.get_scheduler_metadata(
            *(len(self.cache_seqlens), 1, page_size * self.page_table.shape[1]),
            *(c.nheads, c.nheads_k, c.headdim, self.cache_seqlens, dtype),
            page_size=page_size,
            max_seqlen_k_new=1,
            causal=True,
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the operator does with rotary_interleaved=False; x is (total, heads, headdim)."""
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.headdim = layer, c.headdim
        self.heads = [c.nheads, c.nheads_k, c.nheads_k]
        self.qkv = nn.Linear(c.d_model, sum(self.heads) * c.headdim, bias=False)
        self.proj = nn.Linear(c.nheads * c.headdim, c.d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        packed: Packed | None,
        cache: PagedCache | None,
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.headdim)).split(self.heads, dim=-2)
        rotary_cos, rotary_sin = rotary_cos.to(q.dtype), rotary_sin.to(q.dtype)
        if cache is not None:
            # Rotates q and k, appends k and v to the cache, attends: nothing is copied around it.
            out, _ = ops.flash_attn_with_kvcache(
                q,
                cache.k_cache[self.layer],
                cache.v_cache[self.layer],
                k,
                v,
                rotary_cos=rotary_cos,
                rotary_sin=rotary_sin,
                rotary_interleaved=False,
                cache_seqlens=cache.cache_seqlens,
                page_table=cache.page_table,
                cu_seqlens_q=packed.cu_seqlens if packed else None,
                cu_seqlens_k_new=packed.cu_seqlens if packed else None,
                max_seqlen_q=packed.max_seqlen if packed else None,
                causal=True,
                scheduler_metadata=None if packed else cache.scheduler_metadata,
            )
        else:
            assert packed is not None
            cos, sin = rotary_cos[packed.positions], rotary_sin[packed.positions]
            out, _ = ops.flash_attn_varlen_func(
                rotate(q, cos, sin),
                rotate(k, cos, sin),
                v,
                cu_seqlens_q=packed.cu_seqlens,
                cu_seqlens_k=packed.cu_seqlens,
                max_seqlen_q=packed.max_seqlen,
                max_seqlen_k=packed.max_seqlen,
                causal=True,
            )
        return self.proj(out.flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.up = nn.Linear(c.d_model, 2 * c.d_hidden, bias=False)
        self.down = nn.Linear(c.d_hidden, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(c.d_model), Attention(c, layer)
        self.norm2, self.feed_forward = nn.RMSNorm(c.d_model), FeedForward(c)

    def forward(
        self,
        x: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        packed: Packed | None,
        cache: PagedCache | None,
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary_cos, rotary_sin, packed, cache)
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    rotary_cos: Tensor  # (context, headdim / 2)
    rotary_sin: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        frequencies = 10_000 ** -(torch.arange(0, c.headdim, 2) / c.headdim)
        angles = torch.outer(torch.arange(c.context), frequencies)
        self.register_buffer("rotary_cos", angles.cos())
        self.register_buffer("rotary_sin", angles.sin())
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # The branches start small, so that the residual stream starts as the embedding.
                depth = (2 * c.n_layers) ** -0.5 if "proj" in name or "down" in name else 1.0
                nn.init.normal_(weight, std=depth * weight.shape[1] ** -0.5)

    def forward(
        self, tokens: Tensor, packed: Packed | None = None, cache: PagedCache | None = None
    ) -> Tensor:
        """Logits of tokens, packed (total,), or (batch_size, 1) when decoding."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary_cos, self.rotary_sin, packed, cache)
        return self.head(self.norm(x))
