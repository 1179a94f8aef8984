"""The bitwise contract of docs/design.md, run on a device: `python -m fa3_ops consistency`.

A row's out and softmax_lse depend on its own q and its own keys and values alone. Every comparison
computes rows in another way than the training forward of their sequence alone, and asks for the
same bits.
"""

from __future__ import annotations

import argparse

import torch

from fa3_ops.tools import crew
from fa3_ops.tools.consistency import model, peers
from fa3_ops.tools.consistency.case import DTYPES, settings
from fa3_ops.tools.consistency.outcome import check

__all__ = ["add_arguments", "check", "main", "settings"]


def best_device() -> str:
    """The accelerator that is there, or the CPU."""
    for name in ("npu", "cuda"):
        if hasattr(torch, name) and getattr(torch, name).is_available():
            return name
    return "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "npu", "cuda"), default=None)
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", default=None)
    crew.add_arguments(parser)
    model.add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Prints the table; 1 if something that is promised did not hold."""
    if arguments.model is not None:
        return model.main(arguments)
    device = arguments.device or best_device()
    try:
        torch.empty(0, device=device)
    except Exception as error:
        print(f"no device {device} here: {type(error).__name__}: {error}".splitlines()[0])
        return 1
    dtypes = [DTYPES[name] for name in arguments.dtype] if arguments.dtype else None
    with crew.crew(device, arguments.processes) as mapped:
        results = check(settings(device, dtypes), mapped)
    print(results.table())
    print()
    print(results.summary())
    if peers.is_there(device):
        print(f"\n{peers.figures(device)}")
    return int(results.failed)
