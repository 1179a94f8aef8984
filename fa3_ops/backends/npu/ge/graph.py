"""Writing graphs of CANN's graph engine (GE) in Python's notation, for our torchair converters.

Two names that are not public in torchair are used: _ge_concrete_graph.ge_apis, constructors of
GE's operators that its own converters are written with, and ge._ge_graph.get_default_ge_graph, the
graph being built. What is public, torchair.ge, has custom_op, Const and Cast alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torchair._ge_concrete_graph import ge_apis as ge
from torchair.ge import DataType

GeTensor = Any


def refuse(what: str, can: str) -> NoReturn:
    raise NotImplementedError(
        f"fa3npu: torchair's GE mode cannot express {what}: {can}. "
        'Use backend="npugraph_ex", which calls the operator itself, or run eagerly.'
    )


def tensor(x: Any) -> GeTensor:
    """Numbers and lists of them become constants, int32 or float32."""
    if isinstance(x, Value):
        return x.tensor
    if isinstance(x, int | float | list):
        is_float = isinstance(x, float)
        return ge.Const(x, dtype=DataType.DT_FLOAT if is_float else DataType.DT_INT32)
    return x


def _operator(op: Callable[..., GeTensor], swap: bool = False) -> Callable[[Value, Any], Value]:
    def apply(self: Value, other: Any) -> Value:
        a, b = tensor(self), tensor(other)
        return Value(op(b, a) if swap else op(a, b))

    return apply


class Value:
    """A GE tensor with Python's operators. GE works out shapes and most dtypes by itself."""

    def __init__(self, x: Any) -> None:
        self.tensor = tensor(x)

    __add__ = __radd__ = _operator(ge.Add)
    __sub__, __rsub__ = _operator(ge.Sub), _operator(ge.Sub, swap=True)
    __mul__ = __rmul__ = _operator(ge.Mul)
    __floordiv__, __mod__ = _operator(ge.FloorDiv), _operator(ge.FloorMod)
    __lt__ = _operator(ge.Less)
    minimum, maximum = _operator(ge.Minimum), _operator(ge.Maximum)

    def __getitem__(self, index: Any) -> Value:
        """Entries of the first dimension."""
        return self.gather(index, 0)

    def gather(self, index: Any, axis: int) -> Value:
        return Value(ge.GatherV2(self.tensor, tensor(index), tensor(axis)))

    def reshape(self, *shape: int) -> Value:
        return Value(ge.Reshape(self.tensor, tensor(list(shape))))

    def of_shape(self, shape: Value) -> Value:
        return Value(ge.Reshape(self.tensor, shape.tensor))

    def insert(self, *axes: int) -> Value:
        return Value(ge.Unsqueeze(self.tensor, axes=list(axes)))

    def remove(self, *axes: int) -> Value:
        return Value(ge.Squeeze(self.tensor, axis=list(axes)))

    def transpose(self, *axes: int) -> Value:
        return Value(ge.Transpose(self.tensor, tensor(list(axes))))

    def to(self, dtype: int) -> Value:
        return Value(ge.Cast(self.tensor, dst_type=dtype))


def static(x: GeTensor, axis: int) -> int:
    """A size that has to be known: the graph is compiled again when it changes."""
    return int(x.symsize[axis])


def size(x: GeTensor, axis: int) -> Any:
    """A size: an int, or a scalar of the graph where it is symbolic."""
    n = x.symsize[axis]
    return n if isinstance(n, int) else Value(ge.Shape(x))[axis]


def arange(begin: int, end: Any) -> Value:
    return Value(ge.Range(tensor(begin), tensor(end), tensor(1)))


def int64(n: int) -> Value:
    return Value(ge.Const(n, dtype=DataType.DT_INT64))


def full_like(x: Value, value: Any) -> Value:
    return Value(ge.Fill(ge.Shape(x.tensor), tensor(value)))


def where(condition: Value, x: Any, y: Any) -> Value:
    return Value(ge.SelectV2(condition.tensor, tensor(x), tensor(y)))


def concat(*parts: Any, axis: int = 0) -> Value:
    """Numbers and scalars of the graph count as one element each, GE tensors as they are."""
    parts = tuple(Value(p).reshape(1) if isinstance(p, int | Value) else Value(p) for p in parts)
    return Value(ge.ConcatV2([p.tensor for p in parts], tensor(axis), N=len(parts)))


def by_transposed(x: Value, y: GeTensor) -> Value:
    """x y^T of matrices."""
    return Value(ge.MatMul(x.tensor, y, None, transpose_x2=True))


def framed(x: GeTensor, value: Any) -> Value:
    """(n,) with a value in front and behind: what sequence_of_row's 0 and n + 1 select."""
    return concat(value, x, value)


def without(x: GeTensor, *, first: bool) -> Value:
    """(n,) without its first or its last element."""
    begin, end = (1, 2147483647) if first else (0, -1)
    cut = ge.StridedSliceV2(x, *(tensor([n]) for n in (begin, end, 0, 1)))  # ..., axes, strides
    return Value(cut)


def sequence_of_row(cu_seqlens: GeTensor, rows: Value) -> Value:
    """1 + the sequence of each row; 0 before the first sequence, batch_size + 1 behind the last."""
    found = ge.SearchSorted(cu_seqlens, rows.tensor, None, dtype=DataType.DT_INT32, right=True)
    return Value(found)
