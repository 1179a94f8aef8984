"""One block per tensor, in place of torch_npu's caching allocator."""

import ctypes

import torch
import torch_npu

from .build import LIB

_LIBRARY = str(LIB / "libascendcl.so")


def install() -> None:
    """Replaces torch_npu's allocator; called for PYTORCH_NO_NPU_MEMORY_CACHING=1.

    torch_npu's own uncached allocator synchronises the device whenever a tensor dies, which would
    hide missing stream waits, and rounds sizes up, which would hide writes past the end.
    """
    runtime = ctypes.CDLL(_LIBRARY)
    runtime.emu_used_bytes.restype = ctypes.c_size_t
    allocator = torch.npu.memory.NPUPluggableAllocator(_LIBRARY, "emu_malloc", "emu_free")
    torch.npu.memory.change_current_allocator(allocator)

    def stats(device: int) -> dict[str, dict[str, dict[str, int]]]:
        current, peak = runtime.emu_used_bytes(device, 0), runtime.emu_used_bytes(device, 1)
        return {"allocated_bytes": {"all": {"current": current, "peak": peak}}}

    # torch_npu asks its caching allocator for these, and crashes with another one.
    c = torch_npu._C
    c._npu_memoryStats = stats
    c._npu_resetPeakMemoryStats = lambda device: runtime.emu_reset_peak(device)
    # torchair saves and restores the state of a pool of cached blocks. Here there is no pool: the
    # emulator keeps what a graph may touch for as long as the graph lives.
    c._npu_getCheckpointState = lambda device, pool: None
    c._npu_setCheckpointPoolState = lambda device, state, stale, added: None
