"""What this machine has: the NPU, its runtime, and flash_attn_npu under either of its names."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from types import ModuleType


@functools.cache
def soc_name() -> str:
    """Such as "Ascend910B1"."""
    import torch_npu

    name: str = torch_npu.npu.get_device_name()
    return name


def is_950() -> bool:
    return soc_name().startswith("Ascend950")


def capturing() -> bool:
    """Whether the current stream records a graph, so that the host must not wait for it."""
    import torch_npu

    return bool(torch_npu.npu.is_current_stream_capturing())


@dataclass(frozen=True)
class Kernel:
    """The raw extension of an installed flash_attn_npu. Its Python functions are not used: they
    declare no mutation, and only some versions have them all."""

    version: tuple[int, ...]
    module: ModuleType
    is_950: bool

    @property
    def relative_cu_seqlens(self) -> bool:
        """Releases before 0.3, and those for 950, count rows of q from cu_seqlens_q[0]."""
        return self.version < (0, 3) or self.is_950

    @property
    def token_major_lse(self) -> bool:
        """(total_q, nheads) and (batch_size, seqlen_q, nheads) before 0.3."""
        return self.version < (0, 3)


def _version() -> tuple[int, ...]:
    numbers = importlib.metadata.version("flash_attn_npu").split("+")[0].split(".")[:2]
    return tuple(int(number) for number in numbers)


@functools.cache
def kernel() -> Kernel | str:
    """The installed flash_attn_npu, or why there is none to use.

    Since 0.3 the extension is `flash_attn_npu_3.flash_attn_npu_3`, on a 950 the top-level
    `flash_attn_npu_3_950`; before, it was the top-level module `flash_attn_npu_3`.
    """
    name = "flash_attn_npu_3_950" if is_950() else "flash_attn_npu_3"
    try:
        spec = importlib.util.find_spec(name)
        if spec is None:
            return "flash_attn_npu is not installed"
        if spec.submodule_search_locations is not None:
            name = f"{name}.{name}"
        return Kernel(_version(), importlib.import_module(name), is_950())
    except (ImportError, OSError, RuntimeError) as error:
        return f"flash_attn_npu does not load: {error}"
