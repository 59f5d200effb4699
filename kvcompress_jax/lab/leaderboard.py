"""Results of a comparison as Markdown and as JSON."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from kvcompress_jax.lab.compare import UNCOMPRESSED_NAME, Comparison, Result, Setting


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one rate on one model, mean over texts."""

    method: str
    target_bits: float
    bits: float
    kl: float
    kl_by_text: tuple[float, ...]
    kl_p99: float
    delta_nll: float
    top1: float
    retrieval: float


def rows(results: Sequence[Result], model: str) -> list[Row]:
    """Means over the texts of one model, best first at each rate, the uncompressed model first."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.model == model:
            groups.setdefault((result.method, result.settings), []).append(result)
    found = []
    for (method, _), group in groups.items():
        f = [result.fidelity for result in group]
        found.append(
            Row(
                method=method,
                target_bits=group[0].target_bits,
                bits=float(np.mean([x.bits for x in f])),
                kl=float(np.mean([x.kl_mean for x in f])),
                kl_by_text=tuple(x.kl_mean for x in f),
                kl_p99=float(np.mean([x.kl_p99 for x in f])),
                delta_nll=float(np.mean([x.delta_nll for x in f])),
                top1=float(np.mean([x.top1_agreement for x in f])),
                retrieval=float(np.mean([x.retrieval for x in f])),
            )
        )
    return sorted(found, key=lambda r: (r.method != UNCOMPRESSED_NAME, -r.target_bits, r.kl))


def as_markdown(comparison: Comparison, setting: Setting, *, command: str) -> str:
    """A table for each model and rate."""
    texts = list(dict.fromkeys(r.text for r in comparison.results))
    lines = [
        "# Leaderboard",
        "",
        f"    {command}",
        "",
        f"{setting.context} tokens of context are compressed, {setting.continuation} tokens are"
        f" teacher-forced on them. The first {setting.sinks} and the newest {setting.window} tokens"
        f" are exact in every method, at the bits of {setting.kv_dtype}. *Bits* are stored bits per"
        " value of the whole context, everything counted: codes, scales, zero points, indices,"
        " tables, exact tokens. KL is from the uncompressed model, in nats per token, best first;"
        f" means over {', '.join(texts)}. JAX {jax.__version__}, {jax.default_backend()}.",
    ]
    for model in dict.fromkeys(r.model for r in comparison.results):
        table = rows(comparison.results, model)
        for target in setting.bits:
            chosen = [r for r in table if r.target_bits == target]
            if not chosen:
                continue
            lines += ["", f"## {model}, about {target:g} bits", ""]
            by_text = "".join(f" KL {text} |" for text in texts) if len(texts) > 1 else ""
            columns = f"| method | bits | KL |{by_text} KL p99 | ΔNLL | same top token | recalled |"
            lines += [columns, "|" + "---|" * (columns.count("|") - 1)]
            lines += [_line(r, len(texts) > 1) for r in [*_uncompressed(table), *chosen]]
    return "\n".join(lines) + "\n"


def _uncompressed(table: Sequence[Row]) -> list[Row]:
    return [r for r in table if r.method == UNCOMPRESSED_NAME]


def _line(row: Row, several: bool) -> str:
    by_text = "".join(f" {kl:.5f} |" for kl in row.kl_by_text) if several else ""
    recalled = "-" if math.isnan(row.retrieval) else f"{row.retrieval:.0%}"
    return (
        f"| {row.method} | {row.bits:.2f} | {row.kl:.5f} |{by_text} {row.kl_p99:.4f} |"
        f" {row.delta_nll:+.4f} | {row.top1:.1%} | {recalled} |"
    )


def as_json(comparison: Comparison, setting: Setting, *, command: str) -> dict[str, object]:
    """Every measurement."""
    settings = dataclasses.asdict(setting)
    settings["profiles"] = [str(path) for path in setting.profiles]
    return {
        "command": command,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "setting": settings,
        "results": [dataclasses.asdict(r) for r in comparison.results],
        "recalled": [dataclasses.asdict(r) for r in comparison.recalled],
    }
