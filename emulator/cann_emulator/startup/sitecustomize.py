"""Python imports this by itself where this folder is in PYTHONPATH: see ../subprocesses.py."""

import cann_emulator  # noqa: F401
