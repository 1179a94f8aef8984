"""Definitions of GE operators, read from the docstrings of torchair's own operator functions."""

import re
from functools import cache

from .build import TORCH_NPU

# The operators that torchair's ge.custom_op can name without an operator package of the user's.
REGISTERED = ("FusedInferAttentionScore", "ScatterPaKvCache")

_FIELD = re.compile(r"\.(?P<kind>[A-Z_]+)\((?P<name>\w+)(?:,\s*(?P<type>\w+))?")
_INPUTS = {"INPUT": "required", "OPTIONAL_INPUT": "optional", "DYNAMIC_INPUT": "dynamic"}
_OUTPUTS = {"OUTPUT": "required", "DYNAMIC_OUTPUT": "dynamic"}
_ATTRS = {
    "Int": "VT_INT",
    "Float": "VT_FLOAT",
    "Bool": "VT_BOOL",
    "String": "VT_STRING",
    "Type": "VT_DATA_TYPE",
    "ListInt": "VT_LIST_INT",
    "ListFloat": "VT_LIST_FLOAT",
    "ListBool": "VT_LIST_BOOL",
    "ListString": "VT_LIST_STRING",
    "ListType": "VT_LIST_DATA_TYPE",
    "ListListInt": "VT_LIST_LIST_INT",
}


@cache
def _torchair_operators() -> str:
    folder = TORCH_NPU / "dynamo" / "torchair" / "_ge_concrete_graph"
    return (folder / "auto_generated_ge_raw_ops.py").read_text()


def definition(op: str) -> dict[str, dict[str, str]]:
    """Inputs, outputs and attrs of an operator of CANN, in order, as register_ir takes them."""
    _, found, rest = _torchair_operators().partition(f'"""REG_OP({op})')
    if not found:
        raise KeyError(f"torchair knows no operator {op}")
    fields: dict[str, dict[str, str]] = {"inputs": {}, "outputs": {}, "attrs": {}}
    for field in _FIELD.finditer(rest.partition('"""')[0]):
        kind, name = field["kind"], field["name"]
        if kind in _INPUTS:
            fields["inputs"][name] = _INPUTS[kind]
        elif kind in _OUTPUTS:
            fields["outputs"][name] = _OUTPUTS[kind]
        elif kind in ("ATTR", "REQUIRED_ATTR"):
            fields["attrs"][name] = _ATTRS[field["type"]]
    return fields
