"""The recorded calls of the real kernels, on NPU tensors."""

from __future__ import annotations

import pytest
from npu_calls import assert_close, assert_lse, to_cpu
from test_golden import CASES, FOLDER

import fa3_ops
from fa3_ops.testing import FunctionCall, recorded_calls

NPU = list(recorded_calls(FOLDER / "npu_v3.safetensors"))
# What flash_attn_npu cannot be given; it serves all the others.
OTHERS = {
    "fused_infer_attention": ["paged_d192_dv128"],
    "torch": [
        *("dense_qv_causal0", "dense_qv_causal1", "qv_mla", "paged_qv_mla"),
        *("alibi_causal0_batch0", "alibi_causal0_batch1"),
        *("alibi_causal1_batch0", "alibi_causal1_batch1"),
    ],
}


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize("call", CASES, ids=lambda call: call.name)
def test_recorded_calls_of_an_h100(call: FunctionCall) -> None:
    arguments = call.fresh("npu")
    out, softmax_lse = call.function(**arguments)
    assert call.disagreements(*to_cpu(out, softmax_lse), arguments) == []


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
def test_explain_names_the_path_of_each() -> None:
    served: dict[str, list[str]] = {}
    for call in CASES:
        explanation = fa3_ops.explain(call.function, **call.fresh("npu"))
        served.setdefault(explanation.backend, []).append(call.name)
    assert len(served.pop("flash_attn_npu")) == 69
    assert served == OTHERS


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize("call", NPU, ids=lambda call: call.name)
def test_the_51_calls_of_the_real_npu_kernel_give_what_was_meant(call: FunctionCall) -> None:
    """Also the 12 of which the kernel itself makes a silent error."""
    if call.name == "page_table_strided_rows":
        call.arguments["page_table"] = call.arguments["page_table"][:, :5]
    if call.name == "strided_cache_contents":
        for name in ("k_cache", "v_cache"):
            call.arguments[name] = call.arguments[name][:, :64]
    want, want_lse, _ = call.exact()
    out, softmax_lse = call.function(**call.fresh("npu"))
    assert_close(out, want, call.arguments["q"].dtype)
    assert_lse(softmax_lse, want_lse, call.arguments["q"].dtype)
