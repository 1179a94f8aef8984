"""A table and pictures of what gpu_attention.py measured; needs matplotlib.

python benchmarks/gpu_report.py build/gpu.json docs/benchmarks/h100
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {
    "ours": "#c0392b",
    "FA3": "#2c6fbb",
    "cuDNN": "#e0a030",
    "FA2": "#8e8e8e",
    "ours, bfloat16": "#e59c93",
    "ours, descales": "#7d261c",
}


def rate(row: dict[str, Any], peer: str) -> float:
    """In the row's unit."""
    return float(row["amount"] / row["seconds"][peer] / 1e12)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Microseconds and rates of every peer, and ours beside FlashAttention-3's."""
    peers = [p for p in COLOURS if any(p in row["seconds"] for row in rows)]
    lines = [f"| | {' | '.join(peers)} | ours beside FA3 |", "|---" * (len(peers) + 2) + "|"]
    for row in rows:
        seconds = row["seconds"]
        cells = [
            f"{seconds[p] * 1e6:.1f} µs, {rate(row, p):.3g} {row['unit']}" if p in seconds else "-"
            for p in peers
        ]
        beside = f"{seconds['FA3'] / seconds['ours']:.2f}" if "FA3" in seconds else "-"
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {beside} |")
    return lines


def picture(rows: list[dict[str, Any]], limit: float | None, path: Path) -> None:
    """A group of bars for each row, one bar a peer, and the machine's limit as a line."""
    peers = [p for p in COLOURS if any(p in row["seconds"] for row in rows)]
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(rows) + 1.2))
    height = 0.85 / len(peers)
    for i, peer in enumerate(peers):
        there = [n for n, row in enumerate(rows) if peer in row["seconds"]]
        places = [n + i * height for n in there]
        values = [rate(rows[n], peer) for n in there]
        axes.barh(places, values, height, label=peer, color=COLOURS[peer])
    if limit is not None:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1, label="measured limit")
    axes.set_yticks([n + 0.4 for n in range(len(rows))], [row["name"] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(rows[0]["unit"])
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(measured: Path, folder: Path) -> None:
    found = json.loads(measured.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    limits = found["limits"]
    lines = [f"# Attention on {found['device']}", ""]
    if limits:
        lines += [
            f"Copies run at {limits['TB/s']:.2f} TB/s, matrix products at {limits['TF']:.0f} TF.",
            "",
        ]
    lines += [f"{found.get('note', 'Every table is of one run.')}", ""]
    for section in dict.fromkeys(row["section"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["section"] == section]
        picture(rows, limits.get(rows[0]["unit"]), folder / f"{section}.png")
        lines += [f"## {section.capitalize()}", "", *table(rows), "", f"![]({section}.png)", ""]
    (folder / "gpu.md").write_text("\n".join(lines[:-1]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
