"""From a request to its results, one way for every kind of request:

    request -> prepared by the device -> a backend chosen -> lowered by it -> launched -> completed

explain() goes the first half of this way, to the Choice, and prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fa3_ops.backends import choice, devices
from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Attention, Request
from fa3_ops.backends.lowering.completion import complete


class Nothing(Backend[Request]):
    """Where there is nothing to attend with or to."""

    name = "nothing"

    def is_bitwise(self, request: Request, run: Run) -> bool:
        return True

    def launch(self, request: Request, lowered: Request, run: Run) -> Any:
        return request.empty_results()


@dataclass(frozen=True)
class Choice:
    """How a request is served: by which backend, in which form, and why not by a better one."""

    asked: Request
    prepared: Request  # what the device's backends were asked about
    lowered: Any  # as the backend takes it
    backend: Backend[Any]
    refusals: dict[str, list[str]]  # the reasons of the better backends
    run: Run

    def serve(self) -> Any:
        """The results of the operator; attention's always as (out, softmax_lse)."""
        results = self.backend.launch(self.prepared, self.lowered, self.run)
        if isinstance(self.asked, Attention) and isinstance(self.prepared, Attention):
            if not isinstance(results, tuple) or len(results) != 2:
                got = type(results).__name__
                raise TypeError(
                    f"backend {self.backend.name} must return (out, softmax_lse), got {got}"
                )
            return complete(self.asked, self.prepared, *results)
        return results


def choose(request: Request, compiled: Callable[[], Any] | None = None) -> Choice:
    """Computes nothing that anybody sees. `compiled` is the device's compiled kernel for the same
    call, where it has one."""
    device = devices.of(request.device)
    capturing = device.capturing(request.device)
    run = Run(request, device, capturing, host_may_wait=not capturing, compiled=compiled)
    if request.is_empty and device.key is not None:
        return Choice(request, request, request, Nothing(), {}, run)
    prepared: Any = device.prepare(request, run) if isinstance(request, Attention) else request
    backend, refusals = choice.select(prepared, run)
    if request.is_empty and not backend.takes_empty:
        backend = Nothing()
    lowered = backend.lower(prepared, run)
    if isinstance(request, Attention) and request.sinks is not None and prepared.sinks is None:
        run.note("sinks rescale the result by its softmax_lse")
    return Choice(request, prepared, lowered, backend, refusals, run)


def serve(request: Request, compiled: Callable[[], Any] | None = None) -> Any:
    return choose(request, compiled).serve()
