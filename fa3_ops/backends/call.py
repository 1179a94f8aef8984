"""Requests: what an operator was asked for, as frozen data, whichever operator it came through.

A request has the tensors and numbers of its operator under their names. Where its memory lies and
what the host knows of its lengths is no part of it: that is a Run (backend.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from fa3_ops.ops.checks import NARROW
from fa3_ops.ops.schema import COMMON_NAMES, bind, name_of, signature

RequestT = TypeVar("RequestT", bound="Request")


class Request:
    """What all kinds of requests have."""

    # How a fallback begins to tell of itself; None: serving it another way is no fallback.
    served: ClassVar[str | None] = None
    other_names: ClassVar[Mapping[str, str]] = {}  # fields by the operators' names for them

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute, as the shapes tell."""
        return False

    def empty_results(self) -> Any:
        """What there is to return then."""
        raise NotImplementedError

    @classmethod
    def of(cls: type[RequestT], op: Any, given: Mapping[str, Any], **more: Any) -> RequestT:
        """From the operator's arguments by name; those that change no result stay out."""
        return cls(**{field: given[name] for field, name in arguments_of(cls, op)}, **more)  # type: ignore[arg-type]


@functools.cache
def arguments_of(kind: Any, op: Any) -> tuple[tuple[str, str], ...]:
    """The fields of a kind of request and the arguments of an operator that they are."""
    wanted = {field.name for field in fields(kind)}
    pairs = ((kind.other_names.get(name, name), name) for name in signature(op).names)
    return tuple((field, name) for field, name in pairs if field in wanted)


def sides_of(window_size: Sequence[int], causal: bool) -> tuple[int, int]:
    """How many keys a row of q sees to the left and to the right of its own; -1: all of them."""
    left, right = window_size
    return max(left, -1), 0 if causal else max(right, -1)


@dataclass(frozen=True, eq=False)
class Attention(Request):
    """What flash_attn_func, flash_attn_varlen_func and flash_attn_kvcache have in common.

    q is (batch_size, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with cu_seqlens_q.
    k and v are (batch_size_k, seqlen_k, nheads_k, ...), (total_k, nheads_k, ...) with cu_seqlens_k,
    or (num_pages, page_size, nheads_k, ...) with page_table. The meaning of every field is that of
    the operators' argument of the same name, seqused_k being also cache_seqlens.
    """

    served: ClassVar[str | None] = "served"
    other_names: ClassVar[Mapping[str, str]] = COMMON_NAMES

    q: Tensor
    k: Tensor
    v: Tensor
    qv: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    cache_start: Tensor | None = None
    page_table: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    softmax_scale: float | None = None
    causal: bool = False  # from here on: causal and no window beside it
    window_size: Sequence[int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    scheduler_metadata: Tensor | None = None
    num_splits: int = 1
    out: Tensor | None = None  # the result goes there
    is_cache: bool = False  # k and v live on; a copy of them is never free

    def __post_init__(self) -> None:
        left, right = sides_of(self.window_size, self.causal)
        set_field = functools.partial(object.__setattr__, self)
        set_field("window_size", (left, right))
        set_field("causal", left < 0 and right == 0)
        if self.softmax_scale is None:
            width = self.headdim + (0 if self.qv is None else self.headdim_v)
            set_field("softmax_scale", width**-0.5)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def batch_size(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else int(self.cu_seqlens_q.shape[0]) - 1

    @property
    def seqlen_q(self) -> int:
        """Rows of q of every sequence, or the most that one has."""
        return self.q.shape[1] if self.cu_seqlens_q is None else int(self.max_seqlen_q or 0)

    @property
    def is_empty(self) -> bool:
        return 0 in (self.batch_size, self.seqlen_q, self.q.numel(), self.k.numel())

    @property
    def nheads(self) -> int:
        return self.q.shape[-2]

    @property
    def nheads_k(self) -> int:
        return self.k.shape[-2]

    @property
    def headdim(self) -> int:
        return self.q.shape[-1]

    @property
    def headdim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def is_local(self) -> bool:
        """A window that is not the causal mask."""
        return not self.causal and max(self.window_size) >= 0

    @property
    def is_fp8(self) -> bool:
        return self.q.dtype == torch.float8_e4m3fn

    @property
    def is_narrow(self) -> bool:
        """Whether k and v have 8 bits, be it beside such a q or a wider one."""
        return self.k.dtype in NARROW

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_fp8 else self.q.dtype

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """0 and -inf, as where no row sees a key."""
        *batch, rows, nheads, _ = self.q.shape
        out = self.q.new_zeros((*batch, rows, nheads, self.headdim_v), dtype=self.out_dtype)
        lse = self.q.new_full((*batch, nheads, rows), float("-inf"), dtype=torch.float32)
        return out, lse


@dataclass(frozen=True, eq=False)
class Gradient(Request):
    """The gradients of a dense or packed attention, from its results."""

    served: ClassVar[str | None] = "backward served"

    call: Attention
    dout: Tensor
    out: Tensor
    softmax_lse: Tensor
    dsoftmax_lse: Tensor | None = None
    deterministic: bool = False

    @classmethod
    def of(cls, op: Any, given: Mapping[str, Any], **more: Any) -> Gradient:
        its_own = {field: given[name] for field, name in arguments_of(cls, op)}  # type: ignore[arg-type]
        call = {f: given[name] for f, name in arguments_of(Attention, op) if f not in its_own}
        return cls(call=Attention(**call), **its_own, **more)

    @property
    def device(self) -> torch.device:
        return self.dout.device

    @property
    def is_empty(self) -> bool:
        return self.call.is_empty

    def empty_results(self) -> tuple[Tensor, Tensor, Tensor]:
        call = self.call
        return torch.zeros_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)


@dataclass(frozen=True, eq=False)
class Append(Request):
    """New keys and values for a cache: k, v (batch_size, seqlen_new, nheads_k, ...), or packed by
    cu_seqlens_k_new; k is rotated first where there are tables."""

    served: ClassVar[str | None] = "append served"

    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    cache_batch_idx: Tensor | None = None
    page_table: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_seqlens: Tensor | None = None
    rotary_interleaved: bool = True
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.k_cache.device

    @property
    def batch_size(self) -> int:
        return self.cache_seqlens.shape[0]

    @property
    def capacity(self) -> int:
        """How many keys a sequence has room for."""
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return self.k_cache.shape[1] * pages


@dataclass(frozen=True, eq=False)
class Scatter(Request):
    """New keys and values for slots of a cache: k, v (num_tokens, nheads_k, ...), of which row i
    goes to slot_mapping[i], entry * rows + row of the caches (entries, rows, nheads_k, ...)."""

    served: ClassVar[str | None] = "scatter served"

    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slot_mapping: Tensor
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.k_cache.device


@dataclass(frozen=True, eq=False)
class Linear(Request):
    """x (..., in_features) times the transpose of weight (out_features, in_features), plus bias."""

    served: ClassVar[str | None] = "linear served"

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def is_empty(self) -> bool:
        return 0 in (*self.x.shape[:-1], self.weight.shape[0])

    def empty_results(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.weight.shape[0]))


@dataclass(frozen=True, eq=False)
class Rotation(Request):
    """Rows of q or k to be rotated."""

    served: ClassVar[str | None] = "rotation served"

    x: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor
    rotary_seqlens: Tensor
    cu_seqlens: Tensor | None = None
    rotary_interleaved: bool = True
    advance: bool = True

    @property
    def device(self) -> torch.device:
        return self.x.device


@dataclass(frozen=True, eq=False)
class Combination(Request):
    """Partial results to be merged by their LSE."""

    served: ClassVar[str | None] = "combination served"

    out_partial: Tensor
    lse_partial: Tensor
    out_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return self.out_partial.device


@dataclass(frozen=True, eq=False)
class Plan(Request):
    """A schedule to be made for later calls. Names and meaning are get_scheduler_metadata's."""

    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    headdim: int
    cache_seqlens: Tensor
    qkv_dtype: torch.dtype
    headdim_v: int | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    cache_leftpad: Tensor | None = None
    page_size: int | None = None
    max_seqlen_k_new: int = 0
    causal: bool = False
    window_size: Sequence[int] = (-1, -1)
    has_softcap: bool = False
    num_splits: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None

    @property
    def device(self) -> torch.device:
        return self.cache_seqlens.device


KINDS = (Append, Attention, Combination, Gradient, Linear, Plan, Rotation, Scatter)
_REQUESTS: Mapping[str, Callable[[Any, Mapping[str, Any]], Request]] = {
    "flash_attn_func": Attention.of,
    "flash_attn_func_backward": Gradient.of,
    "flash_attn_varlen_func": Attention.of,
    "flash_attn_varlen_func_backward": Gradient.of,
    "flash_attn_kvcache": functools.partial(Attention.of, is_cache=True),
    "kvcache_append_": Append.of,
    "kvcache_scatter_": Scatter.of,
    "linear": Linear.of,
    "apply_rotary": Rotation.of,
    "flash_attn_combine": Combination.of,
    "get_scheduler_metadata": Plan.of,
}


def request_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request:
    """What a call of an operator asks for."""
    return _REQUESTS[name_of(op)](op, bind(op, args, kwargs))
