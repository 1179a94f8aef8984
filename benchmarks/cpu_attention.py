"""Times our CPU operators beside other implementations, with the machine's limits, in one run.

    make bench                              the whole of it, into docs/benchmarks
    make bench ARGS="--quick"               a sample of it, in a few minutes
    python benchmarks/cpu_attention.py --peers sdpa --only decode,prefill --threads 1,4

Writes cpu.json (every measurement), cpu.md (tables) and plots (PNG). The columns and the method are
explained in docs/cpu_performance.md. Files: workloads.py (the rows and what they must reach),
peers (the calls), worker.py (checks and times them), limits.py and limits.c (the machine),
report.py and plots.py (what is written).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any

import limits
import report
import worker
from workloads import DTYPES, EVERYONE, GROUPS, Workload

ROOT = Path(__file__).parents[1]
TIMEOUT = 240  # seconds for one peer's row; compiling included
MOST_SECONDS = 2  # of samples for one peer's row, after the second
LIMITS_AGE = 45  # seconds after which the machine's limits are measured again
MIB = 1 << 20


def arena_bytes() -> int:
    """What a decode's keys are spread over: 4 times the last cache, which neighbours may share with
    us, from 512 MiB (the longest sequence) to 2 GiB."""
    return min(max(4 * limits.l3_bytes(), 512 * MIB), 2048 * MIB)


def make_arena() -> mmap:
    """Memory that every worker inherits and shares, as long as nobody writes it. Every 16-bit word
    is a random number of either sign, in bfloat16 between 0.5 and 2, in float16 between 1.75 and 2;
    so are pairs of words in float32."""
    high = bytes(0x3F | (byte & 0x80) for byte in range(256))
    block = bytearray(MIB)
    generator = random.Random(0)
    arena = mmap(-1, arena_bytes(), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    if hasattr(arena, "madvise"):
        import mmap as constants

        arena.madvise(constants.MADV_HUGEPAGE)
    for start in range(0, len(arena), MIB):
        if start < 64 * MIB:
            block[0::2] = generator.randbytes(MIB // 2)
            block[1::2] = generator.randbytes(MIB // 2).translate(high)
            arena[start : start + MIB] = bytes(block)
        else:
            arena[start : start + MIB] = arena[start - 64 * MIB : start - 63 * MIB]
    return arena


class Worker:
    """The parent's end of a worker process; started again if it died."""

    def __init__(self, spec: worker.Spec, arena: mmap) -> None:
        self.spec, self.arena = spec, arena
        self.info: dict[str, str] = {}
        self.unavailable = ""
        self.process: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  closed in stop()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=worker.serve,
            args=(theirs, self.spec, self.arena, self.log.fileno()),
            daemon=True,
        )
        self.process.start()
        theirs.close()
        hello = self.receive()
        if isinstance(hello, dict):
            self.info = hello
        else:
            self.unavailable = str(hello)
            self.stop()

    def receive(self) -> Any:
        """The next message; a text if there is none."""
        try:
            if self.connection.poll(TIMEOUT):
                return self.connection.recv()
            reason = f"took more than {TIMEOUT} s"
        except (EOFError, ConnectionResetError):
            self.process.join()
            reason = f"the process died ({self.process.exitcode}): {self.last_words()}"
        self.stop()
        return f"{self.spec.name}: {reason}"

    def last_words(self) -> str:
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if "what():" in line]
        return (lines or [text.strip()[-100:]])[-1][:160]

    def ask(self, what: str, row: Workload | None) -> Any:
        if not self.unavailable and self.process is None:
            self.start()
        if self.unavailable:
            return self.unavailable
        self.connection.send((what, row))
        return self.receive()

    def stop(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.kill()  # it has nothing to save, and some libraries hang at exit
            self.process.join()
            self.log.close()
            self.process = None


class Run:
    """Everything that is measured, in the form in which it is written to cpu.json."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.peers, self.dtypes = chosen.peers, chosen.dtypes
        self.quick, self.rounds = chosen.quick, chosen.rounds
        self.arena = make_arena()
        self.workers: dict[worker.Spec, Worker] = {}
        self.limits: dict[int, limits.Limits] = {}
        self.capability = ""
        self.rows: list[dict[str, Any]] = []

    def worker(self, name: str, threads: int) -> Worker:
        spec = worker.Spec(name, threads)
        return self.workers.setdefault(spec, Worker(spec, self.arena))

    def fresh_limits(self, threads: int) -> limits.Limits:
        """Measured less than a minute ago."""
        known = self.limits.get(threads)
        if known is None or time.time() - known.when > LIMITS_AGE:
            found = self.worker(worker.METER, threads).ask("limits", None)
            known = (
                found if isinstance(found, limits.Limits) else limits.Limits(threads, time.time())
            )
            self.limits[threads] = known
        return known

    def names(self, row: Workload) -> Iterator[str]:
        """The peers of a row that were asked for."""
        for name in row.peers or (peer for peer in EVERYONE if peer != "flex"):
            slow = self.quick and name == "flex"  # to compile
            if name.partition(":")[0] in self.peers and not slow:
                yield name

    def measure(self, row: Workload, threads: int) -> None:
        entry: dict[str, Any] = {
            "row": asdict(row),
            "threads": threads,
            "limits": asdict(self.fresh_limits(threads)),
            "results": {},
        }
        if row.group == "memory":
            entry["results"] = {name: self.memory(name, row, threads) for name in self.names(row)}
        else:
            entry["results"] = self.interleaved(row, threads)
        self.rows.append(entry)
        print(report.progress(entry), flush=True)

    def memory(self, name: str, row: Workload, threads: int) -> Any:
        fresh = Worker(worker.Spec(name, threads), self.arena)
        reply = fresh.ask("memory", row)
        fresh.stop()
        return reply if isinstance(reply, str) else {"bytes": reply}

    def interleaved(self, row: Workload, threads: int) -> dict[str, Any]:
        """A sample of each peer in turn, so that what disturbs the machine meets all of them."""
        subjects = {name: self.worker(name, threads) for name in self.names(row)}
        results = {name: subject.ask("prepare", row) for name, subject in subjects.items()}
        if "ours" in subjects:
            self.capability = subjects["ours"].info.get("capability", "")
        samples: dict[str, list[worker.Sample]] = {
            name: [] for name, reply in results.items() if isinstance(reply, worker.Ready)
        }
        started = time.perf_counter()
        for taken in range(self.rounds):
            if taken >= 2 and time.perf_counter() - started > MOST_SECONDS * len(samples):
                break
            for name in list(samples):
                reply = subjects[name].ask("sample", None)
                if isinstance(reply, str):
                    results[name] = reply
                    del samples[name]
                else:
                    samples[name].append(reply)
        for name, taken_samples in samples.items():
            results[name] = asdict(worker.timing(results[name].form, taken_samples))
        return results

    def group(self, name: str, threads: list[int]) -> None:
        rows = [
            row
            for row in GROUPS[name]
            if row.dtype in self.dtypes and (row.quick or not self.quick)
        ]
        for n in threads:
            for row in rows:
                self.measure(row, n)
        for spec in list(self.workers):
            if ":" in spec.name:  # restricted to an instruction set: this group's alone
                self.workers.pop(spec).stop()

    def stop(self) -> None:
        for subject in self.workers.values():
            subject.stop()

    def as_json(self) -> dict[str, Any]:
        machine = limits.machine() | {"CPU kernels": self.capability}
        machine["buffers MiB"] = len(self.arena) // MIB
        return {"machine": machine, "quick": self.quick, "rows": self.rows}


def merged(files: list[Path]) -> dict[str, Any]:
    """The rows of several runs, the later ones in place of the same ones in earlier files."""
    runs: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
    rows = {}
    for run in runs:
        for entry in run["rows"]:
            rows[json.dumps([entry["row"], entry["threads"]])] = entry
    return runs[-1] | {"rows": list(rows.values())}


def write(results: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    try:
        import plots

        pictures = plots.draw(results["rows"], output)
    except ImportError as missing:
        print(f"no plots: {missing}. Make them later with --plots-from {output / 'cpu.json'}")
        pictures = []
    text = report.page(results, pictures)
    (output / "cpu.md").write_text(text)
    print(text)
    print(f"written to {output}", file=sys.stderr)


def arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a sample of the rows, no flex")
    parser.add_argument(
        "--only", type=names, default=list(GROUPS), help=f"groups, of {','.join(GROUPS)}"
    )
    parser.add_argument(
        "--peers", type=names, default=list(EVERYONE), help=f"of {','.join(EVERYONE)}"
    )
    parser.add_argument(
        "--threads",
        type=lambda text: [int(n) for n in text.split(",")],
        default=sorted({1, cores}),
        help="1: by CPU time, more: by wall time (default: 1 and all)",
    )
    parser.add_argument(
        "--dtypes", type=names, default=list(DTYPES), help=f"rows of {','.join(DTYPES)}"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="samples of each peer, in turn (default: 7)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder; default build/benchmarks, or docs/benchmarks/MACHINE for all rows",
    )
    parser.add_argument(
        "--machine",
        help="what to call this machine, which keeps one report, its newest; without it all rows "
        "go to build/benchmarks too",
    )
    parser.add_argument(
        "--plots-from",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="measure nothing: write tables and plots of the cpu.json of one or more earlier runs",
    )
    chosen = parser.parse_args()
    for option, known in (("only", GROUPS), ("peers", EVERYONE), ("dtypes", DTYPES)):
        if unknown := set(getattr(chosen, option)) - set(known):
            parser.error(f"--{option} must be of {', '.join(known)}, got {', '.join(unknown)}")
    if chosen.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {chosen.rounds}")
    if "ours" not in chosen.peers:
        chosen.peers.insert(0, "ours")
    complete = (GROUPS, EVERYONE, DTYPES)
    parts = (chosen.only, chosen.peers, chosen.dtypes)
    partial = chosen.quick or any(len(a) < len(b) for a, b in zip(parts, complete, strict=True))
    if chosen.output is None:
        kept = chosen.machine and (chosen.plots_from or not partial)
        chosen.output = ROOT / (f"docs/benchmarks/{chosen.machine}" if kept else "build/benchmarks")
    return chosen


def main() -> None:
    chosen = arguments()
    if chosen.plots_from:
        write(merged(chosen.plots_from), chosen.output)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run = Run(chosen)
    try:
        for group in chosen.only:
            run.group(group, chosen.threads)
    finally:  # what there is, if it is interrupted
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        run.stop()
        write(run.as_json(), chosen.output)


if __name__ == "__main__":
    main()
