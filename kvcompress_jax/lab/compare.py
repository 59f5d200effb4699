"""Many methods, models and texts at matched bits."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kvcompress_jax.calibrated.profile import read_origin
from kvcompress_jax.lab.bench import Bench, Fidelity, Recall, compress
from kvcompress_jax.lab.methods.base import UNCOMPRESSED, Method
from kvcompress_jax.lab.methods.registry import METHODS, Wanted
from kvcompress_jax.lab.replay import capture
from kvcompress_jax.lab.retrieval import plant_facts
from kvcompress_jax.models.load import Model

UNCOMPRESSED_NAME = "uncompressed"
FACT_SPACING_TOKENS = 32  # a fact for every so many tokens of a context
DEPTHS = 8

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all methods are measured with. Sizes are in tokens.

    Attributes:
      bits: per value, at which methods are compared.
      context: compressed.
      continuation: teacher-forced on it.
      sinks: first ones, exact in every method.
      window: newest ones, exact in every method.
      facts: planted for the retrieval measure; 0 skips it.
      kv_dtype: of the uncompressed cache.
      profiles: of calibrated codes, for any of the models and rates.
      heat_bits: of `bits`, those of the retrieval heat map; None: no heat map.
    """

    bits: tuple[float, ...] = (8.0, 4.5, 3.5, 2.5)
    context: int = 1024
    continuation: int = 256
    sinks: int = 4
    window: int = 0
    facts: int = 32
    kv_dtype: str = "bfloat16"
    profiles: tuple[Path, ...] = ()
    heat_bits: float | None = None

    def __post_init__(self) -> None:
        if not self.bits or not all(1 <= b <= 16 for b in self.bits):
            raise ValueError(f"bits: expected numbers of 1 to 16, got {self.bits}")
        if self.heat_bits is not None and self.heat_bits not in self.bits:
            raise ValueError(f"heat_bits: expected one of {self.bits}, got {self.heat_bits}")

    @property
    def heat_contexts(self) -> tuple[int, ...]:
        """Lengths of the contexts of the heat map."""
        return tuple(self.context // n for n in (4, 2, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One method at one rate on one model and text."""

    model: str
    text: str
    method: str
    settings: str
    target_bits: float
    fidelity: Fidelity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recalled:
    """Share of the facts recalled by depth (0: the beginning), of one method and context."""

    model: str
    method: str
    context: int
    share_by_depth: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that was measured."""

    results: tuple[Result, ...]
    recalled: tuple[Recalled, ...]


def compare(
    models: Sequence[Model],
    texts: Mapping[str, str],
    methods: Sequence[str],
    setting: Setting,
    *,
    known: Comparison = Comparison((), ()),
    progress: Progress = lambda stage, share: None,
    measured: Callable[[Comparison], None] = lambda found: None,
) -> Comparison:
    """Measures every method at every rate on every model and text.

    Args:
      models: with tokenizers.
      texts: by name.
      methods: names of `METHODS`. One that has no variant at a rate is left out there, and one
        that has the same variant at several is measured once, for the rate closest to its bits.
      setting: sizes and rates.
      known: measured before, with these sizes and on these texts: not measured again, nor returned.
      progress: is told the stage and the share of it that is done.
      measured: is given all there is after every variant of a method.

    Raises:
      TextError: a text is too short.
    """
    results: list[Result] = []
    recalled: list[Recalled] = []
    for model in models:
        done = {(r.text, r.method, r.settings) for r in known.results if r.model == model.name}
        missing = [
            (name, rates, method)
            for name, rates, method in variants(methods, setting, model)
            if any((text, name, repr(method)) not in done for text in texts)
        ]
        if not missing:
            continue
        benches = {}
        for name, text in texts.items():
            progress(f"{model.name}: {name}", 0.0)
            benches[name] = Bench(
                model,
                text,
                context_tokens=setting.context,
                continuation_tokens=setting.continuation,
                facts=setting.facts,
                sinks=setting.sinks,
                window=setting.window,
                kv_dtype=setting.kv_dtype,
            )
            progress(f"{model.name}: {name}", 1.0)

        results += [
            Result(
                model=model.name,
                text=name,
                method=UNCOMPRESSED_NAME,
                settings=repr(UNCOMPRESSED),
                target_bits=math.nan,
                fidelity=bench.uncompressed,
            )
            for name, bench in benches.items()
            if (name, UNCOMPRESSED_NAME, repr(UNCOMPRESSED)) not in done
        ]
        for i, (method_name, rates, method) in enumerate(missing):
            for name, bench in benches.items():
                if (name, method_name, repr(method)) in done:
                    continue
                fidelity = bench.measure(method)
                results.append(
                    Result(
                        model=model.name,
                        text=name,
                        method=method_name,
                        settings=repr(method),
                        target_bits=closest(rates, fidelity.bits),
                        fidelity=fidelity,
                    )
                )
            progress(f"{model.name}: methods", (i + 1) / len(missing))
            measured(Comparison(tuple(results), tuple(recalled)))
        if setting.heat_bits is not None:
            chosen: list[tuple[str, Method]] = [(UNCOMPRESSED_NAME, UNCOMPRESSED)]
            chosen += [(n, m) for n, rates, m in missing if setting.heat_bits in rates]
            recalled += _heat(model, texts, chosen, setting, progress)
    return Comparison(tuple(results), tuple(recalled))


def variants(
    methods: Sequence[str], setting: Setting, model: Model
) -> list[tuple[str, tuple[float, ...], Method]]:
    """Every method's variants by name, and the rates that each was offered for."""
    profiles = tuple((str(p), read_origin(p)) for p in setting.profiles)
    own = tuple((path, o.bits) for path, o in profiles if o.fingerprint == model.fingerprint)
    found: dict[tuple[str, Method], tuple[float, ...]] = {}
    for name in methods:
        for bits in setting.bits:
            method = METHODS[name](Wanted(bits=bits, fingerprint=model.fingerprint, profiles=own))
            if method is not None:
                found[name, method] = (*found.get((name, method), ()), bits)
    return [(name, rates, method) for (name, method), rates in found.items()]


def closest(rates: Sequence[float], bits: float) -> float:
    """Of the rates, the one that a method of so many bits is compared at."""
    return min(rates, key=lambda rate: abs(rate - bits))


def _heat(
    model: Model,
    texts: Mapping[str, str],
    methods: Sequence[tuple[str, Method]],
    setting: Setting,
    progress: Progress,
) -> list[Recalled]:
    assert model.tokenizer is not None  # the benches said so
    found: list[Recalled] = []
    stage = f"{model.name}: retrieval"
    depths = min(DEPTHS, _facts(min(setting.heat_contexts)))
    steps, done = len(setting.heat_contexts) * len(methods), 0
    for context in setting.heat_contexts:
        recalls = []
        for i, text in enumerate(texts.values()):
            tokens = model.tokenizer.encode(text, add_special=True)
            planted = plant_facts(
                model.tokenizer, tokens, context_tokens=context, facts=_facts(context), seed=i
            )
            seen = capture(
                model,
                planted.context,
                sinks=setting.sinks,
                window=setting.window,
                kv_dtype=setting.kv_dtype,
            )
            recalls.append(Recall(model, planted, seen))
        for name, method in methods:
            hits = np.mean([r.measure(compress(method, r.context)) for r in recalls], axis=0)
            bins = np.array_split(hits, depths)
            shares = tuple(float(part.mean()) for part in bins)
            found.append(
                Recalled(model=model.name, method=name, context=context, share_by_depth=shares)
            )
            done += 1
            progress(stage, done / steps)
    return found


def _facts(context: int) -> int:
    """How many facts are planted in a context of the heat map."""
    return min(32, context // FACT_SPACING_TOKENS)
