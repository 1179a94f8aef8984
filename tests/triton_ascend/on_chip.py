"""An estimate of the on-chip memory that a kernel needs on an Ascend 910B, from its ttadapter.

An AI core of a 910B is a cube core for products and two vector cores for the rest. The sizes are
those of bishengir/include/bishengir/Dialect/HACC/Targets/NPUTargetSpec.td in AscendNPU-IR, the
public part of CANN's compiler. How it fills them is in PlanMemory.md, AutoSubtiling.md and
CVOptimization.md under docs/source/en/developer_guide/features there, and in MarkMultiBuffer.cpp:

- a vector core's tensors are in its unified buffer (UB), what a product is made of is in L1, what
  it gives in L0C; between the two kinds of cores everything goes through global memory;
- a buffer lives from its first write to its last read, starts at a multiple of 32 bytes (512 in
  L0C), and is taken over by the result of an elementwise operation that reads it last;
- what is loaded in a loop has two buffers, so that loading and computing overlap.

Where a kernel has products, the compiler tries to give each vector core half of the rows, and gives
one of them all if it cannot: that it can is not counted on. What its own operations need besides
(a broadcast, a cast) is not counted, and neither are tensors of one number, because its
instructions take numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mlir import VIEWS, Function, Operation, Region, Value

UB, L1, L0C = 192 * 1024, 512 * 1024, 128 * 1024
PRODUCTS = ("linalg.matmul", "linalg.batch_matmul")
# Without memory of their own: one number, and where something is put later.
FREE = ("tensor.empty", "linalg.fill", "arith.constant")
BRANCHES = ("scf.for", "scf.while", "scf.if")


@dataclass(frozen=True)
class Demand:
    """Bytes, the most at any time."""

    ub: int
    l1: int
    l0c: int

    @property
    def fits(self) -> bool:
        return self.ub <= UB and self.l1 <= L1 and self.l0c <= L0C

    def __str__(self) -> str:
        parts = (("UB", self.ub, UB), ("L1", self.l1, L1), ("L0C", self.l0c, L0C))
        return ", ".join(f"{name} {n / 1024:.0f} of {most // 1024} KiB" for name, n, most in parts)


@dataclass(frozen=True)
class Buffer:
    first: int  # line of its first write
    last: int  # line of its last read
    bytes: int


def demand(text: str) -> Demand:
    """Of a kernel's ttadapter."""
    lives = Lives(Function(text))
    made = (Buffer(op.line, op.line, _aligned(op.result, 512)) for op in lives.products)
    return Demand(
        ub=_peak([*lives.computed_with(), *lives.handed_on()]),
        l1=_peak(lives.multiplied()),
        l0c=_peak(made),
    )


class Lives:
    """When the tensors of a function are in which memory."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.products = list(function.named(*PRODUCTS))
        factors = {value.root for op in self.products for value in op.operands[:2]}
        # How a factor is read from L1 transposes it.
        self.turned = {
            op.result: op.operands[0].root
            for op in function.named("linalg.transpose")
            if op.result in factors
        }
        self.factors = {self.turned.get(value, value) for value in factors}

    def multiplied(self) -> Iterator[Buffer]:
        """What products are made of, in L1."""
        for value in self.factors:
            seen_as = [value, *(turned for turned, of in self.turned.items() if of is value)]
            if value.producer is not None:
                last = max(self.last_read(v) for v in seen_as)
                size = _aligned(value, 32) * _copies(value.producer)
                yield Buffer(value.producer.line, last, size)

    def computed_with(self) -> Iterator[Buffer]:
        """What the vector cores load, get from products and make, in UB."""
        elsewhere = (*FREE, *BRANCHES, *VIEWS)
        for op in self.function.operations:
            if op.name in elsewhere or _is_one_number(op):
                continue
            for value in op.results:
                if value.type is not None and not self.goes_to_l1(value):
                    arrives = op.name in ("memref.alloc", *PRODUCTS)
                    yield self.buffer(value, op.line, _copies(op) if arrives else 1)

    def handed_on(self) -> Iterator[Buffer]:
        """What a loop hands to its next round, until the round has its own, and what it leaves."""
        for region in self.function.regions:
            for value, _ in region.carried:
                if value.type is not None:
                    yield self.buffer(value, region.begin)
        for op in self.function.named(*BRANCHES):
            for value in op.results:
                if value.type is not None:
                    yield self.buffer(value, self.function.end(op))

    def buffer(self, value: Value, first: int, copies: int = 1) -> Buffer:
        last = self.last_read(value)
        if self.is_taken_over(value, last):
            last -= 1
        return Buffer(first, max(first, last), _aligned(value, 32) * copies)

    def last_read(self, value: Value) -> int:
        """In a loop around which it is made, at the loop's end: the next round reads it again."""
        last = 0
        for user in self.function.users_of_root(value):
            around = [loop for loop in user.loops if not _is_made_in(value, loop)]
            last = max(last, around[0].end if around else user.line)
        return last

    def is_taken_over(self, value: Value, last: int) -> bool:
        """Whether the result of the operation that reads it last may lie where it lies."""
        for user in self.function.users_of_root(value):
            if user.line == last and user.name.startswith(("arith.", "math.")):
                size = user.result.type.bytes if user.result.type else 0
                ending = (v.root for v in user.operands if v.type and v.type.bytes == size)
                return value is next((v for v in ending if self.last_read(v) == last), None)
        return False

    def goes_to_l1(self, value: Value) -> bool:
        """Whether nothing but products has to do with it."""
        if value in self.turned:
            return True
        passed = (*PRODUCTS, "linalg.transpose", "memref.copy", "linalg.fill", *VIEWS)
        loaded = value.producer is not None and value.producer.name == "memref.alloc"
        users = self.function.users_of_root(value)
        return value in self.factors and loaded and all(user.name in passed for user in users)


def _is_made_in(value: Value, region: Region) -> bool:
    if any(value is carried for carried, _ in region.carried):
        return True
    return value.producer is not None and region in value.producer.regions


def _is_one_number(op: Operation) -> bool:
    made_of = op.operands[0].root.producer if op.operands else None
    return op.name == "linalg.broadcast" and made_of is not None and made_of.name in FREE


def _copies(op: Operation) -> int:
    return 2 if op.loops else 1


def _aligned(value: Value, to: int) -> int:
    assert value.type is not None
    return -(-value.type.bytes // to) * to


def _peak(buffers: Iterable[Buffer]) -> int:
    held = list(buffers)
    at_once = (sum(b.bytes for b in held if b.first <= at.first <= b.last) for at in held)
    return max(at_once, default=0)
