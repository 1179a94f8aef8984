"""The comparisons by name, and where each must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fa3_ops.tools.consistency.batches import (
    any_batch,
    backward,
    dense_batch,
    longer_maximum,
    repeated,
)
from fa3_ops.tools.consistency.caches import (
    few_splits,
    many_splits,
    page_sizes,
    strided_caches,
    threads,
)
from fa3_ops.tools.consistency.case import Case, Pair
from fa3_ops.tools.consistency.products import rows_of_linear
from fa3_ops.tools.consistency.steps import cached_prefix, chunked_prefill, decode, whole_prefill


@dataclass(frozen=True)
class Comparison:
    name: str
    function: Callable[[Case], Iterator[Pair]]
    devices: tuple[str, ...] = ("cpu", "npu", "cuda")
    of_attention: bool = True  # compares with the expected bits; else its own with one another
    may_differ: tuple[str, ...] = ()  # devices whose kernels are documented to change bits here


COMPARISONS = (
    Comparison("the same call again", repeated),
    Comparison("alone or in any batch", any_batch),
    Comparison("dense and padded batches", dense_batch),
    Comparison("max_seqlen larger than needed", longer_maximum),
    Comparison("whole prefill", whole_prefill),
    Comparison("prefill in chunks", chunked_prefill),
    Comparison("prefix cached", cached_prefix),
    Comparison("decode token by token", decode),
    Comparison("page sizes and page order", page_sizes),
    Comparison("strided caches", strided_caches),
    Comparison("num_splits 0 and 1, scheduler_metadata", few_splits),
    Comparison("num_splits above 1", many_splits, may_differ=("npu",)),
    Comparison("1, 2 and 4 threads", threads, devices=("cpu",)),
    Comparison("backward repeated, and alone", backward, of_attention=False),
    Comparison("linear, alone or among any rows", rows_of_linear, of_attention=False),
)
