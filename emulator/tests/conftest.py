"""The emulator's tests need torch and torch_npu; what they promise holds with these settings."""

import importlib.util
import os

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    for name in ("CANNEMU_LAZY", "CANNEMU_POISON", "PYTORCH_NO_NPU_MEMORY_CACHING"):
        os.environ.setdefault(name, "1")
    import cann_emulator  # noqa: F401  before torch, which loads torch_npu
