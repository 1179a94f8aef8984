"""A graph of GE, read and computed.

GE itself is not emulated. Where torchair hands its finished graph to GE, `Interpreter` takes it and
computes it operator by operator, by the rules that CANN documents for its two fused operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import cann_emulator
import torch
from torch import Tensor

from fa3_ops import reference

FUSED = ("ScatterPaKvCache", "FusedInferAttentionScore")
COPIES = {"TensorMove", "Identity", "Assign"}
FAR = 2147483647
DTYPES = {
    "DT_FLOAT": torch.float32,
    "DT_FLOAT16": torch.float16,
    "DT_BF16": torch.bfloat16,
    "DT_INT32": torch.int32,
    "DT_INT64": torch.int64,
    "DT_BOOL": torch.bool,
}

cann_emulator.register_ir(
    "ScatterPaKvCache",
    dict.fromkeys(("key", "key_cache", "slot_mapping", "value", "value_cache"), "required")
    | dict.fromkeys(("compress_lens", "compress_seq_offset", "seq_lens"), "optional"),
    dict.fromkeys(("key_cache", "value_cache"), "required"),
    {"cache_mode": "VT_STRING", "scatter_mode": "VT_STRING"},
)


def constant(op: Any) -> Tensor:
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType

    value = op.attr["value"].t
    dtype, shape = DTYPES[DataType.Name(value.desc.dtype)], tuple(value.desc.shape.dim)
    if not value.data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(value.data), dtype=dtype).view(shape)


def ints(t: Tensor) -> list[int]:
    return [int(n) for n in t.tolist()]


def same_dtype(a: Tensor, b: Tensor) -> None:
    sizes = a.dim() == b.dim() == 0  # which torchair adds as they come
    assert sizes or a.dtype == b.dtype, f"GE takes one dtype, got {a.dtype} and {b.dtype}"


def binary(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(op: Any, a: Tensor, b: Tensor) -> Tensor:
        same_dtype(a, b)
        return f(a, b)

    return apply


def gather(op: Any, x: Tensor, indices: Tensor, axis: Tensor) -> Tensor:
    assert bool(((indices >= 0) & (indices < x.shape[int(axis)])).all()), "GatherV2 out of range"
    return x[(slice(None),) * int(axis) + (indices.long(),)]


def select(op: Any, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    same_dtype(x, y)
    return torch.where(condition, x, y)


def strided_slice(op: Any, x: Tensor, *begin_end_axis_step: Tensor) -> Tensor:
    begin, end, axis, step = (int(n) for n in begin_end_axis_step)
    return x[(slice(None),) * axis + (slice(begin, end, step),)]


def cast(op: Any, x: Tensor) -> Tensor:
    from torchair.ge import DataType

    return x.to(next(DTYPES[n] for n in DTYPES if getattr(DataType, n) == op.attr["dst_type"].i))


def pad(op: Any, x: Tensor, paddings: Tensor) -> Tensor:
    sides = [int(n) for before_after in paddings.flip(0) for n in before_after]
    return torch.nn.functional.pad(x, sides)


def unsqueeze(op: Any, x: Tensor) -> Tensor:
    for axis in op.attr["axes"].list.i:
        x = x.unsqueeze(axis)
    return x


def search_sorted(op: Any, cu_seqlens: Tensor, values: Tensor, sorter: None = None) -> Tensor:
    same_dtype(cu_seqlens, values)
    return torch.searchsorted(cu_seqlens, values, right=op.attr["right"].b, out_int32=True)


def as_strided(size: Tensor, stride: Tensor, offset: Tensor) -> tuple[list[int], list[int], int]:
    return ints(size), ints(stride), int(offset)


def view_copy(op: Any, x: Tensor, *layout_and_source: Tensor) -> Tensor:
    x.as_strided(*as_strided(*layout_and_source[:3])).copy_(layout_and_source[3])
    return x


def scatter(
    op: Any, k: Tensor, k_cache: Tensor, slots: Tensor, v: Tensor, v_cache: Tensor, *none: None
) -> tuple[Tensor, ...]:
    """CANN: slots in [0, num_blocks * block_size) and different; its kernel skips negative ones."""
    assert op.attr["cache_mode"].s == b"Norm"
    written = slots[slots >= 0]
    assert written.unique().numel() == written.numel()
    for x, cache in ((k, k_cache), (v, v_cache)):
        same_dtype(x, cache)
        rows = cache.view(-1, *cache.shape[2:])
        assert x.shape[1:] == rows.shape[1:]
        rows[written.long()] = x[slots >= 0]
    return k_cache, v_cache


def fused_infer_attention_score(op: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """By CANN's documentation; what it does not promise (rows without a key) is NaN and +inf."""
    given = {desc.name: x for desc, x in zip(op.input_desc, inputs, strict=True) if x is not None}
    q, k, v, rope = given["query"], given["key0"], given["value0"], given.get("query_rope")
    attr = op.attr
    packed, page_size = attr["input_layout"].s == b"TND", attr["block_size"].i
    table = given.get("block_table")
    nheads_k = attr["num_key_value_heads"].i
    ends, lengths = given.get("actual_seq_lengths"), given.get("actual_seq_lengths_kv")
    assert all(x.dtype == torch.int64 for x in (ends, lengths) if x is not None)
    if packed:
        assert q.dim() == 3
        assert ends is not None
        assert lengths is not None
        assert len(ends) == len(lengths)
        assert ends[-1] == len(q), "T must be the last of actual_seq_lengths"
        assert bool((ends.diff() >= 0).all())
        rows = [slice(a, b) for a, b in zip([0, *ints(ends)], ints(ends), strict=False)]
    else:
        assert q.dim() == 4
        assert ends is None
        rows = [slice(b * q.shape[1], (b + 1) * q.shape[1]) for b in range(len(q))]

    def keys(x: Tensor, b: int) -> Tensor:
        if table is not None:
            assert x.dim() == 3
            assert x.shape[1] == page_size
            assert lengths is not None
            assert len(table) == len(rows)
            pages = table[b, : -(-int(lengths[b]) // page_size)].long()
            return x[pages].flatten(0, 1).unflatten(-1, (nheads_k, -1))[: int(lengths[b])]
        if packed:
            assert lengths is not None
            assert lengths[-1] == len(x), "the keys' T must be the last of actual_seq_lengths_kv"
            begin = 0 if b == 0 else int(lengths[b - 1])
            return x[begin : int(lengths[b])]
        return x[b] if lengths is None else x[b, : int(lengths[b])]

    if packed and not attr["sparse_mode"].i:
        q = torch.zeros_like(q)  # reported of hardware: a uniform average, without a word
    mode, one_row = attr["sparse_mode"].i, not packed and q.shape[1] == 1 and rope is None
    left, right = attr["pre_tokens"].i, attr["next_tokens"].i
    window = (-1 if left == FAR else left, -1 if right == FAR else right)
    if mode:
        assert torch.equal(given["atten_mask"], torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    masks = {
        "causal": mode == 3 and not one_row,
        "window_size": window if mode == 4 and not one_row else (-1, -1),
    }
    flat_q = q.reshape(-1, *q.shape[-2:])
    flat_rope = None if rope is None else rope.reshape(-1, *rope.shape[-2:])
    out = torch.full(
        (*flat_q.shape[:2], (v.shape[-1] // nheads_k if table is not None else v.shape[-1])),
        torch.nan,
    )
    lse = torch.full((*flat_q.shape[:2],), torch.inf)
    assert flat_q.shape[1] == attr["num_heads"].i
    for b, r in enumerate(rows):
        if flat_rope is None:
            qk, qv = (flat_q[r], keys(k, b)), None
        else:
            assert k is v
            qk, qv = (flat_rope[r], keys(given["key_rope"], b)), flat_q[r]
        o, e = reference.attention(*qk, keys(v, b), qv=qv, softmax_scale=attr["scale"].f, **masks)
        seen = ~e.T.isneginf()
        out[r][seen], lse[r][seen] = o.float()[seen], e.T.float()[seen]
    out = out.to(q.dtype).view(*q.shape[:-1], -1)
    assert attr["softmax_lse_flag"].b
    return out, lse[..., None] if packed else lse.view(*q.shape[:3]).transpose(1, 2)[..., None]


KERNELS: dict[str, Callable[..., Any]] = {
    "Const": constant,
    "Add": binary(torch.add),
    "Sub": binary(torch.sub),
    "Mul": binary(torch.mul),
    "FloorDiv": binary(torch.floor_divide),
    "FloorMod": binary(torch.remainder),
    "Less": binary(torch.lt),
    "Minimum": binary(torch.minimum),
    "Maximum": binary(torch.maximum),
    "Range": lambda op, a, b, step: torch.arange(int(a), int(b), int(step), dtype=a.dtype),
    "Reshape": lambda op, x, shape: x.reshape(ints(shape)),
    "Shape": lambda op, x: torch.tensor(x.shape, dtype=torch.int32),
    "Gather": lambda op, x, indices: gather(op, x, indices, torch.tensor(0)),
    "GatherV2": gather,
    "SelectV2": select,
    "StridedSliceV2": strided_slice,
    "Unsqueeze": unsqueeze,
    "Squeeze": lambda op, x: x.squeeze(tuple(op.attr["axis"].list.i)),
    "SplitV": lambda op, x, sizes, axis: x.split(ints(sizes), dim=int(axis)),
    "Transpose": lambda op, x, perm: x.permute(ints(perm)),
    "Cast": cast,
    "ConcatV2": lambda op, *x: torch.cat(x[:-1], dim=int(x[-1])),
    "Pad": pad,
    "Fill": lambda op, dims, value: torch.full(ints(dims), value.item(), dtype=value.dtype),
    "SearchSorted": search_sorted,
    "MatMul": lambda op, x, y, *_: x @ (y.mT if op.attr["transpose_x2"].b else y),
    "Sigmoid": lambda op, x: x.sigmoid(),
    "Log1p": lambda op, x: x.log1p(),
    "Exp": lambda op, x: x.exp(),
    "Neg": lambda op, x: -x,
    "Abs": lambda op, x: x.abs(),
    "ClipByValueV2": lambda op, x, low, high: x.clamp(low, high),
    "IndexByTensor": lambda op, x, indices: x[indices.long()],
    "Pack": lambda op, *x: torch.stack(x, dim=op.attr["axis"].i),
    "Unpack": lambda op, x: x.unbind(op.attr["axis"].i),
    "TensorMove": lambda op, x: x.clone(),
    "AsStrided": lambda op, x, *layout: x.as_strided(*as_strided(*layout)),
    "ViewCopy": view_copy,
    "ScatterPaKvCache": scatter,
    "FusedInferAttentionScore": fused_infer_attention_score,
}
INFIX = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "FloorMod": "%", "Less": "<"}


class Interpreter:
    """In the place of torchair's binding of GE."""

    graphs: list[Interpreter]

    def __init__(self, name: str) -> None:
        self.inputs: list[Tensor] = []

    def load(self, graph: Any, options: Any) -> None:
        self.graph = graph
        self.graphs.append(self)

    def compile(self) -> None:
        pass

    def run(self, inputs: list[Tensor], assigned: list[Tensor | None], stream: Any) -> list[Tensor]:
        cann_emulator.flush()
        self.inputs = inputs
        values: dict[str, Any] = {"": None}
        for op in self.graph.op:
            refs = [name for name in op.input if not name.endswith(":-1")]  # :-1 is an order only
            if op.type in ("Data", "RefData"):
                x = inputs[op.attr["index"].i]
                values[f"{op.name}:0"] = cann_emulator.host(x) if x.device.type == "npu" else x
            elif op.type == "NetOutput":
                results = [values[name] for name in refs]
            else:
                out = KERNELS[op.type](op, *(values[name] for name in refs))
                out = out if isinstance(out, tuple) else (out,)
                values.update({f"{op.name}:{i}": x for i, x in enumerate(out)})
        given = [*assigned, *[None] * (len(results) - len(assigned))]
        return [
            x.npu() if to is None else to.copy_(x.npu())
            for x, to in zip(results, given, strict=True)
        ]

    def types(self) -> list[str]:
        return [op.type for op in self.graph.op]

    def text(self, **names: Tensor) -> str:
        """The two fused operators: attributes that are not 0, and every input as a formula; what
        formulas share has a name, _ and a number."""
        labels = {t.data_ptr(): name for name, t in names.items()}
        nodes = {op.name: op for op in self.graph.op}
        uses = Counter(ref for op in self.graph.op for ref in op.input)
        shared: dict[str, str] = {}
        lines: list[str] = []

        def formula(ref: str) -> str:
            op = nodes[ref.rpartition(":")[0]]
            if op.type in ("Data", "RefData"):
                return labels.get(self.inputs[op.attr["index"].i].data_ptr(), "size")
            if op.type == "Const":
                return str(constant(op).tolist())
            if op.name == "fa3npu_upper_triangle":
                return str(op.name)
            if op.type in FUSED:
                return ref
            if ref not in shared:
                text = joined(op.type, [formula(name) for name in op.input if name])
                if uses[ref] == 1:
                    return text
                shared[ref] = f"_{len(shared)}"
                lines.append(f"{shared[ref]} = {text}")
            return shared[ref]

        for op in self.graph.op:
            if op.type not in FUSED:
                continue
            inputs = [
                (d.name, formula(ref))
                for d, ref in zip(op.input_desc, op.input, strict=False)
                if ref
            ]
            lines += [op.name, *(f"  {name} = {text}" for name, text in inputs)]
            for name in sorted(n for n in op.attr if not n.startswith("_")):
                value = getattr(op.attr[name], op.attr[name].WhichOneof("value"))
                value = round(value, 6) if isinstance(value, float) else value
                lines += [f"  .{name} = {value}"] if value else []
        return "\n".join(lines)


def joined(op_type: str, x: list[str]) -> str:
    if op_type in INFIX:
        return f"({x[0]} {INFIX[op_type]} {x[1]})"
    if op_type == "GatherV2" and x[2] == "0":
        return f"{x[0]}[{x[1]}]"
    return f"{op_type}({', '.join(x)})"
