"""Backends: which kernel serves a call, chosen in the open.

A backend states what it can do as data and says of a call why it cannot serve it
(`not_supported_reasons`). The first of a device's backends without such a reason serves. If that is
not the first of all, it is a fallback: it warns once, and with FA3NPU_STRICT=1 it is an error.
"""

from fa3_ops.backends.attention import Attention
from fa3_ops.backends.choice import Backend, FallbackWarning, choose, use_backend
from fa3_ops.backends.explanation import Explanation, explain

__all__ = [
    "Attention",
    "Backend",
    "Explanation",
    "FallbackWarning",
    "choose",
    "explain",
    "use_backend",
]
