"""The attention backend for vLLM-Ascend: one call of fa3_ops for a whole batch, whether its
sequences prefill, decode or speculate, in a captured graph as without one.

A graph finds what it reads where it was when the graph was captured. What changes from step to step
and is not vLLM-Ascend's own stable storage is therefore copied into ours (Buffers), once a step.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import vllm
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)

import fa3_ops

VERSION = "0.23"
if ".".join(vllm.__version__.split(".")[:2]) != VERSION:
    raise ImportError(
        f"fa3_ops' attention backend for vLLM-Ascend needs vLLM {VERSION}, got {vllm.__version__}"
    )

PAGE_SIZE = 128  # vLLM-Ascend's


class Fa3AscendBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        from vllm import envs

        # Its second model runner wants a name that vLLM knows.
        return "FLASH_ATTN" if envs.VLLM_USE_V2_MODEL_RUNNER else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Fa3AscendImpl]:
        return Fa3AscendImpl

    @staticmethod
    def get_builder_cls() -> type[Fa3AscendMetadataBuilder]:
        return Fa3AscendMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype: str = ""
    ) -> tuple[int, ...]:
        return (2, num_blocks, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[Any]:
        return [PAGE_SIZE]

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


class Scores(NamedTuple):
    """What of a layer goes into the schedule: layers of the same Scores share it."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    softcap: float
    sliding_window: int | None

    def window_size(self, causal: bool) -> tuple[int, int]:
        """A window of W counts the query itself; without causality it goes both ways."""
        left = -1 if self.sliding_window is None else self.sliding_window - 1
        return left, 0 if causal else left


@dataclass
class Fa3AscendMetadata(AttentionMetadata):
    """Sequence b has rows query_start_loc[b] to query_start_loc[b + 1] of the query, the last of
    its seq_lens[b] keys; those that the schedules were not made for are padding."""

    query_start_loc: Tensor  # (batch_size + 1,) int32
    seq_lens: Tensor  # (batch_size,) int32
    block_table: Tensor  # (batch_size, max_num_pages_per_seq) int32
    slot_mapping: Tensor  # (num_tokens,), -1: no slot
    max_query_len: int
    causal: bool
    schedules: dict[Scores, Tensor]


class Buffers:
    """Lengths and page table of the largest batch, where every graph finds them."""

    def __init__(self, most: int, pages: int, device: torch.device) -> None:
        self.query_start_loc = torch.zeros(most + 1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(most, pages, dtype=torch.int32, device=device)
        self.schedules: dict[int, dict[Scores, Tensor]] = {}  # by the graph's number of tokens

    def fill(self, common: Any, active: int) -> None:
        self.query_start_loc[: active + 1].copy_(common.query_start_loc[: active + 1])
        self.seq_lens[:active].copy_(common.seq_lens[:active])
        self.block_table[:active].copy_(common.block_table_tensor[:active])


class Fa3AscendMetadataBuilder(AttentionMetadataBuilder[Fa3AscendMetadata]):
    reorder_batch_threshold = None  # one call serves a batch in any order

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.most = vllm_config.scheduler_config.max_num_seqs
        self.capture_sizes = set(vllm_config.compilation_config.cudagraph_capture_sizes or ())
        layers = vllm_config.compilation_config.static_forward_context
        self.scores = {layers[name].impl.scores for name in layer_names}
        self.buffers: Buffers | None = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.ALWAYS

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Fa3AscendMetadata:
        """Once a step, before the graph of that step is captured or replayed."""
        common = common_attn_metadata
        active = active_requests(common)
        if self.buffers is None:
            pages = common.block_table_tensor.shape[1]
            self.buffers = Buffers(self.most, pages, self.device)
        self.buffers.fill(common, active)
        num_tokens = common.num_input_tokens or common.num_actual_tokens
        captured = num_tokens in self.capture_sizes
        # A graph of n tokens is replayed with up to n sequences, of up to n rows.
        count = min(num_tokens, self.most) if captured else active
        metadata = Fa3AscendMetadata(
            query_start_loc=self.buffers.query_start_loc[: count + 1],
            seq_lens=self.buffers.seq_lens[:count],
            block_table=self.buffers.block_table[:count],
            slot_mapping=common.slot_mapping,
            max_query_len=num_tokens if captured else common.max_query_len,
            causal=common.causal,
            schedules=self.buffers.schedules.setdefault(num_tokens, {}) if captured else {},
        )
        for scores in self.scores:
            self._schedule(metadata, scores, active)
        return metadata

    def build_for_graph_capture(self, common_attn_metadata: Any, attn_state: Any = None) -> Any:
        """vLLM-Ascend's draft models ask for this: several steps in a graph, which would all find
        the lengths of the last."""
        raise NotImplementedError("fa3_ops: graphs of draft models: set enforce_eager for them")

    def _schedule(self, metadata: Fa3AscendMetadata, scores: Scores, active: int) -> None:
        page_size = self.kv_cache_spec.block_size
        made = fa3_ops.get_scheduler_metadata(
            batch_size=active,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=page_size * metadata.block_table.shape[1],
            num_heads_q=scores.num_heads,
            num_heads_kv=scores.num_kv_heads,
            headdim=scores.head_size,
            cache_seqlens=metadata.seq_lens,
            qkv_dtype=self.kv_cache_spec.dtype,
            cu_seqlens_q=metadata.query_start_loc,
            page_size=page_size,
            causal=metadata.causal,
            window_size=scores.window_size(metadata.causal),
            has_softcap=scores.softcap > 0,
            softcap=scores.softcap,
            softmax_scale=scores.scale,
        )
        if scores in metadata.schedules:
            metadata.schedules[scores].copy_(made)
        else:
            metadata.schedules[scores] = made


def active_requests(common: Any) -> int:
    """How many sequences have rows that count, from the offsets on the host: vLLM-Ascend pads a
    batch with sequences behind the last token, or with one that has an offset alone."""
    offsets = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    return max(1, bisect_left(offsets, common.num_actual_tokens))


class Fa3AscendImpl(AttentionImpl[Fa3AscendMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        refuse(alibi_slopes=alibi_slopes, kv_cache_dtype=kv_cache_dtype, attn_type=attn_type)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or 0.0
        self.sliding_window = sliding_window
        self.sinks = sinks
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    @cached_property
    def scores(self) -> Scores:
        return Scores(
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            self.scale,
            self.softcap,
            self.sliding_window,
        )

    @staticmethod
    def update_graph_params(*step: object) -> None:
        """vLLM-Ascend asks before a replay. What changes, the builder has copied."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Any, slot_mapping: Tensor
    ) -> None:
        """Writes token i of key and value, (num_tokens, nheads_k, headdim), at slot_mapping[i]."""
        fa3_ops.kvcache_scatter_(key, value, kv_cache[0], kv_cache[1], slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Any,
        attn_metadata: Fa3AscendMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query is (num_tokens, nheads, headdim) and output like it, padding included, of which
        the rows are 0; kv_cache two caches (num_pages, page_size, nheads_k, headdim)."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fa3_ops: fused quantization of the output")
        metadata = attn_metadata
        if metadata is None:  # vLLM warms up
            return output.fill_(0)
        shares = self.kv_sharing_target_layer_name is not None
        if key is not None and value is not None and not shares:
            self.do_kv_cache_update(layer, key, value, kv_cache, metadata.slot_mapping)
        fa3_ops.flash_attn_with_kvcache(
            query,
            kv_cache[0],
            kv_cache[1],
            cache_seqlens=metadata.seq_lens,
            page_table=metadata.block_table,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            softmax_scale=self.scale,
            causal=metadata.causal,
            window_size=self.scores.window_size(metadata.causal),
            softcap=self.softcap,
            sinks=self.sinks,
            scheduler_metadata=metadata.schedules[self.scores],
            out=output,
        )
        return output


def refuse(alibi_slopes: list[float] | None, kv_cache_dtype: str, attn_type: str) -> None:
    """What this backend would have to leave to slow operators, or does not know, when the engine
    starts."""
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    parallel = config.parallel_config
    reasons = {
        "alibi_slopes": alibi_slopes is not None,
        f"kv_cache_dtype {kv_cache_dtype}": kv_cache_dtype not in ("auto", "float16", "bfloat16"),
        f"attention type {attn_type}": attn_type != AttentionType.DECODER,
        "a KV connector": config.kv_transfer_config is not None,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
    }
    if given := [reason for reason, is_given in reasons.items() if is_given]:
        raise ValueError(
            f"fa3_ops' attention backend for vLLM-Ascend does not serve {', '.join(given)}: leave "
            "--attention-backend CUSTOM out"
        )
