"""Loads the compiled operators: schemas and CPU kernels."""

from pathlib import Path

import torch

LIBRARY = next(iter(sorted(Path(__file__).parent.glob("_C*.so"))), None)
if LIBRARY is None:
    raise ImportError(
        "fa3_ops is not built: run `pip install --no-build-isolation .` where its pyproject.toml is"
    )
torch.ops.load_library(LIBRARY)
