"""Text for the examples to learn from, and pieces of it to train on."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def load_documents(path: Path | None) -> tuple[str, list[Tensor]]:
    """Texts as bytes: a file, or else what every Python brings along."""
    if path is not None:
        name, texts = path.name, [path.read_bytes()]
    else:
        try:
            from pydoc_data.topics import topics

            name, texts = "Python's reference manual", [t.encode() for t in topics.values()]
        except ImportError:
            sources = sorted(Path(os.__file__).parent.glob("[a-d]*.py"))
            name, texts = "Python's standard library", [p.read_bytes() for p in sources]
    return name, [torch.tensor(list(text)) for text in texts]


def pieces_of(
    documents: Sequence[Tensor], total: int, longest: int, rng: random.Random
) -> list[Tensor]:
    """Pieces of documents, of up to longest + 1 tokens, which have `total` tokens to learn in all:
    every token but the first of each piece."""
    pieces: list[Tensor] = []
    sizes = [len(document) for document in documents]
    while total > 0:
        (document,) = rng.choices(documents, sizes)
        length = min(rng.randint(longest // 4, longest), len(document) - 1, total)
        begin = rng.randint(0, len(document) - 1 - length)
        pieces.append(document[begin : begin + length + 1])
        total -= length
    return pieces


def show_progress(done: int, total: int, text: str) -> None:
    if sys.stdout.isatty():
        bar = ("=" * (30 * done // total)).ljust(30)
        print(f"\r[{bar}] {text} ", end="\n" if done == total else "", flush=True)
    elif done % -(-total // 7) == 0 or done == total:
        print(text, flush=True)
