"""Methods by name, each at the bits that are asked for."""

import dataclasses
import functools
from collections.abc import Callable

from kvcompress_jax.config import RECIPES, CompressionConfig, ConfigError
from kvcompress_jax.importance import MAGNITUDES
from kvcompress_jax.importance.policies import POLICIES
from kvcompress_jax.importance.policies.base import Policy
from kvcompress_jax.lab.methods.base import Method
from kvcompress_jax.lab.methods.calibrated import Calibrated
from kvcompress_jax.lab.methods.embedded import Embedded
from kvcompress_jax.lab.methods.evict import Evict
from kvcompress_jax.lab.methods.fp8 import Fp8
from kvcompress_jax.lab.methods.kivi import Kivi
from kvcompress_jax.lab.methods.kvquant import KVQuant
from kvcompress_jax.lab.methods.minicache import MiniCache
from kvcompress_jax.lab.methods.per_token import PerToken
from kvcompress_jax.lab.methods.specification import LEVEL_BITS, LiteralSpecification
from kvcompress_jax.lab.methods.turboquant import TurboQuant

CACHE_BITS = 16
_COMPACT_BITS = 4.63  # of the recipe, scales and tables counted
_EVEN_BITS = 6.25  # from here on, half of a fine plane: the recipes of 6.63 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a factory is asked for.

    Attributes:
      bits: about so many per value, overheads included.
      fingerprint: of the model.
      profiles: files that calibration wrote for this model, and the bits that each was made for.
    """

    bits: float
    fingerprint: str = ""
    profiles: tuple[tuple[str, float], ...] = ()


Factory = Callable[[Wanted], Method | None]
"""None: the method has no variant near these bits, or lacks its profile."""


def _integers(make: Callable[[int], Method], wanted: Wanted) -> Method | None:
    """Codes of the bits' whole part: scales and zero points take about half a bit more."""
    bits = int(wanted.bits)
    return make(bits) if 2 <= bits <= 8 else None


def _embedded(wanted: Wanted) -> Method | None:
    partly = _partly(RECIPES["balanced"], wanted)
    if partly is not None:
        return Embedded(config=partly)
    for least, name in ((7.5, "safe"), (4.5, "compact"), (4.0, "extreme")):
        if wanted.bits >= least:
            return Embedded(config=RECIPES[name])
    return None


def _partly(config: CompressionConfig, wanted: Wanted) -> CompressionConfig | None:
    """Some tokens of a page refined, as many as are paid for, to half of a fine plane; by 4 bits
    or by 2, as the configuration has it."""
    if not _COMPACT_BITS + 0.125 <= wanted.bits < 7.5:
        return None
    rows = round((wanted.bits - _COMPACT_BITS) / 4 * config.page_size)
    ratio = rows / config.page_size if wanted.bits < _EVEN_BITS else 0.5
    return dataclasses.replace(config, ratio=ratio)


def _drawn(wanted: Wanted) -> Method | None:
    """Tokens that are refined as in `embedded`, or where that refines all, by 4 bits: drawn."""
    config = _partly(RECIPES["balanced" if wanted.bits < _EVEN_BITS else "mixed"], wanted)
    return None if config is None else Embedded(config=config, random_selection=0)


def _calibrated(wanted: Wanted) -> Method | None:
    """The profile of the most bits that are not above."""
    fitting = [(bits, path) for path, bits in wanted.profiles if bits <= wanted.bits + 0.05]
    if not fitting or max(fitting)[0] < wanted.bits - 0.5:
        return None
    return Calibrated(profile=max(fitting)[1], fingerprint=wanted.fingerprint)


def _mixed(magnitude: str, wanted: Wanted) -> Method | None:
    """Some tokens at 8 bits, the others at 4."""
    config = _partly(dataclasses.replace(RECIPES["mixed"], magnitude=magnitude), wanted)
    return None if config is None else Embedded(config=config)


def _fp8(wanted: Wanted) -> Method | None:
    return Fp8() if wanted.bits >= 8 else None


def _specification(wanted: Wanted) -> Method | None:
    level = 1 if wanted.bits >= 4 else 2
    share = wanted.bits / (LEVEL_BITS[level] + 0.25)
    return LiteralSpecification(level=level, ratio=min(share, 1.0))


def _minicache(wanted: Wanted) -> Method | None:
    """A quarter of the cache is saved; the rest must come from quantising what is left."""
    if wanted.bits > 12:
        return MiniCache()
    bits = int(wanted.bits / 0.77)
    return MiniCache(then=Kivi(bits=bits)) if 2 <= bits <= 8 else None


def _evict(policy: Policy, wanted: Wanted) -> Method | None:
    return Evict(policy=policy, keep_share=min(wanted.bits / CACHE_BITS, 1.0))


def _evict_half(policy: Policy, quantiser: Factory, wanted: Wanted) -> Method | None:
    """Half of the tokens, at twice the bits."""
    then = quantiser(dataclasses.replace(wanted, bits=2 * wanted.bits))
    return None if then is None else Evict(policy=policy, keep_share=0.5, then=then)


def _recipe(name: str, wanted: Wanted) -> Method | None:
    return Embedded(config=RECIPES[name])


_QUANTISERS: dict[str, Factory] = {
    "embedded": _embedded,
    "kivi": functools.partial(_integers, lambda bits: Kivi(bits=bits)),
    "kvquant": functools.partial(_integers, lambda bits: KVQuant(bits=bits)),
    "kvquant-nu": functools.partial(_integers, lambda bits: KVQuant(bits=bits, non_uniform=True)),
    "turboquant": functools.partial(_integers, lambda bits: TurboQuant(bits=bits)),
    "turboquant-centered": functools.partial(
        _integers, lambda bits: TurboQuant(bits=bits, centered=True)
    ),
    "per-token": functools.partial(_integers, lambda bits: PerToken(bits=bits)),
    "per-token-symmetric": functools.partial(
        _integers, lambda bits: PerToken(bits=bits, symmetric=True)
    ),
    "fp8": _fp8,
}


def _other_rounding(feeds_back: bool, wanted: Wanted) -> Method | None:
    """`embedded` with error feedback, or without, where its recipe has it the other way."""
    method = _embedded(wanted)
    if not isinstance(method, Embedded) or method.config.feeds_errors_back == feeds_back:
        return None
    return Embedded(config=dataclasses.replace(method.config, error_feedback=feeds_back))


_EVICTIONS: dict[str, Factory] = {
    "evict-" + name: functools.partial(_evict, policy) for name, policy in POLICIES.items()
}

METHODS: dict[str, Factory] = {
    "calibrated": _calibrated,
    **_QUANTISERS,
    "embedded-feedback": functools.partial(_other_rounding, True),
    "embedded-nearest": functools.partial(_other_rounding, False),
    "random-selection": _drawn,
    **{f"importance-{name}": functools.partial(_mixed, name) for name in MAGNITUDES},
    "specification": _specification,
    "minicache": _minicache,
    **_EVICTIONS,
    **{f"recipe-{name}": functools.partial(_recipe, name) for name in RECIPES},
    **{
        f"evict-{name}+{other}": functools.partial(_evict_half, policy, quantiser)
        for name, policy in POLICIES.items()
        for other, quantiser in _QUANTISERS.items()
    },
}
"""Name to factory. `policy+quantiser` evicts half of the tokens and quantises the others."""

ALL = (
    "calibrated",
    *_QUANTISERS,
    "embedded-feedback",
    "embedded-nearest",
    "random-selection",
    "specification",
    "minicache",
    *_EVICTIONS,
    "evict-snapkv+kivi",
    "evict-h2o+kivi",
)
"""What `all` stands for: every method once, without all the combinations."""

IMPORTANCES = (
    *(name for name in METHODS if name.startswith("importance-")),
    "random-selection",
    "kivi",
)
"""What `importances` stands for: ways to choose the tokens of 8 bits, and one width for all."""

GROUPS = {"all": ALL, "importances": IMPORTANCES}


class MethodError(ConfigError):
    """A method that does not exist."""


def find_methods(names: str) -> tuple[str, ...]:
    """The names in a list with commas, where those of `GROUPS` stand for several.

    Raises:
      MethodError: one of them does not exist.
    """
    found: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name in GROUPS:
            found += GROUPS[name]
        elif name in METHODS:
            found.append(name)
        else:
            known = ", ".join((*GROUPS, *(n for n in METHODS if "+" not in n)))
            raise MethodError(
                f"methods: expected {known}, or one of evict-POLICY+QUANTISER, got {name!r}"
            )
    return tuple(dict.fromkeys(found))
