"""What fuzz.py calls a fault, with operators that commit one each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fuzz import Fault, check
from garbage import Calls
from sample_inputs import rand
from torch import Tensor

from fa3_ops.testing import sample_calls


def refuses(x: Tensor, cache: Tensor) -> None:
    raise ValueError("x must be better")


def writes_and_refuses(x: Tensor, cache: Tensor) -> None:
    cache.zero_()
    raise ValueError("x must be better")


def writes_its_input(x: Tensor, cache: Tensor) -> None:
    x.zero_()


def writes_around(x: Tensor, cache: Tensor) -> None:
    torch.as_strided(cache, (1,), (1,), 0).zero_()


def reads_as_if_contiguous(x: Tensor, cache: Tensor) -> None:
    cache.copy_(x.as_strided(x.shape, (3, 1), x.storage_offset()))


def stumbles(x: Tensor, cache: Tensor) -> None:
    raise KeyError("x")


def serves(x: Tensor, cache: Tensor) -> None:
    cache.copy_(x)


@pytest.fixture
def library() -> Iterator[Any]:
    with torch.library._scoped_library("fa3npu_fuzz", "DEF") as library:
        library.define("op_(Tensor x, Tensor(a!) cache) -> ()")
        yield library


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (writes_and_refuses, "was refused and has written"),
        (writes_its_input, "wrote where the schema says nothing of it"),
        (writes_around, "wrote where the schema says nothing of it"),
        (reads_as_if_contiguous, "gives other bits with contiguous copies"),
        (stumbles, "raised KeyError"),
    ],
)
def test_faults(library: Any, kernel: Any, fault: str) -> None:
    library.impl("op_", kernel, "CPU")
    call = {"x": rand(3, 2).t(), "cache": rand(4, 3)[1:3]}
    with pytest.raises(Fault, match=fault):
        check(torch.ops.fa3npu_fuzz.op_.default, call)


@pytest.mark.parametrize(("kernel", "served"), [(refuses, False), (serves, True)])
def test_no_fault(library: Any, kernel: Any, served: bool) -> None:
    library.impl("op_", kernel, "CPU")
    call = {"x": rand(3, 2).t(), "cache": rand(4, 3)[1:3]}
    assert check(torch.ops.fa3npu_fuzz.op_.default, call) is served


def test_every_operator_is_called_and_a_seed_is_one_call() -> None:
    calls = Calls()
    made = [calls.make(seed) for seed in range(300)]
    assert {op for op, _, _ in made} == {call.operator for call in sample_calls()}
    again = Calls().make(299)
    assert again[0] is made[299][0]
    assert again[2] == made[299][2]
