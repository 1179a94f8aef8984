"""Ascend NPU devices without an Ascend NPU: the real torch_npu on an emulated CANN.

Import this before torch. It loads the emulated libraries, imports torch and torch_npu, and lets
PyTorch's CPU kernels run the aten ops of npu tensors. See the README beside this package.
"""

import sys

# `python -m cann_emulator.build` imports this package before there is anything to load.
if "cann_emulator.build" not in sys.orig_argv:
    from .runtime import flush, host, pending, register_ir, submit

    __all__ = ["flush", "host", "pending", "register_ir", "submit"]
