"""explain(): which backend would serve a call, how, and why the others would not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fa3_ops.backends import devices
from fa3_ops.backends.call import request_of
from fa3_ops.backends.fallback import explaining
from fa3_ops.backends.run import choose
from fa3_ops.meta_kernels import FAKES
from fa3_ops.ops.schema import full_name_of, name_of


@dataclass
class Step:
    """One operator of the call."""

    operator: str
    backend: str
    refusals: dict[str, list[str]] = field(default_factory=dict)  # of the backends before it
    notes: list[str] = field(default_factory=list)  # how the call is lowered for the backend
    bitwise: bool = False  # under the bitwise contract of docs/design.md

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.backend}"]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  not {name}: {', '.join(why)}" for name, why in self.refusals.items()]
        return "\n".join(lines)


@dataclass
class Explanation:
    steps: list[Step]

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))

    @property
    def backend(self) -> str:
        """The backend of the attention itself, the last step."""
        return self.steps[-1].backend

    @property
    def bitwise(self) -> bool:
        """Whether every step is served under the bitwise contract."""
        return all(step.bitwise for step in self.steps)


def explain(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Explanation:
    """What `function(*arguments, **keywords)` would do, where function is one of fa3_ops' or of
    torch.ops.fa3npu. Its arguments are checked; no attention is computed and no cache written.

    >>> print(fa3_ops.explain(fa3_ops.flash_attn_func, q, k, v, causal=True))
    flash_attn_func: cpu
    """
    mode = _Recorder()
    with mode, torch.no_grad(), explaining():
        function(*arguments, **keywords)
    return Explanation(mode.steps)


class _Recorder(TorchDispatchMode):
    """Notes every operator of ours instead of running it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "fa3npu":
            return func(*args, **kwargs)
        request = request_of(func, args, kwargs)
        if devices.of(request.device).backends:
            chosen = choose(request)
            step = Step(
                name_of(func),
                chosen.backend.name,
                chosen.refusals,
                chosen.run.notes,
                chosen.backend.is_bitwise(chosen.prepared, chosen.run),
            )
        else:
            step = Step(name_of(func), request.device.type)
        self.steps.append(step)
        # The fake kernels ask for nothing but new_empty.
        kwargs = {name: x for name, x in kwargs.items() if name != "out"}
        return FAKES[full_name_of(func)](*args, **kwargs)
