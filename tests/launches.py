"""What really runs: the launches of a device's backends, whatever chose them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from fa3_ops.backends import Backend, devices, dispatch, repeated


@contextmanager
def launches(device: str) -> Iterator[list[str]]:
    """The names of the backends that are launched inside, in order. No call repeats an earlier one,
    as if none had been kept."""
    launched: list[str] = []

    def spy(backend: Backend[Any]) -> Callable[..., Any]:
        launch = backend.launch

        def noted(*arguments: Any) -> Any:
            launched.append(backend.name)
            return launch(*arguments)

        return noted

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "settled", return_value=None))
        repeated.forget()
        for backends in devices.named(device).backends.values():
            for backend in backends:
                stack.enter_context(mock.patch.object(backend, "launch", spy(backend)))
        yield launched
