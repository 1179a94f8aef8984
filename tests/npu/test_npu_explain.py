"""What explain() says is what runs: the launches are looked at, on random calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launches import launches
from npu_calls import examples_of, for_kernels, on_npu, to_npu
from strategies import dense_calls, kvcache_calls, varlen_calls

import fa3_ops

pytestmark = [
    pytest.mark.filterwarnings("ignore::fa3_ops.FallbackWarning"),
    pytest.mark.usefixtures("any_kernel"),
]
ops = torch.ops.fa3npu
NAMES = st.sampled_from(
    [None, "flash_attn_npu", "fused_infer_attention", "torch", "npu_scatter_pa_kv_cache", "typo"]
)
few = examples_of(60)


def check(name: str | None, run: Callable[[], Any]) -> None:
    with nullcontext() if name is None else fa3_ops.use_backend(name):
        try:
            said = [step.backend for step in fa3_ops.explain(run).steps]
        except (NotImplementedError, ValueError) as error:
            with launches("npu") as launched, pytest.raises(type(error)):
                run()
            assert "flash_attn_kvcache" not in launched
            return
        with launches("npu") as launched:
            run()
    assert launched == [backend for backend in said if backend != "nothing"]


@few
@given(for_kernels(dense_calls()), NAMES)
def test_dense(call: dict[str, Any], name: str | None) -> None:
    npu = to_npu(call)
    check(name, lambda: fa3_ops.flash_attn_func(**npu))


@few
@given(for_kernels(varlen_calls()), NAMES)
def test_varlen(call: dict[str, Any], name: str | None) -> None:
    npu = to_npu(call) | {"max_seqlen_q": 40, "max_seqlen_k": 70}
    check(name, lambda: fa3_ops.flash_attn_varlen_func(**npu))


@few
@given(for_kernels(kvcache_calls()), NAMES)
def test_append_and_attention(call: dict[str, Any], name: str | None) -> None:
    npu = to_npu(call)
    check(name, lambda: fa3_ops.flash_attn_with_kvcache(**npu))


@few
@given(
    for_kernels(dense_calls((torch.float16, torch.bfloat16, torch.float32), narrow=False)),
    NAMES,
    st.booleans(),
)
def test_backward(call: dict[str, Any], name: str | None, of_lse: bool) -> None:
    settings = ("causal", "window_size", "softcap", "softmax_scale", "alibi_slopes")
    call = {n: x for n, x in call.items() if n in ("q", "k", "v", *settings)}
    npu = to_npu(call)
    out, lse = fa3_ops.flash_attn_func(**npu, return_softmax_lse=True)
    saved = (torch.ones_like(out), npu["q"], npu["k"], npu["v"], out, lse)
    rest = {n: npu[n] for n in settings if n in npu}
    if of_lse:
        rest["dsoftmax_lse"] = on_npu(torch.ones(lse.shape))
    check(name, lambda: ops.flash_attn_func_backward(*saved, **rest))
