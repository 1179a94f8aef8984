"""The calls that are timed: ours and each peer's, over one description of the work.

A peer gives, for a workload, the forms in which it can compute it (ways of calling it, of which the
fastest counts) and, for a form, the calls: functions without arguments that return the result as
(..., nheads, headdim_v). A decode has many calls, each over other keys, so that the keys come from
memory and not from a cache. Whatever a serving program does once per step or at start (metadata,
sessions, page tables) is done outside the calls.
"""

from .base import Peer
from .flex import Flex
from .llama_cpp import LlamaCpp
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .ours import Ours
from .sdpa import Sdpa
from .vllm_cpu import Vllm

PEERS: dict[str, type[Peer]] = {
    "ours": Ours,
    "sdpa": Sdpa,
    "sdpa_newest": Sdpa,
    "flex": Flex,
    "vllm": Vllm,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "llama_cpp": LlamaCpp,
}
