"""A stand-in for flash_attn_npu 0.4.2.post1; see ../../README.md."""

__version__ = "0.4.2.post1"

import torch_npu

# On Ascend 950 only the raw extension flash_attn_npu_3_950 is modelled.
if "Ascend910" in torch_npu.npu.get_device_name():
    from .flash_attn_npu_interface import (  # noqa: F401
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
        get_scheduler_metadata,
    )
elif "Ascend950" not in torch_npu.npu.get_device_name():
    raise RuntimeError(f"Unsupported Ascend device: {torch_npu.npu.get_device_name()}")
