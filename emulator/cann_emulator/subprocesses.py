"""Emulated NPUs for the processes of Python that this one starts, and that those start."""

import os
from pathlib import Path

_STARTUP = str(Path(__file__).parent / "startup")


def emulate() -> None:
    """From now on a new process imports cann_emulator before anything else. It must be of an
    environment that has it; a sitecustomize of that environment's own is not imported."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [_STARTUP, *(path for path in inherited if path and path != _STARTUP)]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
