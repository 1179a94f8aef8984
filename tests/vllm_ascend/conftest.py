"""vLLM-Ascend on the emulated NPU, in this process: `make test-vllm-ascend` has the environment."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "compat" / "flash_attn_npu_v3"), str(ROOT / "tests" / "vllm")]

if importlib.util.find_spec("vllm_ascend") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Of the emulator, as in tests/npu; then what vLLM-Ascend wants, and its engine in one process.
    os.environ.update(
        CANNEMU_LAZY="1",
        CANNEMU_POISON="1",
        PYTORCH_NO_NPU_MEMORY_CACHING="1",
        PYTORCH_NPU_ALLOC_CONF="expandable_segments:False",
        VLLM_BATCH_INVARIANT="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )
    os.environ.setdefault("VLLM_PLUGINS", "ascend")
    import cann_emulator.standin
    import cann_emulator.subprocesses

    cann_emulator.standin.use("0.4")
    cann_emulator.subprocesses.emulate()
    import stand_ins

    stand_ins.install()
