"""What explain() says of an operator on NPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fa3_ops.backends import npu
from fa3_ops.backends.attention import Attention
from fa3_ops.backends.choice import choose, refusals
from fa3_ops.backends.explanation import Step
from fa3_ops.backends.npu import backward
from fa3_ops.backends.npu.attention import BACKENDS, prepare
from fa3_ops.backends.npu.kvcache_append import scatter_reasons
from fa3_ops.backends.npu.lowering import dequantise_fp8, select_table_rows

ATTENTION: Mapping[str, Callable[..., Attention]] = {
    "flash_attn_func": npu.dense,
    "flash_attn_varlen_func": npu.varlen,
    "flash_attn_kvcache": npu.kvcache,
}

BACKWARD: Mapping[str, Callable[..., backward.Gradients]] = {
    "flash_attn_func_backward": backward.dense_gradients,
    "flash_attn_varlen_func_backward": backward.gradients,
}


def step(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
    if name == "kvcache_append_":
        reasons = scatter_reasons(*args[:4])
        if not reasons:
            return Step(name, "npu_scatter_pa_kv_cache")
        return Step(name, "torch", {"npu_scatter_pa_kv_cache": reasons})
    if name in BACKWARD:
        if reasons := backward.not_supported_reasons(BACKWARD[name](*args, **kwargs)):
            return Step(name, "torch", {"flash_attn_npu": reasons})
        return Step(name, "flash_attn_npu")
    if name not in ATTENTION:
        return Step(name, "torch")
    call, lengths = prepare(
        ATTENTION[name](*args, **{k: v for k, v in kwargs.items() if k != "out"})
    )
    decoded = dequantise_fp8(select_table_rows(call))
    backend = choose(BACKENDS, decoded)
    notes = list(dict.fromkeys(backend.lower(decoded, lengths).notes))
    if call.sinks is not None:
        notes.append("sinks rescale the result by its softmax_lse")
    return Step(name, backend.name, refusals(BACKENDS, decoded), notes)
