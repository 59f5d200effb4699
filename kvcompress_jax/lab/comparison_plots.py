"""Figures of a comparison, as PNG."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvcompress_jax.lab.compare import UNCOMPRESSED_NAME, Comparison
from kvcompress_jax.lab.leaderboard import Row, rows
from kvcompress_jax.lab.output import replacing

STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X<>"
PANELS = (
    ("kl", "KL from the uncompressed model, nats per token"),
    ("top1", "same most likely next token, share"),
    ("retrieval", "facts recalled, share"),
)


def plot_accuracy_against_bits(path: Path, comparison: Comparison) -> None:
    """A row of panels for each model, a line for each method, the uncompressed model across; no
    panel for what was not measured.

    Raises:
      OutputError: the file cannot be written.
    """
    models = list(dict.fromkeys(r.model for r in comparison.results))
    names = dict.fromkeys(r.method for r in comparison.results)
    methods = [name for name in names if name != UNCOMPRESSED_NAME]
    recalled = any(not math.isnan(r.fidelity.retrieval) for r in comparison.results)
    shown = PANELS if recalled else PANELS[:-1]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(5 * len(shown) + 2, 5.2 * len(models)), layout="constrained")
        grid = figure.subplots(len(models), len(shown), squeeze=False)
        for panels, model in zip(grid, models, strict=True):
            table = rows(comparison.results, model)
            for axes, (field, label) in zip(panels, shown, strict=True):
                _panel(axes, table, field, label, methods)
            panels[0].set_yscale("log")
            panels[0].set_title(model)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")


def _panel(
    axes: Axes, table: Sequence[Row], field: str, label: str, methods: Sequence[str]
) -> None:
    """Methods look alike in all panels: how one looks depends on its place among `methods`."""
    here = {row.method for row in table}
    for i, name in enumerate(methods):
        if name not in here:
            continue
        points = sorted((r.bits, getattr(r, field)) for r in table if r.method == name)
        axes.plot(
            [bits for bits, _ in points],
            [y for _, y in points],
            STYLES[i // 10 % len(STYLES)],
            marker=MARKERS[i % len(MARKERS)],
            color=f"C{i % 10}",
            markersize=4,
            label=name,
        )
    for row in table:
        if row.method == UNCOMPRESSED_NAME and field != "kl":  # its KL is 0, which has no logarithm
            axes.axhline(getattr(row, field), color="0.3", linewidth=1)
            axes.annotate(
                f"uncompressed, {row.bits:g} bits",
                (0.99, getattr(row, field)),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
            )
    axes.set_xlabel("stored bits per value, everything counted")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def plot_recall(path: Path, comparison: Comparison, *, title: str) -> None:
    """A map for each method: depth of the fact against length of the context.

    Raises:
      OutputError: the file cannot be written.
    """
    cells = comparison.recalled
    keys = list(dict.fromkeys((r.model, r.method) for r in cells))
    columns = min(6, len(keys))
    lines = -(-len(keys) // columns)
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(2.2 * columns + 1, 2.4 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        image = None
        for axes in grid.flat:
            axes.set_visible(False)
        for axes, (model, method) in zip(grid.flat, keys, strict=False):
            own = [r for r in cells if (r.model, r.method) == (model, method)]
            shares = np.array([r.share_by_depth for r in own]).T
            axes.set_visible(True)
            image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axes.set_xticks(range(len(own)), [str(r.context) for r in own])
            axes.set_yticks([0, len(shares) - 1], ["begin", "end"])
            axes.set_title(f"{method}\n{model}" if len({m for m, _ in keys}) > 1 else method)
        figure.suptitle(title)
        figure.supxlabel("tokens of context")
        figure.supylabel("depth of the fact")
        if image is not None:
            figure.colorbar(image, ax=grid, label="share recalled", shrink=0.6)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
