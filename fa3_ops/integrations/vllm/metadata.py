"""What all attention layers of one step share, made once a step from vLLM's common metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)


@dataclass
class Part:
    """The sequences of a step that one call of attention serves."""

    causal: bool
    rows: Tensor | None = None  # (batch_size,) how many rows of each sequence are its; None: all


@dataclass
class Fa3Metadata(AttentionMetadata):
    """Prefill, chunked prefill, decode, speculation: sequence b has rows query_start_loc[b] to
    query_start_loc[b + 1] of the query, the last of its seq_lens[b] keys."""

    num_actual_tokens: int
    query_start_loc: Tensor  # (batch_size + 1,) int32
    seq_lens: Tensor  # (batch_size,) int32
    max_query_len: int
    block_table: Tensor  # (batch_size, max_num_pages_per_seq) int32
    slot_mapping: Tensor  # (num_tokens,) int64, -1: no slot
    parts: list[Part]


class Fa3MetadataBuilder(AttentionMetadataBuilder[Fa3Metadata]):
    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Fa3Metadata:
        common = common_attn_metadata
        return Fa3Metadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            max_query_len=common.max_query_len,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            parts=parts_of(common.causal, common.query_start_loc),
        )


def parts_of(causal: bool | Tensor, query_start_loc: Tensor) -> list[Part]:
    """One part, or two if some sequences are causal and others are not (DiffusionGemma's)."""
    if isinstance(causal, bool):
        return [Part(causal)]
    rows = query_start_loc.diff()
    causal = causal.to(torch.bool)
    return [Part(True, rows * causal), Part(False, rows * ~causal)]
