"""Pictures of the measurements in cpu.json; needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from report import NAMES, Entry, limit, seconds, workload
from workloads import EVERYONE, Workload

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = dict(
    zip(
        EVERYONE,
        ("#c0392b", "#2c6fbb", "#8fb8e0", "#8e8e8e", "#e0a030", "#6c4fa3", "#3f9b6b", "#5b3a29"),
        strict=True,
    )
)


def pick(entries: list[Entry], group: str, threads: int) -> list[Entry]:
    return [e for e in entries if workload(e).group == group and e["threads"] == threads]


def bars(axes: Any, entries: list[Entry], title: str, short: Callable[[Workload], str]) -> None:
    """A group of bars for each row, one bar a peer, and the machine's limit as a line."""
    peers = [p for p in EVERYONE if any(seconds(e, p) for e in entries)]
    width = 0.8 / max(len(peers), 1)  # where every peer failed, the limit is still drawn
    for i, peer in enumerate(peers):
        values = []
        for entry in entries:
            t = seconds(entry, peer)
            values.append(0.0 if t is None else workload(entry).value(t))
        places = [n + i * width for n in range(len(entries))]
        axes.bar(places, values, width, label=NAMES[peer], color=COLOURS[peer])
    for n, entry in enumerate(entries):
        label = "limit" if n == 0 else None
        axes.plot(
            [n - width / 2, n + 0.8 - width / 2], [limit(entry)] * 2, "k--", lw=1, label=label
        )
    middle = 0.4 - width / 2
    axes.set_xticks(
        [n + middle for n in range(len(entries))], [short(workload(e)) for e in entries]
    )
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(workload(entries[0]).unit)


def bar_chart(
    entries: list[Entry], group: str, threads: list[int], short: Callable[[Workload], str]
) -> Any:
    """A panel for each dtype and number of threads; None without rows."""
    dtypes = list(dict.fromkeys(e["row"]["dtype"] for e in entries if e["row"]["group"] == group))
    if not dtypes:
        return None
    size = (6 * len(threads), 3 * len(dtypes))
    figure, grid = pyplot.subplots(len(dtypes), len(threads), figsize=size, squeeze=False)
    for line, dtype in zip(grid, dtypes, strict=True):
        for axes, n in zip(line, threads, strict=True):
            chosen = [e for e in pick(entries, group, n) if e["row"]["dtype"] == dtype]
            if group == "decode":  # the tables have the rest
                chosen = [e for e in chosen if e["row"]["page_size"] in (0, 16)]
            if chosen:
                bars(axes, chosen, f"{group}, {dtype}, {clock(n)}", short)
    if group in ("prefill", "train", "varlen"):  # AMX's limit is far above the rest
        for axes in grid.flat:
            axes.set_yscale("log")
    shown: dict[str, Any] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    grid[0][0].legend(shown.values(), shown.keys(), fontsize=7)
    return figure


def clock(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def decode_label(row: Workload) -> str:
    layout = f"pages {row.page_size}" if row.page_size else "dense"
    return f"{row.batch_size}x{row.seqlen_k}\n{layout}"


def seqlen_label(row: Workload) -> str:
    return f"{row.seqlen_q}" + (f"\nd {row.headdim}" if row.kind == "train" else "")


def scaling_chart(entries: list[Entry], threads: list[int]) -> Any:
    """Milliseconds of a decode step against keys, and against sequences."""
    if not any(e["row"]["group"] == "scaling" for e in entries):
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4))
    for axes, name in zip(panels, ("seqlen_k", "batch_size"), strict=True):
        fixed = {"seqlen_k": ("batch_size", 1), "batch_size": ("seqlen_k", 1024)}[name]
        for n, style in zip(threads, ("-o", "--s", ":^", "-.v"), strict=False):
            chosen = [e for e in pick(entries, "scaling", n) if e["row"][fixed[0]] == fixed[1]]
            for peer in ("ours", "sdpa", "vllm"):
                points = [(e["row"][name], seconds(e, peer)) for e in chosen]
                known = [(x, t * 1e3) for x, t in points if t is not None]
                if known:
                    x, y = zip(*known, strict=True)
                    label = f"{NAMES[peer]}, {clock(n)}"
                    axes.plot(x, y, style, ms=4, color=COLOURS[peer], label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel(f"{name} ({fixed[0]} {fixed[1]})")
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    return figure


def memory_chart(entries: list[Entry], threads: list[int]) -> Any:
    """Megabytes beyond the output against keys, on the largest number of threads."""
    chosen = pick(entries, "memory", threads[-1])
    if not chosen:
        return None
    figure, axes = pyplot.subplots(figsize=(6, 4))
    kinds = (
        ("decode", "-o", "1 row"),
        ("prefill", "--s", "512 rows"),
        ("train", ":^", "forward and backward"),
    )
    for kind, style, rows in kinds:
        for peer in ("ours", "sdpa"):
            known = [
                (e["row"]["seqlen_k"], max(e["results"][peer]["bytes"] / 1e6, 0.1))
                for e in chosen
                if e["row"]["kind"] == kind and isinstance(e["results"].get(peer), dict)
            ]
            if known:
                x, y = zip(*known, strict=True)
                axes.plot(x, y, style, color=COLOURS[peer], label=f"{NAMES[peer]}, {rows}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("seqlen_k")
    axes.set_ylabel(f"MB beyond the output, {clock(threads[-1])}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def draw(entries: list[Entry], output: Path) -> list[str]:
    """Writes the pictures that the rows allow; their file names."""
    threads = sorted({entry["threads"] for entry in entries})
    charts = {
        "decode.png": bar_chart(entries, "decode", threads, decode_label),
        "prefill.png": bar_chart(entries, "prefill", threads, seqlen_label),
        "train.png": bar_chart(entries, "train", threads, seqlen_label),
        "scaling.png": scaling_chart(entries, threads),
        "memory.png": memory_chart(entries, threads),
    }
    drawn = {name: figure for name, figure in charts.items() if figure is not None}
    for name, figure in drawn.items():
        figure.tight_layout()
        figure.savefig(output / name, dpi=100)
        pyplot.close(figure)
    return list(drawn)
