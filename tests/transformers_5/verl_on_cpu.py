"""Importing this gives veRL, which knows accelerators alone, CPU as its platform. Its engines ask
for the platform when they are imported: import this before them."""

from __future__ import annotations

import torch
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_cuda import PlatformCUDA


class CPU(PlatformCUDA):
    device_name = "cpu"
    vendor_name = "any"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


platform_manager.set_platform(CPU())
