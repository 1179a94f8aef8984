"""Runs FlashAttention's own hopper/test_flash_attn.py, unmodified, on the CPU; see README.md.

Without --flash-attention (or FLASH_ATTENTION) nothing here has an effect.
"""

from __future__ import annotations

import os
import random
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).parent


class OnCPU(TorchFunctionMode):
    """Makes device="cuda" mean the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
            if func is torch.empty and args[0] == 70 * 1024**3:
                args = (0,)  # memory that only keeps other tests of a GPU away
        return func(*args, **kwargs)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("upstream", "FlashAttention's own tests")
    group.addoption(
        "--flash-attention",
        default=os.environ.get("FLASH_ATTENTION"),
        help="a checkout of flash-attention (default: $FLASH_ATTENTION)",
    )
    group.addoption("--sample", type=int, help="run about this many, as many of each function")
    group.addoption("--seed", type=int, default=0, help="which ones")
    group.addoption(
        "--largest",
        type=int,
        default=2**16,
        help="only tests with seqlen_q * seqlen_k, times the iterations, up to this (%(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A conftest that pytest meets late, below tests/, has no options: then nothing happens.
    checkout = config.getoption("flash_attention", None)
    if checkout is None:
        return
    hopper = Path(checkout).resolve() / "hopper"
    if not (hopper / "test_flash_attn.py").is_file():
        raise pytest.UsageError(f"FLASH_ATTENTION={checkout!r} has no hopper/test_flash_attn.py")
    # hopper/ has a flash_attn_interface.py of its own, for CUDA: ours comes first.
    sys.path[:0] = [str(HERE.parents[1] / "compat" / "flash_attn_interface"), str(hopper)]
    import flash_attn_interface

    assert Path(flash_attn_interface.__file__).parent != hopper
    sys.path.insert(0, str(HERE))
    import rotary

    for name in ("flash_attn", "flash_attn.layers"):
        sys.modules[name] = ModuleType(name)
    sys.modules["flash_attn.layers.rotary"] = rotary
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # with FP8
    mode = OnCPU()
    mode.__enter__()
    config.add_cleanup(lambda: mode.__exit__(None, None, None))
    config.args[:] = [str(hopper / "test_flash_attn.py")]


ITERATIONS = {"test_flash_attn_race_condition": 1000, "test_flash_attn_cluster": 100}


def _size(item: pytest.Function) -> int:
    """Scores of one head, times the iterations; about as many elements where there are parts."""
    p = item.callspec.params if hasattr(item, "callspec") else {}
    if item.originalname == "test_flash_attn_combine":  # up to 60 GB
        return p["num_splits"] * p["seqlen"] * p["d"] // 64
    return p.get("seqlen_q", 0) * p.get("seqlen_k", 0) * ITERATIONS.get(item.originalname, 1)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    if config.getoption("flash_attention", None) is None:
        return
    functions = defaultdict(list)
    for item in items:
        if _size(item) <= config.getoption("largest"):
            functions[item.originalname].append(item)
    sample = config.getoption("sample")
    each = len(items) if sample is None else max(1, sample // max(1, len(functions)))
    kept = set()
    for name, tests in functions.items():
        chosen = random.Random(f"{config.getoption('seed')} {name}")
        kept.update(chosen.sample(tests, min(each, len(tests))))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
