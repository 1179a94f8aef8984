"""What really runs: the launches of a device's backends, whatever chose them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from fa3_ops.backends import Backend, devices


@contextmanager
def launches(device: str) -> Iterator[list[str]]:
    """The names of the backends that are launched inside, in order."""
    launched: list[str] = []

    def spy(backend: Backend[Any]) -> Callable[..., Any]:
        launch = backend.launch

        def noted(*arguments: Any) -> Any:
            launched.append(backend.name)
            return launch(*arguments)

        return noted

    with ExitStack() as stack:
        for backends in devices.named(device).backends.values():
            for backend in backends:
                stack.enter_context(mock.patch.object(backend, "launch", spy(backend)))
        yield launched
