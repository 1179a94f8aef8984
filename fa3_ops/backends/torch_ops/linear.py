"""linear by PyTorch's own, whose bits may depend on the number of rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Linear


class TorchLinear(Backend[Linear]):
    name = "torch"

    def launch(self, request: Linear, lowered: Linear, run: Run) -> Tensor:
        return F.linear(request.x, request.weight, request.bias)
