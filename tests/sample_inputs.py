"""Calls for tests to vary. Samples of every operator: fa3_ops.testing."""

from __future__ import annotations

from typing import Any

from fa3_ops.testing.samples import SAMPLES, fp8, ints, rand, rotary

__all__ = ["SAMPLES", "appending", "cached", "dense", "fp8", "ints", "rand", "rotary", "varlen"]


def dense(**changes: Any) -> dict[str, Any]:
    return {"q": rand(2, 3, 4, 16), "k": rand(2, 5, 2, 16), "v": rand(2, 5, 2, 16)} | changes


def varlen(**changes: Any) -> dict[str, Any]:
    call = {"q": rand(7, 4, 16), "k": rand(9, 2, 16), "v": rand(9, 2, 16)}
    lengths = {"cu_seqlens_q": ints(0, 3, 7), "cu_seqlens_k": ints(0, 4, 9)}
    return call | lengths | {"max_seqlen_q": 4, "max_seqlen_k": 5} | changes


def cached(seqlen_q: int = 3, **changes: Any) -> dict[str, Any]:
    cache = {"k_cache": rand(2, 8, 2, 16), "v_cache": rand(2, 8, 2, 16)}
    return {"q": rand(2, seqlen_q, 4, 16), **cache, "cache_seqlens": ints(5, 2)} | changes


def appending(seqlen_q: int = 3, **changes: Any) -> dict[str, Any]:
    new = {"k": rand(2, seqlen_q, 2, 16), "v": rand(2, seqlen_q, 2, 16)}
    return cached(seqlen_q) | new | changes
