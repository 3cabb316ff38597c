"""The plot of README: share of the machine's limit by shape, ours beside torch SDPA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

matplotlib.use("svg")

# Middle tones on no background: readable on a white page and on a black one.
INK, OURS, SDPA = "#808891", "#3d8bfd", "#e08a1e"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastattn",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
TITLES = {
    "forward": "forward, share of the fp32 FMA peak",
    "training": "forward + backward, share of the fp32 FMA peak",
    "decode": "decode, share of the read bandwidth",
}
COLUMNS = {"float32": "fp32", "bfloat16": "bf16"}
Row = dict[str, Any]


def draw(rows: list[Row], path: Path, digest: str) -> None:
    """An SVG whose bytes follow from the rows alone; ``digest`` says which rows they were."""
    kinds = [kind for kind in TITLES if any(row["kind"] == kind for row in rows)]
    names = {kind: list(dict.fromkeys(name(row) for row in rows if row["kind"] == kind)) for kind in kinds}
    heights = [len(names[kind]) for kind in kinds]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(kinds), len(COLUMNS), figsize=(9.5, 0.2 * sum(heights) + 0.6 * len(kinds) + 0.4),
            sharex=True, squeeze=False, height_ratios=heights, layout="constrained",
        )  # fmt: skip
        for kind, axes in zip(kinds, grid):
            for axis, (dtype, title) in zip(axes, COLUMNS.items()):
                chosen = {name(r): r for r in rows if r["kind"] == kind and r["dtype"] == dtype}
                panel(axis, names[kind], chosen)
                axis.set_title(f"{title}: {TITLES[kind]}", fontsize=9, loc="left")
            axes[1].set_yticklabels([])
        handles, texts = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", frameon=False, ncols=len(texts))
        figure.savefig(path, transparent=True, metadata={"Date": None, "Description": digest})
        plt.close(figure)


def name(row: Row) -> str:
    """A shape, as short as can be."""
    return f"{row['model']}: {row['work']}".replace(", batch 1", "").replace(" tokens", "")


def panel(axis: Axes, names: list[str], rows: dict[str, Row]) -> None:
    """One dumbbell per shape: SDPA, ours, and a tick at what is required."""
    for y, shape in enumerate(names):
        if shape not in rows:
            continue
        row = rows[shape]
        ours, theirs = row["share_of_limit"], row["rate"]["sdpa"] / row["limit"]
        least = row["required"].get("share")
        axis.plot([theirs, ours], [y, y], color=INK, linewidth=1, alpha=0.6, zorder=1)
        axis.plot(theirs, y, "o", color=SDPA, markersize=4.5, label=label(axis, "torch SDPA"))
        axis.plot(ours, y, "o", color=OURS, markersize=5.5, label=label(axis, "fastattn"))
        if least:
            axis.plot(least, y, "|", color=INK, markersize=8, label=label(axis, "required"))
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axis.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def label(axis: Axes, text: str) -> str:
    """Each name once in the legend."""
    return "_" + text if text in axis.get_legend_handles_labels()[1] else text
