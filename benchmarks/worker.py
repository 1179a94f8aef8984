"""A process that times the calls of one peer with one number of threads.

It is forked by cpu_attention.py before anything imports torch, so that the environment that it sets
(threads, instruction sets) holds, and a peer that crashes takes nothing else along.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limits import NEWEST, Meter
from workloads import Workload

if TYPE_CHECKING:
    from mmap import mmap
    from multiprocessing.connection import Connection

    from peers.base import Call, Peer
    from torch import Tensor

METER = "limits"  # the worker that measures the machine
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 2e-3, "float32": 1e-5}  # of the largest element
RESTRICTIONS = {  # of torch's own kernels and of the libraries that they call
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


@dataclass(frozen=True)
class Spec:
    """name: a peer, or "peer:restriction" ("ours:AVX2", "sdpa:default")."""

    name: str
    threads: int

    def environment(self) -> dict[str, str]:
        peer, _, restriction = self.name.partition(":")
        # Idle threads of a pool sleep after half a millisecond: long enough for one call to follow
        # another, too short to disturb the next peer.
        settings = {"OMP_NUM_THREADS": str(self.threads), "GOMP_SPINCOUNT": "10000"}
        if restriction and peer == "ours":
            settings["FA3NPU_CPU_CAPABILITY"] = restriction
        elif restriction:
            settings |= RESTRICTIONS[restriction]
        return settings


@dataclass(frozen=True)
class Sample:
    """Seconds a call, over some calls in a row: of the whole process's CPU for one thread, of the
    wall for more. wall: seconds of all of them; others: what other processes used meanwhile, which
    the system counts in hundredths, so that of one sample it may be less than nothing."""

    seconds: float
    wall: float
    others: float


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over samples, the fastest and the slowest. others: cores that
    other processes used during all of them."""

    seconds: float
    low: float
    high: float
    samples: int
    others: float
    form: str


def timing(form: str, samples: list[Sample]) -> Timing:
    seconds = [sample.seconds for sample in samples]
    others = max(0.0, sum(sample.others for sample in samples))
    others /= sum(sample.wall for sample in samples)
    middle = statistics.median(seconds)
    return Timing(middle, min(seconds), max(seconds), len(seconds), round(others, 2), form)


def busy_seconds() -> float:
    """Of all cores and processes since boot, less this process's own."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, *steal = map(int, file.readline().split()[1:9])
    all_of_them = (user + nice + system + irq + softirq + sum(steal)) / os.sysconf("SC_CLK_TCK")
    return all_of_them - time.process_time()


class Timer:
    """Takes samples of a peer's calls, warm from the first one on."""

    SECONDS = 0.04  # of a sample

    def __init__(self, calls: list[Call], threads: int) -> None:
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.rotation = itertools.cycle(calls)
        self.one = self.seconds(1)
        if self.one < 0.1:  # until the allocator keeps the pages of a result
            self.one = self.seconds(3)
        self.repeats = max(1, round(self.SECONDS / self.one))

    def seconds(self, repeats: int) -> float:
        start = self.clock()
        for _ in range(repeats):
            next(self.rotation)()
        return max((self.clock() - start) / repeats, 1e-6)

    def trial(self) -> float:
        """Seconds a call, to choose by."""
        return statistics.median(self.sample().seconds for _ in range(3 if self.one < 0.1 else 1))

    def sample(self) -> Sample:
        started, busy = time.perf_counter(), busy_seconds()
        seconds = self.seconds(self.repeats)
        return Sample(seconds, time.perf_counter() - started, busy_seconds() - busy)


@dataclass(frozen=True)
class Ready:
    form: str


class Bench:
    """The worker's side: checks and times one peer."""

    timer: Timer | None = None

    def __init__(self, spec: Spec, arena: mmap) -> None:
        import torch
        from peers import PEERS

        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        self.threads = spec.threads
        self.peer: Peer = PEERS[spec.name.partition(":")[0]](spec.threads)
        self.capability = getattr(self.peer, "capability", "")
        self.arena = torch.frombuffer(arena, dtype=torch.uint8)
        self.arena[::4096].sum()  # maps the pages that fork shared, so that no call has to
        self.checked: dict[tuple[Workload, str], str] = {}

    def calls(self, row: Workload, form: str) -> list[Call]:
        """Decodes read the arena; a warm one always the same part of it."""
        from peers.base import make_inputs

        memory = None
        if row.kind == "decode":
            memory = self.arena[: row.cache_bytes] if row.warm else self.arena
        return self.peer.calls(row, form, make_inputs(row, memory))

    def wrong(self, row: Workload, form: str) -> str:
        """Why the form cannot be timed: it fails, or errs against float64, at a small size."""
        key = (row.small(), form)
        if key not in self.checked:
            try:
                error = max_error(self.peer, row.small(), form)
                wrong = not error <= TOLERANCE[row.dtype]  # NaN is wrong
                self.checked[key] = f"is wrong by {error:.1e}" if wrong else ""
            except Exception as exception:
                self.checked[key] = first_line(exception)
        return self.checked[key]

    def prepare(self, row: Workload) -> Ready | str:
        """Has the fastest form ready for `sample`, or says why there is none."""
        from peers.base import Unsupported

        self.timer = None  # and the memory of the row before
        try:
            forms = self.peer.forms(row)
        except Unsupported as why:
            return str(why)
        reasons, timers = [], {}
        for form in forms:
            if why_not := self.wrong(row, form):
                reasons.append(f"{form}: {why_not}" if form else why_not)
            else:
                timers[form] = Timer(self.calls(row, form), self.threads)
        if not timers:
            return "; ".join(reasons)
        # The first call of a slow one was cold, but twice the least is more than that explains.
        most = 2 * min(timer.one for timer in timers.values())
        near = [form for form, timer in timers.items() if timer.one <= most]
        form = near[0] if len(near) == 1 else min(near, key=lambda form: timers[form].trial())
        self.timer = timers[form]
        return Ready(form)

    def sample(self, _: None) -> Sample:
        assert self.timer
        return self.timer.sample()

    def memory(self, row: Workload) -> int | str:
        """Bytes that the first call of this size takes beyond its output, at its peak."""
        from peers.base import Unsupported, dense_caches, make_inputs

        try:
            form = self.peer.forms(row)[0]
            small = row.small()
            self.peer.calls(small, form, make_inputs(small))[0]()  # threads, libraries
            own_keys = row.kind == "train"
            inputs = make_inputs(row, None if own_keys else self.arena[: row.cache_bytes])
            if row.kind == "prefill":
                inputs.k, inputs.v = dense_caches(row, inputs)[0]
            call = self.peer.calls(row, form, inputs)[0]
        except Unsupported as why:
            return str(why)
        self.arena[: row.cache_bytes].sum()  # counts as resident from here on
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be taken again without a trace
        reset_peak()
        before = status("VmRSS")
        outputs = as_tuple(call())
        return status("VmHWM") - before - sum(t.numel() * t.element_size() for t in outputs)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def max_error(peer: Peer, row: Workload, form: str) -> float:
    """Against float64, as a part of the largest element of each result."""
    import torch
    from peers.base import cu_seqlens, make_inputs, training, window_size

    from fa3_ops import reference

    x = make_inputs(row)
    results = as_tuple(peer.calls(row, form, x)[0]())
    exact = make_inputs(row)
    for name in ("q", "k", "v", "qv", "dout"):
        if getattr(exact, name) is not None:
            setattr(exact, name, getattr(exact, name).double())
    cu = cu_seqlens(row) if row.lengths else None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference.batched(
            q,
            k,
            v,
            qv=exact.qv,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            causal=True,
            window_size=window_size(row),
        )[0]

    training_row = row.kind == "train"
    expected = as_tuple(training(exact, attend)() if training_row else attend(exact.q, *exact.kv))
    errors = []
    for got, want in zip(results, expected, strict=True):
        if got.shape != want.shape:
            raise ValueError(f"the result's shape is {tuple(got.shape)}")
        errors.append((got.double() - want).abs().max() / want.abs().max())
    return float(torch.stack(errors).max())


def status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    raise KeyError(name)


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts again from VmRSS


def first_line(exception: Exception) -> str:
    lines = [line.strip() for line in str(exception).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(exception).__name__}: {text}"[:160]


def use_newest() -> None:
    """Has this process import PyTorch's newest release."""
    if not (NEWEST / "torch").is_dir():
        raise ImportError("PyTorch's newest release is not installed: make bench-newest")
    sys.path.insert(0, str(NEWEST))


def serve(connection: Connection, spec: Spec, arena: mmap, log: int) -> None:
    """Answers (what, row) until the connection closes. The first message says whether the peer is
    there. What the libraries print goes to the file `log`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(spec.environment())
    if hasattr(os, "sched_setaffinity"):  # all peers on the same cores, which neighbours may slow
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-spec.threads :])
    try:
        if spec.name == "sdpa_newest":
            use_newest()
        bench: Any = Meter(spec.threads, arena) if spec.name == METER else Bench(spec, arena)
        connection.send({"capability": getattr(bench, "capability", "")})
    except Exception as exception:
        connection.send(f"{spec.name}: {exception}" if str(exception) else first_line(exception))
        return
    while True:
        try:
            what, row = connection.recv()
        except EOFError:
            return
        reply: Any
        try:
            reply = getattr(bench, what)(row)
        except Exception as exception:
            reply = first_line(exception)
        connection.send(reply)
