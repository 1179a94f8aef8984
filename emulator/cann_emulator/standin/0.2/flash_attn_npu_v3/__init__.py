"""A stand-in for flash_attn_npu 0.2.0b1; see ../../README.md."""

__version__ = "0.2.0b1"

import flash_attn_npu_3
from cann_emulator.standin.kernel_model.interface import make_flash_attn_with_kvcache, make_forward

# The real one registers under flash_attn_npu_3 too; here both releases fit into one process.
_forward = make_forward("flash_attn_npu_v3::_flash_attn_forward", flash_attn_npu_3.fwd)
flash_attn_with_kvcache = make_flash_attn_with_kvcache(_forward, lambda *_: None)
