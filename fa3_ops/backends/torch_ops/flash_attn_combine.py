"""flash_attn_combine in plain torch operators, in the order of the splits."""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_ops.backends.backend import Backend, Run
from fa3_ops.backends.call import Combination


class TorchCombination(Backend[Combination]):
    name = "torch"

    def launch(self, request: Combination, lowered: Combination, run: Run) -> tuple[Tensor, Tensor]:
        lse = request.lse_partial
        lse = lse.masked_fill(lse == float("inf"), float("-inf"))  # no key, to some
        most = lse.amax(0)
        most = most.masked_fill(most == float("-inf"), 0.0)
        weights = torch.exp(lse - most)
        total = weights.sum(0)
        scaled = request.out_partial * weights[..., None]
        # What a partial result without keys holds does not count, even if it is NaN.
        scaled = scaled.masked_fill((weights == 0.0)[..., None], 0.0)
        out = scaled.sum(0) / total.masked_fill(total == 0.0, 1.0)[..., None]
        softmax_lse = (total.log() + most).transpose(-1, -2).contiguous().transpose(-1, -2)
        return out.to(request.out_dtype or torch.float32), softmax_lse
