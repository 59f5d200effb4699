"""Results of a comparison as Markdown and as JSON."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvcompress_jax.lab.bench import Fidelity
from kvcompress_jax.lab.compare import (
    UNCOMPRESSED_NAME,
    Comparison,
    Recalled,
    Result,
    Setting,
)

OURS = ("calibrated", "embedded", "recipe-")  # how the names of our own methods begin
CONTROLS = ("random-selection", "importance-")  # other choices of tokens, on neither side
SIZES = ("context", "continuation", "sinks", "window", "facts", "kv_dtype")
TIE = 1.5  # KL on a text of this length is not more certain than by such a factor


class OtherLeaderboardError(ValueError):
    """Measurements that those of now cannot stand beside."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one rate on one model, mean over texts."""

    method: str
    target_bits: float
    bits: float
    kl: float
    kl_by_text: Mapping[str, float]
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
                kl_by_text={result.text: result.fidelity.kl_mean for result in group},
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
        *_verdict(comparison, setting),
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
            shown = texts if len(texts) > 1 else []
            lines += [_line(r, shown) for r in [*_uncompressed(table), *chosen]]
    return "\n".join(lines) + "\n"


def _verdict(comparison: Comparison, setting: Setting) -> list[str]:
    """Our best against the best of the others, for each model and rate; nothing without both."""
    lines = []
    for model in dict.fromkeys(r.model for r in comparison.results):
        table = rows(comparison.results, model)
        for target in setting.bits:
            at = [r for r in table if r.target_bits == target]
            ours = [r for r in at if r.method.startswith(OURS)]
            others = [r for r in at if not r.method.startswith((*OURS, *CONTROLS))]
            if ours and others:
                lines.append(_duel(model, target, ours[0], others[0]))
    if not lines:
        return []
    columns = "| model | about bits | best of ours | best of the others | KL, others to ours |"
    return [
        "",
        "## Ours beside the best of the others",
        "",
        "Bits, KL and share of facts recalled of either. Which is better is said where the KLs are"
        f" a factor of {TIE:g} apart on average and no text says otherwise; less is noise.",
        "",
        f"{columns} better |",
        "|" + "---|" * (columns.count("|")),
        *lines,
    ]


def _duel(model: str, target: float, ours: Row, other: Row) -> str:
    texts = [text for text in ours.kl_by_text if text in other.kl_by_text]
    ratios = [other.kl_by_text[text] / ours.kl_by_text[text] for text in texts]
    ratio = other.kl / ours.kl
    if ratio >= TIE and min(ratios) > 1:
        better = "ours"
    elif ratio <= 1 / TIE and max(ratios) < 1:
        better = f"**{other.method}**"
    else:
        better = "tie"
    by_text = ", ".join(f"{text} {r:.2f}" for text, r in zip(texts, ratios, strict=True))

    def cell(row: Row) -> str:
        recalled = "" if math.isnan(row.retrieval) else f", {row.retrieval:.0%}"
        return f"{row.method}: {row.bits:.2f}, {_nats(row.kl)}{recalled}"

    return (
        f"| {model} | {target:g} | {cell(ours)} | {cell(other)} | {ratio:.2f} ({by_text}) |"
        f" {better} |"
    )


def _nats(kl: float) -> str:
    return f"{kl:.1e}" if 0 < kl < 1e-4 else f"{kl:.5f}"


def _uncompressed(table: Sequence[Row]) -> list[Row]:
    return [r for r in table if r.method == UNCOMPRESSED_NAME]


def _line(row: Row, texts: Sequence[str]) -> str:
    kls = [row.kl_by_text.get(text) for text in texts]
    by_text = "".join(" - |" if kl is None else f" {_nats(kl)} |" for kl in kls)
    recalled = "-" if math.isnan(row.retrieval) else f"{row.retrieval:.0%}"
    return (
        f"| {row.method} | {row.bits:.2f} | {_nats(row.kl)} |{by_text} {row.kl_p99:.4f} |"
        f" {row.delta_nll:+.4f} | {row.top1:.1%} | {recalled} |"
    )


def as_json(
    comparison: Comparison, setting: Setting, *, command: str, texts: Mapping[str, str]
) -> dict[str, object]:
    """Every measurement, and what it was made of: texts by their SHA-256."""
    settings = dataclasses.asdict(setting)
    settings["profiles"] = [str(path) for path in setting.profiles]
    return {
        "command": command,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "setting": settings,
        "texts": _digests(texts),
        "results": [dataclasses.asdict(r) for r in comparison.results],
        "recalled": [dataclasses.asdict(r) for r in comparison.recalled],
    }


def from_json(path: Path, setting: Setting, texts: Mapping[str, str]) -> Comparison:
    """What `as_json` wrote to a file.

    Args:
      path: of the file.
      setting: of now: the sizes have to be the same, rates and profiles need not.
      texts: of now, by name.

    Raises:
      OtherLeaderboardError: the file cannot be read, or is of other sizes or texts.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = [{name: found["setting"][name] for name in SIZES}, found["texts"]]
        comparison = Comparison(
            tuple(_result(x) for x in found["results"]),
            tuple(_recalled(x) for x in found["recalled"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise OtherLeaderboardError(f"{path}: expected a leaderboard in JSON, got: {e!r}") from e
    now = [{name: getattr(setting, name) for name in SIZES}, _digests(texts)]
    for what, a, b in zip(("sizes", "texts"), now, before, strict=True):
        if a != b:
            raise OtherLeaderboardError(f"{path}: {what}: expected {a}, got {b}")
    return comparison


def _digests(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def _result(x: dict[str, Any]) -> Result:
    fidelity: dict[str, Any] = {k: math.nan if v is None else v for k, v in x["fidelity"].items()}
    fidelity["recalled"] = tuple(fidelity["recalled"])
    target = math.nan if x["target_bits"] is None else x["target_bits"]
    fields: dict[str, Any] = x | {"target_bits": target, "fidelity": Fidelity(**fidelity)}
    return Result(**fields)


def _recalled(x: dict[str, Any]) -> Recalled:
    fields: dict[str, Any] = x | {"share_by_depth": tuple(x["share_by_depth"])}
    return Recalled(**fields)
