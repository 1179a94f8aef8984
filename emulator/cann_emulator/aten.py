"""Which aten ops the host runs: csrc/ops/aten.cpp says how."""

import re

import torch

# torch_npu's own kernels of these only allocate, view, copy or describe: the emulated runtime
# serves them. All its other aten kernels would call CANN's.
_TORCH_NPU = re.compile(
    r"aten::(empty|new_empty|resize|set_|copy_|_copy_from|_to_copy|_local_scalar_dense|is_pinned"
    r"|_pin_memory|record_stream|_has_compat|view|_reshape_alias|reshape|as_strided|alias|detach"
    r"|unfold|_resize_output|data|_npu|npu_|to\b|clone|contiguous|_has_same)"
)


_libraries: list[torch.library.Library] = []


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)


def _schema(name: str, overload: str) -> torch.FunctionSchema | None:
    try:
        return torch._C._get_schema(name, overload)
    except RuntimeError:  # not visible to Python
        return None


def _is_view(schema: torch.FunctionSchema) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, **kwargs
    )[0]


def install() -> None:
    """Gives every aten op that CANN would compute a kernel on the host."""
    for full_name in torch._C._dispatch_get_all_op_names():
        if not full_name.startswith("aten::") or _TORCH_NPU.match(full_name):
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "PrivateUse1"):
            continue
        name, _, overload = full_name.partition(".")
        schema = _schema(name, overload)
        if schema is None or _is_view(schema) or not _has_kernel(full_name, "CPU"):
            continue
        torch.ops.cann_emulator.route(name, overload)

    # torch_npu differentiates these by ops of CANN: use PyTorch's own composites instead.
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    aten = torch.ops.aten
    composites = {
        "scaled_dot_product_attention": _sdpa,
        "repeat_interleave.self_int": aten.repeat_interleave.self_int.decompose,
        "repeat_interleave.self_Tensor": aten.repeat_interleave.self_Tensor.decompose,
        "softmax.int": aten.softmax.int.decompose,
    }
    for name, kernel in composites.items():
        library.impl(name, kernel, "AutogradPrivateUse1", allow_override=True)
