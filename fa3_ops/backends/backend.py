"""What a backend is, and what it learns of the run that it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from fa3_ops.backends.call import Request
from fa3_ops.backends.devices import on

if TYPE_CHECKING:
    from fa3_ops.backends.devices import Device
    from fa3_ops.backends.lowering.lengths import Lengths

AnyRequest = TypeVar("AnyRequest", bound=Request)


@dataclass
class Run:
    """What the host knows of one run of a request, and what is worth telling of it."""

    request: Request  # as it was asked for
    device: Device
    capturing: bool  # a device graph is being recorded
    host_may_wait: bool  # for the device, to read lengths
    lengths: Lengths | None = None  # once a backend that wants them has been asked
    notes: list[str] = field(default_factory=list)  # what the lowering did, for explain()
    compiled: Callable[[], Any] | None = None  # the device's compiled kernel, for the same call

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def constant(self, make: Callable[[torch.device], Tensor], at: torch.device) -> Tensor:
        """make(at), which is kept."""
        return self.device.constant(make, at)


class Backend(Generic[AnyRequest]):
    """One way to serve one kind of request. Backends of one name belong together."""

    name: str
    reads_lengths = False  # the host reads lengths, and waits for the device, before it is asked
    capturable = True  # a graph may record it: it neither waits nor tiles by what tensors hold
    # Whether it is asked about k and v of 8 bits; they are dequantised for one that is not.
    reads_narrow = True
    takes_empty = False  # requests without anything to compute, which are answered without it

    def not_supported_reasons(self, request: AnyRequest, run: Run) -> list[str]:
        """Why it cannot serve the request; empty if it can. Looks at shapes and dtypes, and at
        run.lengths where they are there."""
        return []

    def is_bitwise(self, request: AnyRequest, run: Run) -> bool:
        """Whether it serves the request under the bitwise contract of docs/design.md."""
        return False

    def lower(self, request: AnyRequest, run: Run) -> Any:
        """The request as its kernel takes it. May compute; writes nothing that the caller has."""
        return request

    def launch(self, request: AnyRequest, lowered: Any, run: Run) -> Any:
        """The operator's results: those of attention always as (out, softmax_lse). Unless a backend
        launches otherwise, what `settle` gives for the lowered request does."""
        settled = self.settle(lowered)
        if settled is None:
            raise NotImplementedError
        with on(lowered.device):
            return settled(lowered)

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "launch" in vars(cls) and "settle" not in vars(cls):
            cls.settle = Backend.settle  # type: ignore[method-assign]  # not that of another launch

    def settle(self, request: AnyRequest) -> Callable[[AnyRequest], Any] | None:
        """What launch does with a request that it takes as it is, for all that differ from it in
        nothing but where their tensors lie: in no shape, stride, dtype, number, and in no tensor's
        alignment to 16 bytes. It keeps no tensor, gives out in the dtype that was asked for, and
        is called where the request's device is current, on devices whose calls repeat instead of
        launch. None: nothing is settled by that, as for who reads lengths or is not capturable."""
        return None
