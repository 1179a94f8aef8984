"""Gives torchair (torch.compile's backend "npu") our GE converters when it is loaded, by whomever.

Importing torchair loads GE's libraries and installs signal handlers, so that fa3_ops never does it:
torch_npu keeps a proxy in sys.modules["torchair"] and loads the package below at its first use.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGE = "torch_npu.dynamo.torchair"


def attach(torchair: ModuleType) -> None:
    """Registers the converters. What goes wrong here must not break torchair for others."""
    try:
        from fa3_ops.backends.npu.ge import converters

        converters.register(torchair.register_fx_node_ge_converter)
    except Exception as error:
        warnings.warn(
            f"fa3_ops has no GE converters for this torchair: {error}", RuntimeWarning, stacklevel=2
        )


class AttachAfterLoading(MetaPathFinder):
    """Lets the import of torchair take its course and attaches behind it. It stays until one
    import has succeeded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == PACKAGE else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            attach(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def attach_when_loaded() -> None:
    """Attaches the converters now if torchair is loaded, else as soon as it is."""
    loaded = sys.modules.get(PACKAGE)
    if loaded is not None:
        attach(loaded)
    else:
        sys.meta_path.insert(0, AttachAfterLoading())
