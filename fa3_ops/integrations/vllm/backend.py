"""The attention backend: one call of fa3_ops for a whole batch, over vLLM's cache where it lies."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import vllm
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

import fa3_ops
from fa3_ops.integrations.vllm.metadata import Fa3Metadata, Fa3MetadataBuilder, Part

VERSIONS = ("0.32", "0.33")
if ".".join(vllm.__version__.split(".")[:2]) not in VERSIONS:
    raise ImportError(
        f"fa3_ops' attention backend needs vLLM {' or '.join(VERSIONS)}, got {vllm.__version__}"
    )

logger = init_logger(f"vllm.{__name__}")  # under vLLM's name, for its handlers

ENCODERS = (AttentionType.ENCODER_ONLY, AttentionType.ENCODER)
# vLLM keeps these as bytes; what one of them means is dtype times layer._k_scale or layer._v_scale.
NARROW = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class Fa3Backend(AttentionBackend):
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16", *NARROW]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # the member of vLLM's enumeration that we are registered under

    @staticmethod
    def get_impl_cls() -> type[Fa3Impl]:
        return Fa3Impl

    @staticmethod
    def get_builder_cls() -> type[Fa3MetadataBuilder]:
        return Fa3MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Any are served; a decode is fastest where the heads of a token lie side by side."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 1 <= head_size <= 512

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (
            AttentionType.DECODER,
            AttentionType.ENCODER_DECODER,
            *ENCODERS,
        )

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any
    ) -> str | None:
        if kv_cache_dtype in (None, "auto", str(dtype).removeprefix("torch."), *NARROW):
            return None
        return f"kv_cache_dtype must be auto, fp8 or the model's, {dtype}, got {kv_cache_dtype}"

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


class Fa3Impl(AttentionImpl[Fa3Metadata]):
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
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.softcap = logits_soft_cap or 0.0
        self.sliding_window = sliding_window
        self.sinks = sinks
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.alibi_slopes = None
        if alibi_slopes is not None:
            self.alibi_slopes = torch.tensor(alibi_slopes, dtype=torch.float32)
        self.told = False

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes token i of key and value, (num_tokens, nheads_k, ...), at slot_mapping[i]."""
        if self.attn_type in ENCODERS:  # which keep no cache
            return
        k_cache, v_cache = self._caches(kv_cache)
        fa3_ops.kvcache_scatter_(
            key, value, k_cache, v_cache, slot_mapping, *self._descales(layer).values()
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Fa3Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query is (num_tokens, nheads, headdim), output (num_tokens, nheads, headdim_v), of which
        num_actual_tokens count; kv_cache (num_pages, nheads_k, page_size, headdim + headdim_v)."""
        metadata = attn_metadata
        if metadata is None:  # vLLM warms up
            return output
        n = metadata.num_actual_tokens
        keys = self._keys(layer, key, value, kv_cache, metadata)
        parts = [{"q": query[:n], **keys, **self._mask(part)} for part in metadata.parts]
        if not self.told:
            self._tell(parts[0])
        if len(parts) == 1:
            fa3_ops.flash_attn_varlen_func(**parts[0], out=output[:n])
        else:  # a row is 0 in the part that it does not belong to
            results: list[Any] = [fa3_ops.flash_attn_varlen_func(**part) for part in parts]
            torch.add(*results, out=output[:n])
        return output

    def _caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views of vLLM's cache as ours, (num_pages, page_size, nheads_k, ...)."""
        pages = kv_cache.transpose(1, 2)
        if self.kv_cache_dtype in NARROW:
            pages = pages.view(NARROW[self.kv_cache_dtype])
        return pages[..., : self.head_size], pages[..., self.head_size :]

    def _descales(self, layer: Any) -> dict[str, Tensor]:
        """One number each, or (nheads_k,)."""
        if self.kv_cache_dtype not in NARROW:
            return {}
        return {"k_descale": layer._k_scale, "v_descale": layer._v_scale}

    def _keys(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, metadata: Fa3Metadata
    ) -> dict[str, Any]:
        """What all parts have in common: the lengths, the keys, and what becomes of the scores."""
        arguments: dict[str, Any] = {
            "cu_seqlens_q": metadata.query_start_loc,
            "max_seqlen_q": metadata.max_query_len,
            "softmax_scale": self.scale,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }
        if self.attn_type in ENCODERS:
            n = metadata.num_actual_tokens
            return arguments | {
                "k": key[:n],
                "v": value[:n],
                "cu_seqlens_k": metadata.query_start_loc,
                "max_seqlen_k": metadata.max_query_len,
            }
        k_cache, v_cache = self._caches(kv_cache)
        return arguments | {
            "k": k_cache,
            "v": v_cache,
            "cu_seqlens_k": None,
            "max_seqlen_k": None,
            "seqused_k": metadata.seq_lens,
            "page_table": metadata.block_table,
            **self._descales(layer),
        }

    def _mask(self, part: Part) -> dict[str, Any]:
        """vLLM's window of W counts the query itself; without causality it goes both ways."""
        left = -1 if self.sliding_window is None else self.sliding_window - 1
        return {
            "causal": part.causal,
            "window_size": (left, 0 if part.causal else left),
            "seqused_q": part.rows,
        }

    def _tell(self, arguments: dict[str, Any]) -> None:
        """Logs, once for all layers that get the same answer, which kernel serves them."""
        explanation = fa3_ops.explain(fa3_ops.flash_attn_varlen_func, **arguments)
        logger.info_once("attention by fa3_ops: %s", str(explanation))
        self.told = True
