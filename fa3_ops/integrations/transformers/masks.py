"""transformers' masks in the form that our operators take them: intervals.

transformers asks for a mask once per forward pass and kind of layer, and hands the answer to each
layer's attention. A tensor of 4 dimensions is left as it is on the way, even where masks are made
twice (`generate` makes them, and the model again). The answer is one of

    None: every row counts, and so does every key that causality and the window let it see;
    intervals, (batch_size, 4, 1, 1) int32: of each sequence the fields of Intervals;
    offsets, (1, 1, 1, n + 1) int32: cu_seqlens of n sequences, packed into the rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function


class Intervals(NamedTuple):
    """Of each sequence, (batch_size,) each: how many rows of q there are up to its last, which keys
    are its own, and the position in it of the first of these: 0, or how many a cache has dropped.
    Its last row stands beside its last key; rows before its first key see none."""

    q_rows: Tensor
    k_first: Tensor
    k_stop: Tensor
    k_start: Tensor


def is_intervals(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.shape[1:] == (len(Intervals._fields), 1, 1)


def is_offsets(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[:3] == (1, 1, 1)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """transformers' mask interface. Row i of q stands at position q_offset + i, key j at position
    kv_offset + j of a row of the batch, of which attention_mask, (batch_size, positions) bool,
    says which are padding. allow_is_bidirectional_skip comes with bidirectional masks alone.

    Raises NotImplementedError for a mask that is not one interval of keys for each row.
    """
    if use_vmap:
        raise NotImplementedError(
            "fa3npu: or_mask_function and and_mask_function make masks that are not intervals"
        )
    bidirectional = allow_is_bidirectional_skip is not None
    asked = Asked(
        *(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, local_size),
        *(bidirectional, torch.device(device)),
    )
    # transformers allows no skip where it saw position_ids of packed sequences, or cannot tell.
    may_pack = attention_mask is None and not allow_is_causal_skip
    starts = asked.starts() if may_pack else None
    if not torch.compiler.is_compiling():
        asked.refuse_other_than_intervals(starts)
    offsets = None if starts is None else packed_offsets(starts)
    if offsets is not None:
        return offsets
    may_skip = allow_is_bidirectional_skip if bidirectional else allow_is_causal_skip
    return _intervals(asked, attention_mask, bool(may_skip))


class Asked(NamedTuple):
    """What transformers asks for a mask of."""

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int | Tensor
    kv_offset: int
    mask_function: Callable[..., Tensor]
    local_size: int | None
    bidirectional: bool
    device: torch.device

    def sees(self, rows: Tensor, keys: Tensor) -> Tensor:
        """(batch_size, rows) bool: whether these positions see those, padding aside."""
        sequences = torch.arange(self.batch_size, device=self.device)[:, None]
        return self.mask_function(sequences, 0, rows, keys).expand(self.batch_size, rows.shape[-1])

    def starts(self) -> Tensor | None:
        """(batch_size, q_length) bool: the tokens that do not see the one before them, where a
        packed sequence begins; None where none can."""
        whole = not isinstance(self.q_offset, Tensor) and self.q_offset == 0
        if self.bidirectional or not whole or self.q_length != self.kv_length:
            return None
        rows = torch.arange(1, self.q_length, device=self.device)[None]
        return F.pad(~self.sees(rows, rows - 1), (1, 0), value=True)

    def refuse_other_than_intervals(self, starts: Tensor | None) -> None:
        """Asks the mask at both ends of each row's interval, on the inside and on the outside."""
        if self.mask_function in (causal_mask_function, bidirectional_mask_function):
            return
        rows = torch.arange(self.q_length, device=self.device)[None] + self.q_offset
        begin, end = self.kv_offset, self.kv_offset + self.kv_length - 1
        low, high = torch.full_like(rows, begin), rows
        if starts is not None:
            low = torch.where(starts, rows, 0).cummax(1).values
        if self.bidirectional:
            high = torch.full_like(rows, end)
        if self.local_size is not None:
            reach = self.local_size if self.bidirectional else self.local_size - 1
            low, high = low.maximum(rows - reach), high.minimum(rows + reach)
        inside = self.sees(rows, low) & self.sees(rows, high)
        before = (low > begin) & self.sees(rows, (low - 1).clamp(min=begin))
        behind = (high < end) & self.sees(rows, (high + 1).clamp(max=end))
        if bool((~inside | before | behind).any()):
            raise NotImplementedError(
                "fa3npu: a mask that is not one interval of keys for each row, such as chunked "
                "attention, or images whose tokens see each other in a causal text"
            )


def packed_offsets(starts: Tensor) -> Tensor | None:
    """The offsets of the sequences that begin at these of (batch_size, seqlen) tokens; None if each
    row is one. A compiled graph has no number of sequences: there it is that of all tokens, the
    rest of the sequences being empty."""
    if not torch.compiler.is_compiling() and not bool(starts[:, 1:].any()):
        return None
    starts, total = starts.flatten(), starts.numel()
    if torch.compiler.is_compiling():
        rows = torch.arange(total, device=starts.device)
        begins = torch.where(starts, rows, total).sort().values
    else:
        begins = starts.nonzero().flatten()
    return F.pad(begins, (0, 1), value=total).int()[None, None, None]


def _intervals(asked: Asked, attention_mask: Tensor | None, may_skip: bool) -> Tensor | None:
    zero = torch.zeros(asked.batch_size, dtype=torch.int64, device=asked.device)
    shift = asked.q_offset - asked.kv_offset  # the key beside the first row
    limit = asked.kv_length if asked.bidirectional else shift + asked.q_length
    if attention_mask is None or _is_whole(attention_mask, asked.kv_offset + limit):
        if may_skip and asked.kv_offset == 0 and _is_int(limit, asked.kv_length):
            return None
        first, stop = zero, zero + (asked.kv_offset + limit)
    else:
        first, stop = _padding(attention_mask)
    k_stop = (stop - asked.kv_offset).minimum(zero + limit).clamp(min=0)
    k_first = (first - asked.kv_offset).clamp(min=0).minimum(k_stop)
    k_start = (asked.kv_offset - first).clamp(min=0)
    if asked.bidirectional and asked.local_size is None:
        q_rows = zero + asked.q_length
    else:
        q_rows = (k_stop - shift).clamp(min=0)
    intervals = Intervals(q_rows, k_first, k_stop, k_start)
    return torch.stack(intervals, 1).int()[..., None, None]


def _is_int(limit: int | Tensor, value: int) -> bool:
    """A static cache's length is a tensor, whose value would have to be waited for."""
    return not isinstance(limit, Tensor) and limit == value


def _is_whole(attention_mask: Tensor, positions: int | Tensor) -> bool:
    """Whether no position is padding; False where that would have to be traced."""
    if torch.compiler.is_compiling() or isinstance(positions, Tensor):
        return False
    return attention_mask.shape[1] >= positions and bool(attention_mask.all())


def _padding(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first position of each sequence and the one behind its last, (batch_size,) each."""
    if attention_mask.dim() != 2:
        raise NotImplementedError(
            f"fa3npu: attention_mask must have shape (batch_size, positions), got "
            f"{tuple(attention_mask.shape)}"
        )
    live = attention_mask.bool()
    positions = torch.arange(live.shape[1], device=live.device)
    stop = torch.where(live, positions + 1, 0).amax(1)
    first = torch.where(live, positions, stop[:, None]).amin(1)
    if not torch.compiler.is_compiling() and bool((live.sum(1) != stop - first).any()):
        raise NotImplementedError(
            "fa3npu: attention_mask must be one run of ones in each row, padding left and right of "
            "it; got a row with zeros in between"
        )
    return first, stop
