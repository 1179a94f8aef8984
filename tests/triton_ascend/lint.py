"""What Triton-Ascend takes without a word and an Ascend 910B does badly, or not at all.

The dtypes and operations are those of Triton-Ascend's table of what its operators support
(docs/sources/python-api/outline.md of its repository) and of what AscendNPU-IR converts
(bishengir/lib/Conversion/MathToHFusion/MathToHFusion.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlir import Function, Operation

# Triton-Ascend marks the loops that it makes of an access which is no rectangle of strides.
SCATTERED = "ExtractedLoadOrStore"
TRANSPOSED = "MayImplicitTransposeWithLastAxis"
PRODUCTS = ("linalg.matmul", "linalg.batch_matmul")
UNSIGNED = ("divui", "remui", "maxui", "minui", "fptoui", "uitofp", "shrui", "ult", "ule", "ugt")
MATH = {"exp", "exp2", "log", "log2", "absf", "absi", "ceil", "floor", "sqrt", "rsqrt", "fma"}
NOT_OF_64_BITS = ("arith.select", "linalg.transpose", "arith.remsi")


@dataclass(frozen=True)
class Finding:
    kind: str
    text: str
    among_products: bool = False  # it stands in a loop over blocks of keys, and costs every time

    def __str__(self) -> str:
        where = ", in a loop of products" if self.among_products else ""
        return f"{self.kind}: {self.text}{where}"


def lint(text: str) -> list[Finding]:
    """Everything that is wrong with a kernel's ttadapter; empty if it is clean."""
    function = Function(text)
    return list(dict.fromkeys(finding for check in _CHECKS for finding in check(function)))


def _residual(function: Function) -> Iterator[Finding]:
    for op in function.operations:
        if op.name.startswith(("tt.", "triton_gpu.", "ttg.")):
            yield Finding("residual", f"{op.name} is left")


def _assembly(function: Function) -> Iterator[Finding]:
    for op in function.operations:
        if "inline_asm" in op.text:
            yield Finding("assembly", op.name)


def _atomic(function: Function) -> Iterator[Finding]:
    for op in function.operations:
        if "atomic" in op.name or "AtomicRMW" in op.text or "AtomicCAS" in op.text:
            yield Finding("atomic", op.name)


def _types(function: Function) -> Iterator[Finding]:
    """A 910B has no fp64 and no fp8, and of 64-bit integers not every operation."""
    for op in function.operations:
        for element in re.findall(r"(?:\b|x)(f64|f8E\w+)\b", op.text):
            yield Finding("type", element)
        wide = op.results and op.result.type is not None and op.result.type.element == "i64"
        if wide and op.name in NOT_OF_64_BITS:
            yield Finding("type", f"{op.name} of i64")


def _operations(function: Function) -> Iterator[Finding]:
    """Numbers go to the scalar unit, which has them all; of bools, i1, there are no signs."""
    for op in function.operations:
        if not (op.results and op.result.type is not None) or "i1>" in op.text:
            continue
        dialect, _, name = op.name.partition(".")
        if dialect == "math" and name not in MATH:
            yield Finding("operation", op.name)
        if dialect == "arith" and any(re.search(rf"\b{u}\b", op.text) for u in UNSIGNED):
            yield Finding("operation", f"{op.name} of unsigned numbers")


def _scattered(function: Function) -> Iterator[Finding]:
    """Accesses made row by row, or element by element, which is slower by orders of magnitude."""
    for op in function.named("memref.copy", "bufferization.materialize_in_destination"):
        if any(SCATTERED in region.attributes for region in op.regions):
            moved = op.operands[0].type
            assert moved is not None, op.text
            kind = "scattered elements" if moved.size == 1 else "scattered rows"
            how = "element by element" if moved.size == 1 else f"by rows of {moved.size}"
            what = "loaded" if op.name == "memref.copy" else "stored"
            yield Finding(kind, f"{what} {how}", _among_products(function, op))


def _read_modify_write(function: Function) -> Iterator[Finding]:
    """A masked store whose mask is no rectangle reads the whole tile, changes it and writes all of
    it back: what another program stored there in the meantime is lost."""
    read = {}
    for op in function.named("memref.copy"):
        source, destination = op.operands[:2]
        read[destination.root] = source.root
    for op in function.named("bufferization.materialize_in_destination"):
        made, destination = op.operands[:2]
        chosen = made.producer
        if chosen is None or chosen.name != "arith.select":
            continue
        if any(read.get(value.root) is destination.root for value in chosen.operands):
            size = chosen.result.type
            yield Finding("read-modify-write", f"of a tile {size.shape if size else ()}")


def _strided(function: Function) -> Iterator[Finding]:
    """Accesses whose last axis is not contiguous, which transpose or take single elements."""
    for op in function.operations:
        view = re.search(r"sizes: \[(.*?)\], strides: \[(.*?)\]", op.text)
        if view is not None and view[1].split(", ")[-1] != "1" and view[2].split(", ")[-1] != "1":
            yield Finding("strided", f"an access of [{view[1]}] elements")
        if TRANSPOSED in op.text:
            yield Finding("strided", op.name)


def _among_products(function: Function, op: Operation) -> bool:
    """Whether it is in the innermost loop of a product, which goes over blocks of keys."""
    return any(set(product.loops[-1:]) & set(op.loops) for product in function.named(*PRODUCTS))


_CHECKS: list[Callable[[Function], Iterator[Finding]]] = [
    _residual,
    _assembly,
    _atomic,
    _types,
    _operations,
    _scattered,
    _read_modify_write,
    _strided,
]
