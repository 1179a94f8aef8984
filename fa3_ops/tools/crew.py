"""Work on a device by several processes. A CUDA device's kernels are compiled when a call first
needs them, about a second each, and the tools need some hundreds."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
MOST = 8  # processes: each has memory of its own on the device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=int,
        default=None,
        help=f"that compile kernels (cuda: as many as half the cores, {MOST} at most; else 1)",
    )


def compiles(device: str) -> bool:
    """Whether its kernels are compiled when they are first needed."""
    return device == "cuda" and torch.cuda.is_available()


def tell(device: str, line: str) -> None:
    """Who waits for kernels."""
    if compiles(device):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def crew(device: str, processes: int | None = None) -> Iterator[Map]:
    """What maps functions of a module over items, in their order: several processes at once where
    that pays, else this one."""
    if processes is None:
        processes = min(MOST, (os.cpu_count() or 1) // 2) if compiles(device) else 1
    tell(device, "Kernels that Triton does not have yet are compiled: minutes, the first time.")
    if processes <= 1:
        yield map
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        yield functools.partial(_mapped, pool)


def _mapped(
    pool: ProcessPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
    """Begins at once, whenever the results are asked for."""
    return map(_warned, pool.map(functools.partial(_recorded, function), items))


def _warned(recorded: tuple[Any, list[Warning | str]]) -> Any:
    result, caught = recorded
    for warning in caught:
        warnings.warn(warning, stacklevel=2)
    return result


def _recorded(function: Callable[[Any], Any], item: Any) -> tuple[Any, list[Warning | str]]:
    """function(item), and its warnings, which its process would keep."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(item)
    return result, [w.message for w in caught]
