"""Calls to try an installation of fa3_ops with, on any device.

torch.library.opcheck over every operator:

    for call in sample_calls(device):
        torch.library.opcheck(call.operator, call.args, call.kwargs, test_utils=call.test_utils)

Calls of real FlashAttention kernels, recorded with their results, against this machine's:

    for call in recorded_calls(path):
        arguments = call.fresh(device)
        print(call.name, call.disagreements(*call.function(**arguments), arguments))
"""

from fa3_ops.testing.recordings import FunctionCall, recorded_calls
from fa3_ops.testing.samples import SampleCall, sample_calls

__all__ = ["FunctionCall", "SampleCall", "recorded_calls", "sample_calls"]
