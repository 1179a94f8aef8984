"""The text of one function in MLIR as a list of operations, as far as a lint and an estimate need.

MLIR prints one operation a line; a region opens with a brace at a line's end and closes with one at
a line's start, where the attributes of a loop are. Names are a region's own: its neighbour may use
them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

_OPERATION = re.compile(r'(?:(?P<results>%[^=]*?) = )?"?(?P<name>[a-zA-Z_]+\.[\w.]+)')
_TYPE = re.compile(r"(?:tensor|memref)<((?:(?:\d+|\?)x)*)([a-zA-Z]\w*)")
_NAME = re.compile(r"%\w+(?:#\d+)?")
_CARRIED = re.compile(r"iter_args\((.*?)\) ->|scf\.while \((.*?)\) :")
# Which hand on what their first operand holds.
VIEWS = {
    "bufferization.to_tensor",
    "memref.memory_space_cast",
    "memref.reinterpret_cast",
    "memref.subview",
    "tensor.collapse_shape",
    "tensor.expand_shape",
    "tensor.extract_slice",
    "tensor.reshape",
}
# Whose results are numbers, whatever they are made of.
_NUMBERS = {"memref.load", "memref.dim", "tensor.extract", "tensor.dim"}


@dataclass(frozen=True)
class Type:
    """Of a tensor or a buffer; a size that varies is 0."""

    shape: tuple[int, ...]
    element: str

    @staticmethod
    def all_of(text: str) -> list[Type]:
        return [
            Type(tuple(int(s.replace("?", "0")) for s in sizes.split("x")[:-1]), element)
            for sizes, element in _TYPE.findall(text)
        ]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * max(int(re.sub(r"\D", "", self.element) or 64) // 8, 1)


@dataclass(eq=False)
class Value:
    type: Type | None = None  # None: a number
    producer: Operation | None = None  # None: an argument of the function or of a region

    @property
    def root(self) -> Value:
        """The value that this is a view of."""
        value = self
        while value.producer is not None and value.producer.name in VIEWS:
            value = value.producer.operands[0]
        return value


@dataclass(eq=False)
class Region:
    """What stands between an operation's brace and the closing one."""

    begin: int
    opening: str
    end: int = 0
    attributes: str = ""  # behind the closing brace
    carried: list[tuple[Value, Value]] = field(default_factory=list)  # a loop's, and their first

    @property
    def is_loop(self) -> bool:
        return "scf.for " in self.opening or "scf.while " in self.opening


@dataclass(eq=False)
class Operation:
    line: int
    name: str
    text: str
    operands: list[Value]
    regions: list[Region]  # that it stands in, outermost first
    results: list[Value] = field(default_factory=list)

    @property
    def result(self) -> Value:
        return self.results[0]

    @property
    def loops(self) -> list[Region]:
        return [region for region in self.regions if region.is_loop]


class Function:
    """The operations of a module with one function, in order."""

    def __init__(self, text: str) -> None:
        self.operations: list[Operation] = []
        self.regions: list[Region] = []
        self._open: list[Region] = []
        self._scopes: list[dict[str, Value]] = [{}]
        self._users: dict[Value, list[Operation]] = {}
        for number, line in enumerate(text.splitlines()):
            self._read(number, line.strip())

    def named(self, *names: str) -> Iterator[Operation]:
        return (op for op in self.operations if op.name in names)

    def users_of_root(self, value: Value) -> list[Operation]:
        """What works on a value or on a view of it."""
        return self._users.get(value, [])

    def end(self, operation: Operation) -> int:
        """The line that closes its last region."""
        line = operation.line
        for region in self.regions:  # an else begins where the region before it ends
            if region.begin == line:
                line = region.end
        return line

    def _read(self, number: int, line: str) -> None:
        if line.startswith("}"):
            closed = self._open.pop()
            closed.end, closed.attributes = number, line.lstrip("} ")
            self._scopes.pop()
        found = _OPERATION.match(line)
        if found is not None:
            self._add(number, line, found["name"], found["results"] or "")
        if line.endswith("{"):
            self._enter(Region(number, line))

    def _add(self, number: int, line: str, name: str, results: str) -> None:
        names = _expanded(results)
        rest = line[len(results) :]
        operands = [v for v in map(self._value, _NAME.findall(rest)) if v is not None]
        operation = Operation(number, name, line, operands, list(self._open))
        types = _result_types(rest, name) or [None] * len(names)
        operation.results = [Value(t, operation) for t in types[: len(names)]]
        self._scopes[-1].update(zip(names, operation.results, strict=False))
        self.operations.append(operation)
        for value in {v.root for v in operation.operands}:
            self._users.setdefault(value, []).append(operation)

    def _value(self, name: str) -> Value | None:
        return next((s[name] for s in reversed(self._scopes) if name in s), None)

    def _enter(self, region: Region) -> None:
        scope: dict[str, Value] = {}
        if "func.func" in region.opening:
            arguments = re.findall(r"(%\w+): (\S+)", region.opening)
            scope = {name: Value(next(iter(Type.all_of(t)), None)) for name, t in arguments}
        carried = _CARRIED.search(region.opening)
        if carried is not None:
            for pair in (carried[1] or carried[2]).split(", "):
                name, first = pair.split(" = ")
                begins_as = self._value(first)
                assert begins_as is not None, region.opening
                scope[name] = Value(begins_as.type)
                region.carried.append((scope[name], begins_as))
        self._scopes.append(scope)
        self._open.append(region)
        self.regions.append(region)


def _expanded(results: str) -> list[str]:
    """%0, %1 as they are; %0:2 is %0#0 and %0#1."""
    many = re.fullmatch(r"(%\w+):(\d+)", results)
    if many is not None:
        return [f"{many[1]}#{i}" for i in range(int(many[2]))]
    return [name for name in results.split(", ") if name]


def _result_types(text: str, name: str) -> list[Type | None]:
    """Those behind the arrow; without one the last that is named, which is that of all operands or
    of what is written to."""
    if name in _NUMBERS:
        return []
    listed = re.search(r"-> \((.*?)\)(?: |$)", text)
    if listed is not None:
        return [next(iter(Type.all_of(t)), None) for t in re.split(r", (?![^<]*>)", listed[1])]
    types = Type.all_of(text)
    if types and name in ("arith.cmpi", "arith.cmpf"):
        return [Type(types[-1].shape, "i1")]
    return list(types[-1:])
