"""linear in any number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fa3_ops
from fa3_ops.tools.consistency.case import Case, Pair


def rows_of_linear(case: Case) -> Iterator[Pair]:
    """Rows of all sequences together, of each alone, of one token, and in other strides; and what
    the transposed weight makes of them, as in a backward."""
    weight = torch.cat(case.k).flatten(1)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        out: Tensor = case.call(fa3_ops.linear, x, weight)
        return out, case.call(fa3_ops.linear, out, weight.mT)

    inputs = [x.flatten(1) for x in case.v]
    everyone = torch.cat(inputs)
    together = both(everyone)
    yield from zip(together, both(everyone.mT.contiguous().mT), strict=True)
    for result, alone in zip(together, zip(*map(both, inputs), strict=True), strict=True):
        yield result, torch.cat(alone)
    for result, last in zip(together, both(everyone[-1:]), strict=True):
        yield result[-1:], last
