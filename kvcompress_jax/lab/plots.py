"""Figures, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from kvcompress_jax.lab.conversation import Levels
from kvcompress_jax.lab.evaluate import Evaluation
from kvcompress_jax.lab.output import replacing

COLORS = ("#4c72b0", "#dd8452", "#55a868")


def plot_accuracy(
    path: Path,
    recipes: Mapping[str, Evaluation],
    history: Sequence[Levels],
    *,
    title: str,
    kv_bits: int,
) -> None:
    """Accuracy against stored bits for named configurations, and pages per level over time.

    Args:
      path: of the PNG.
      recipes: evaluations by name.
      history: of the conversation.
      title: of the figure.
      kv_bits: of the uncompressed cache.

    Raises:
      OutputError: the file cannot be written.
    """
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        divergence, agreement, levels = figure.subplots(1, 3)
        for axes, field, label in (
            (divergence, "kl_mean", "KL from the uncompressed model, nats per token"),
            (agreement, "top1_agreement", "same most likely next token, share"),
        ):
            for name, evaluation in recipes.items():
                x, y = evaluation.effective_bits, getattr(evaluation, field)
                whole = evaluation.cache_bits
                axes.plot([x, whole], [y, y], color="0.7", zorder=1)
                axes.scatter([x], [y], s=50, color=COLORS[0], zorder=2)
                axes.scatter([whole], [y], s=30, marker="|", color=COLORS[0], zorder=2)
                axes.annotate(name, (x, y), textcoords="offset points", xytext=(2, 7), ha="right")
            axes.set_xlabel("stored bits per value: dot, sealed pages; bar, whole cache")
            axes.set_ylabel(label)
            axes.set_xlim(3, kv_bits + 1)
            axes.grid(alpha=0.3)
        divergence.set_yscale("log")
        agreement.axhline(1.0, color="0.4", linewidth=1)
        agreement.annotate(f"uncompressed, {kv_bits} bits", (kv_bits, 1.0), ha="right", va="bottom")
        agreement.set_ylim(top=1.005)
        steps = range(len(history))
        levels.stackplot(
            steps,
            [h.level_2 for h in history],
            [h.level_1 for h in history],
            [h.level_0 for h in history],
            labels=("level 2, INT4", "level 1, INT8 for the important", "level 0, raw"),
            colors=COLORS,
        )
        levels.set_xlabel("steps: reading, then answering")
        levels.set_ylabel("pages on the device")
        levels.legend(loc="upper left", fontsize=8)
        figure.suptitle(title)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
