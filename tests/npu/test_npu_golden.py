"""The recorded calls of the real kernels, on NPU tensors."""

from __future__ import annotations

import pytest
from golden_cases import FOLDER, Case, check, exact, load, load_cases
from npu_calls import assert_close, assert_lse, to_cpu, to_npu

import fa3_ops

FA3 = load_cases()
NPU = load(FOLDER / "npu_v3.safetensors")
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
@pytest.mark.parametrize("case", FA3, ids=lambda case: case.name)
def test_recorded_calls_of_an_h100(case: Case) -> None:
    arguments = to_npu(case.arguments())
    out, softmax_lse = getattr(fa3_ops, case.fn)(**arguments, **case.wants_lse)
    caches = {k: x.cpu() for k, x in arguments.items() if k in ("k_cache", "v_cache")}
    check(case, *to_cpu(out, softmax_lse), caches)


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
def test_explain_names_the_path_of_each() -> None:
    served: dict[str, list[str]] = {}
    for case in FA3:
        explanation = fa3_ops.explain(getattr(fa3_ops, case.fn), **to_npu(case.arguments()))
        served.setdefault(explanation.backend, []).append(case.name)
    assert len(served.pop("flash_attn_npu")) == 69
    assert served == OTHERS


@pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning")
@pytest.mark.parametrize("case", NPU, ids=lambda case: case.name)
def test_the_51_calls_of_the_real_npu_kernel_give_what_was_meant(case: Case) -> None:
    """Also the 12 of which the kernel itself makes a silent error."""
    if case.name == "page_table_strided_rows":
        case.inputs["page_table"] = case.inputs["page_table"][:, :5]
    if case.name == "strided_cache_contents":
        for name in ("k_cache", "v_cache"):
            case.inputs[name] = case.inputs[name][:, :64]
    case.scalars = {k: v for k, v in case.scalars.items() if not k.startswith("return_")}
    want, want_lse, _ = exact(case)
    out, softmax_lse = getattr(fa3_ops, case.fn)(**to_npu(case.arguments()), **case.wants_lse)
    assert_close(out, want, case.inputs["q"].dtype)
    assert_lse(softmax_lse, want_lse, case.inputs["q"].dtype)
