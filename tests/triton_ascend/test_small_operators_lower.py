"""The kernels beside attention lower for Ascend, too; no backend of the NPU starts them yet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lint import lint
from lowering import lower
from on_chip import demand
from started import started

from fa3_ops import backends
from fa3_ops.backends import triton
from fa3_ops.testing import SampleCall, sample_calls

SERVED = {
    backends.Append: triton.TritonWrites(),
    backends.Combination: triton.TritonCombination(),
    backends.Linear: triton.TritonLinear(),
    backends.Rotation: triton.TritonRotation(),
    backends.Scatter: triton.TritonWrites(),
}
OPERATORS = (
    *("kvcache_append_", "kvcache_scatter_", "linear", "apply_rotary", "flash_attn_combine"),
)
CALLS = {
    f"{call.name}-{dtype}".replace("torch.", ""): call
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for call in sample_calls(dtype=dtype)
    if call.name.startswith(OPERATORS)
}
# What is not contiguous: pairs of columns side by side; a descale, and an LSE, of every head.
STRIDED = "strided: an access of "


@pytest.fixture(autouse=True)
def served_by_triton() -> Iterator[None]:
    for kind, backend in SERVED.items():
        backends.add_backend("cpu", kind, backend)
    with backends.use_backend("triton"), torch.no_grad():
        yield
    for kind, backend in SERVED.items():
        backends.remove_backend("cpu", kind, backend)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_lowers(call: SampleCall) -> None:
    with started() as starts:
        call.operator(*call.args, **call.kwargs)
    (start,) = starts
    text = lower(start.kernel, start.signature, start.constants)
    findings = [str(finding) for finding in lint(text)]
    assert [finding for finding in findings if not finding.startswith(STRIDED)] == []
    if start.name == "linear":
        assert findings == []
    assert demand(text).fits, str(demand(text))
