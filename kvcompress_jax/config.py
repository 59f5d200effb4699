"""What the user decides about compression, from code, a file or the environment."""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcompress_jax.calibrated.row import RowLayout
from kvcompress_jax.importance import ATTENTIONS, MAGNITUDES, ImportanceRule, ImportanceWeights
from kvcompress_jax.kernels.native import SWITCH
from kvcompress_jax.paged.layout import PAGE_SIZES, CacheLayout
from kvcompress_jax.quality import Measured, QualityBound


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message names it, what was expected and what came."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """How a cache is compressed. Sizes are in tokens.

    Attributes:
      enabled: False keeps every page at level 0.
      levels: storage levels in use: 1 = {0}, 2 = {0, 1}, 3 = {0, 1, 2}. With two levels there is
        nothing below INT8, so every token of a sealed page has 8 bits.
      ratio: share of the fine plane's bytes that a page has at level 1, in (0, 1].
      fine_bits: how they are spent. 4: on the share `ratio` of a page's tokens, the most important
        ones of each head, which have 8 bits; the others have 4. 2: on twice as many, which have 6
        bits; that needs three levels and a `ratio` of at most 0.5, where all tokens have them.
        None: 2 where that can be, which keeps more in the same bytes, and no other setting would be
        for nothing (with all tokens alike, other `weights`, `magnitude` or `attention` than the
        default, and `learned_importance`), else 4.
      page_size: tokens of a page: 16, 32, 64, 128 or 256.
      window_tokens: this many newest tokens of a sequence stay at level 0.
      sink_tokens: this many first tokens of a sequence stay exact.
      seal_level: level that a page gets when it leaves the window: 1, or 2 to start at the bottom.
      demote_after_tokens: a page goes from level 1 to 2 when its last token is so many tokens
        old; None: only under memory pressure.
      floor_layers: layers that never go below level 1; negative numbers count from the end.
      host_bytes: host memory for fine planes that left the device, so that their pages can be
        promoted again; 0 keeps none, and promotion is refused.
      promote_heat: a page at level 2 is promoted when it is more than so many times hotter than
        the median of all sealed pages, while only pages no hotter than the median are demoted for
        their age (hysteresis); at least 1.
      heat_decay: what is left of a page's heat after a step; in (0, 1).
      disk_path: folder for fine planes that find no room in host memory, and for this cache alone;
        None: they are lost.
      disk_bytes: of the files in it.
      prefix_cache_bytes: None: every prompt is fed from its beginning. Otherwise sealed pages stay
        on the device, for later prompts with the same beginning, until there is need of them, and
        so much host memory is for the raw pages of the window at the end of such a beginning;
        without a window it may be 0.
      profile: file of a calibrated code (`kvcompress calibrate`): sealed pages then have level 3,
        below all others, and `levels`, `ratio` and `seal_level` do not matter.
      weights: of the importance that orders the tokens of a page.
      magnitude: name of the magnitude score, see `kvcompress_jax.importance.MAGNITUDES`.
      attention: name of the attention score, see `kvcompress_jax.importance.ATTENTIONS`.
      learned_importance: file of a trained importance (`kvcompress train-importance`); None: the
        attention that a token got so far stands in its place.
      error_feedback: whether keys are rounded so that their errors cancel in the logits
        (`kvcompress_jax.feedback`). None: yes, where it can be had, in the engine of this package,
        which probes the model, but not inside vLLM; and where it shows, with three levels: of 8
        bits for all, a bfloat16 cache hides what it gains.
      telemetry_share: share of the steps in which the error of compression is measured, 0 to 1; 0:
        never, and nothing is kept for it.
      telemetry_pages: sealed pages that keep a raw copy on the device to measure it with.
      bound: fidelity that a model must keep with it, or it is not served.
      measured: what was measured, and on which model; `kvcompress tune` writes it.
      force: serve it even so; what is wrong goes to the log.
    """

    enabled: bool = True
    levels: int = 3
    ratio: float = 0.5
    fine_bits: int | None = None
    page_size: int = 64
    window_tokens: int = 64
    sink_tokens: int = 4
    seal_level: int = 1
    demote_after_tokens: int | None = None
    floor_layers: tuple[int, ...] = ()
    host_bytes: int = 0
    disk_path: str | None = None
    disk_bytes: int = 0
    prefix_cache_bytes: int | None = None
    profile: str | None = None
    promote_heat: float = 2.0
    heat_decay: float = 0.95
    weights: ImportanceWeights = ImportanceWeights()
    magnitude: str = "output_error"
    attention: str = "mean"
    learned_importance: str | None = None
    error_feedback: bool | None = None
    telemetry_share: float = 0.0
    telemetry_pages: int = 4
    bound: QualityBound | None = None
    measured: Measured | None = None
    force: bool = False

    def __post_init__(self) -> None:
        _check(self.levels in (1, 2, 3), "levels", "1, 2 or 3", self.levels)
        _check(0 < self.ratio <= 1, "ratio", "more than 0 and at most 1", self.ratio)
        bits = self.fine_bits
        _check(bits in (None, 2, 4), "fine_bits", "2, 4 or None", bits)
        _check(
            bits != 2 or self._can_spread,
            "fine_bits",
            "4 unless levels=3 with ratio of at most 0.5, and where that is all tokens, nothing"
            " that orders them",
            f"2 with ratio={self.ratio}, levels={self.levels}",
        )
        _check(self.page_size in PAGE_SIZES, "page_size", f"one of {PAGE_SIZES}", self.page_size)
        _check(self.window_tokens >= 0, "window_tokens", "at least 0", self.window_tokens)
        _check(
            0 <= self.sink_tokens < self.page_size,
            "sink_tokens",
            f"0 to {self.page_size - 1} (page_size - 1)",
            self.sink_tokens,
        )
        _check(self.seal_level in (1, 2), "seal_level", "1 or 2", self.seal_level)
        _check(
            self.seal_level < self.levels or self.levels == 1,
            "seal_level",
            f"a level below levels={self.levels}",
            self.seal_level,
        )
        after = self.demote_after_tokens
        _check(
            after is None or (after >= self.window_tokens and self.levels == 3),
            "demote_after_tokens",
            f"None, or at least window_tokens={self.window_tokens} with levels=3",
            after,
        )
        if self.error_feedback:
            _check(self.profile is None, "error_feedback", "no profile beside it", self.profile)
        if self.profile is not None:
            _check(not self.floor_layers, "floor_layers", "none with a profile", self.floor_layers)
            _check(after is None, "demote_after_tokens", "None with a profile", after)
            _check(self.levels > 1, "levels", "2 or 3 with a profile", self.levels)
            learned = self.learned_importance
            _check(learned is None, "learned_importance", "None with a profile", learned)
        _check(self.host_bytes >= 0, "host_bytes", "at least 0", self.host_bytes)
        _check(self.disk_bytes >= 0, "disk_bytes", "at least 0", self.disk_bytes)
        if self.disk_path is not None:
            _check(self.disk_path != "", "disk_path", "a folder", repr(self.disk_path))
            _check(self.disk_bytes > 0, "disk_path", "disk_bytes to be more than 0", 0)
            _check(self.host_bytes > 0, "disk_path", "host_bytes to be more than 0", 0)
            _check(
                self.keeps_fine_planes or not self.compresses,
                "disk_path",
                "None where no page is demoted (levels=3 with seal_level=1 and no profile)",
                self.disk_path,
            )
        prefix = self.prefix_cache_bytes
        _check(
            prefix is None or prefix > 0 or (prefix == 0 and self.window_tokens == 0),
            "prefix_cache_bytes",
            f"None, or more than 0 with window_tokens={self.window_tokens}",
            prefix,
        )
        _check(self.promote_heat >= 1, "promote_heat", "at least 1", self.promote_heat)
        _check(self.magnitude in MAGNITUDES, "magnitude", list(MAGNITUDES), self.magnitude)
        _check(self.attention in ATTENTIONS, "attention", list(ATTENTIONS), self.attention)
        share = self.telemetry_share
        _check(0 <= share <= 1, "telemetry_share", "0 to 1", share)
        _check(self.telemetry_pages >= 1, "telemetry_pages", "at least 1", self.telemetry_pages)
        _check(
            self.learned_importance is None or self.tracks_attention or not self.compresses,
            "learned_importance",
            "None where attention is not tracked (levels=3 with seal_level=1)",
            self.learned_importance,
        )
        _check(0 < self.heat_decay < 1, "heat_decay", "more than 0, less than 1", self.heat_decay)

    @classmethod
    def recipe(cls, name: str) -> "CompressionConfig":
        """A named configuration: one of `RECIPES`.

        Raises:
          ConfigError: there is no such recipe.
        """
        if name not in RECIPES:
            raise ConfigError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
        return RECIPES[name]

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] = os.environ,
        *,
        overrides: Mapping[str, Any] | None = None,
    ) -> "CompressionConfig":
        """The configuration that the environment asks for.

        `KVCOMPRESS_CONFIG` names a TOML file to start from (`from_toml`), or `KVCOMPRESS_RECIPE` a
        recipe (default: balanced). Then come
        `VLLM_ENABLE_KV_COMPRESSION` (default 1), `VLLM_KV_COMPRESSION_RATIO` (0.5),
        `VLLM_KV_COMPRESSION_LEVELS` (3), `KVCOMPRESS_FINE_BITS`, `KVCOMPRESS_PAGE_SIZE`,
        `KVCOMPRESS_WINDOW_TOKENS`,
        `KVCOMPRESS_SINK_TOKENS`, `KVCOMPRESS_SEAL_LEVEL`, `KVCOMPRESS_DEMOTE_AFTER_TOKENS`,
        `KVCOMPRESS_HOST_BYTES`, `KVCOMPRESS_DISK_BYTES`, `KVCOMPRESS_DISK_PATH`,
        `KVCOMPRESS_PREFIX_CACHE_BYTES`, `KVCOMPRESS_PROFILE`, `KVCOMPRESS_LEARNED_IMPORTANCE`,
        `KVCOMPRESS_ERROR_FEEDBACK`, `KVCOMPRESS_TELEMETRY_SHARE` and `KVCOMPRESS_FORCE`.

        Args:
          environ: variables to read.
          overrides: fields by name; they win over the environment.

        Raises:
          ConfigError: names the variable, what was expected and what it holds.
        """
        known = {variable for variable, _, _ in _VARIABLES}
        known |= {"KVCOMPRESS_RECIPE", "KVCOMPRESS_CONFIG", SWITCH}
        for variable in environ:
            if variable.startswith("KVCOMPRESS_") and variable not in known:
                raise ConfigError(
                    f"{variable}: no such variable, expected one of {', '.join(sorted(known))}"
                )
        name = environ.get("KVCOMPRESS_RECIPE", "balanced")
        if name not in RECIPES:
            raise ConfigError(
                f"KVCOMPRESS_RECIPE: expected one of {', '.join(RECIPES)}, got {name!r}"
            )
        config = RECIPES[name]
        if "KVCOMPRESS_CONFIG" in environ:
            if "KVCOMPRESS_RECIPE" in environ:
                raise ConfigError("KVCOMPRESS_CONFIG: expected no KVCOMPRESS_RECIPE beside it")
            try:
                config = cls.from_toml(environ["KVCOMPRESS_CONFIG"])
            except ConfigError as e:
                raise ConfigError(f"KVCOMPRESS_CONFIG: {e}") from None
        for variable, field, parse in _VARIABLES:
            if variable not in environ:
                continue
            try:
                config = _with_field(config, field, parse(environ[variable]))
            except ValueError as e:
                reason = str(e).removeprefix(f"{field}: ")
                raise ConfigError(f"{variable}: {reason}") from None
        return dataclasses.replace(config, **dict(overrides)) if overrides else config

    @classmethod
    def from_toml(cls, path: str | Path) -> "CompressionConfig":
        """Reads fields from a TOML file; `recipe = "name"` names what to start from. Files that it
        names are relative to its folder.

        Raises:
          ConfigError: the file cannot be read, is not TOML, or a field is unknown or wrong.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            values = tomllib.loads(text)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
            raise ConfigError(f"{path}: expected a TOML file, got: {e}") from None
        config = cls.recipe(str(values.pop("recipe", "balanced")))
        tables = {
            name: _table(path, name, kind, values.pop(name))
            for name, kind in _TABLES.items()
            if name in values
        }
        config = dataclasses.replace(config, **tables)
        fields = [f.name for f in dataclasses.fields(cls)]
        changes: dict[str, Any] = {}
        for name, value in values.items():
            if name not in fields:
                raise ConfigError(f"{path}: {name}: no such field, expected one of {fields}")
            changes[name] = tuple(value) if isinstance(value, list) else value
            default = getattr(RECIPES["balanced"], name)
            expected = _TYPES.get(name, type(default))
            got = type(changes[name])
            if got is not expected and not (expected is float and got is int):
                raise ConfigError(f"{path}: {name}: expected {expected.__name__}, got {value!r}")
            if name in FILES:
                changes[name] = str(Path(path).parent / changes[name])
        try:
            return dataclasses.replace(config, **changes)
        except ValueError as e:
            raise ConfigError(f"{path}: {e}") from None

    @property
    def compresses(self) -> bool:
        """Whether any page ever leaves level 0."""
        return self.enabled and self.levels > 1

    def floors(self, layers: int) -> frozenset[int]:
        """The floor layers of a model with so many layers, counted from the first."""
        return frozenset(i % layers for i in self.floor_layers)

    @property
    def tracks_attention(self) -> bool:
        """Whether attention mass is observed. It orders the tokens of pages that are refined in
        part, and says which pages to demote and promote; where neither can happen it is not worth
        its time and memory."""
        floors = bool(self.floor_layers) and self.ratio < 1
        partly = self.levels == 3 and (self.seal_level == 1 or floors)
        return self.compresses and (partly or self.profile is not None)

    @property
    def feeds_errors_back(self) -> bool:
        """Whether keys are rounded with error feedback, where a model can be probed for it. A
        calibrated code rounds in another basis."""
        wanted = self.levels == 3 if self.error_feedback is None else self.error_feedback
        return self.compresses and self.profile is None and wanted

    @property
    def keeps_fine_planes(self) -> bool:
        """Whether pages go from level 1 to 2, and leave a fine plane to be kept."""
        partly = self.levels == 3 and self.seal_level == 1
        return self.compresses and partly and self.profile is None

    @property
    def shadow_pages(self) -> int:
        """Raw copies of sealed pages that telemetry needs."""
        return self.telemetry_pages if self.compresses and self.telemetry_share else 0

    @property
    def _can_spread(self) -> bool:
        """Whether level 1 can refine its tokens by 2 bits, and no setting of their order would be
        for nothing."""
        plain = all(getattr(self, name) == getattr(type(self), name) for name in _ORDERING)
        return self.levels == 3 and (self.ratio < 0.5 or (self.ratio == 0.5 and plain))

    @property
    def refining_bits(self) -> int:
        """By which level 1 refines a token: 4 or 2, what `fine_bits` comes to."""
        if self.fine_bits is not None:
            return self.fine_bits
        return 2 if self._can_spread else 4

    @property
    def fine_rows(self) -> int:
        """Rows of the fine plane of a page, per head: tokens with 8 bits, or pairs with 6."""
        if not self.compresses or self.profile is not None:
            return 0
        return self.refined_tokens(self.page_size)

    @property
    def sealed_level(self) -> int:
        """Level of a page when it leaves the window."""
        return self.seal_level if self.profile is None else 3

    @property
    def importance(self) -> ImportanceRule:
        """How the tokens of a page are ordered."""
        return ImportanceRule(
            weights=self.weights, magnitude=self.magnitude, attention=self.attention
        )

    def refined_tokens(self, tokens: int) -> int:
        """How many of `tokens` have 8 bits at level 1, where some have more than others: the most
        important ones."""
        return tokens if self.levels == 2 else max(1, round(self.ratio * tokens))

    def layout(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "bfloat16",
        rows: RowLayout | None = None,
    ) -> CacheLayout:
        """The page layout of this configuration for a model's dimensions; `rows` are those of its
        profile."""
        return CacheLayout(
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=self.page_size,
            dtype=dtype,
            fine_rows=self.fine_rows,
            fine_bits=self.refining_bits if self.fine_rows else 4,
            sink_tokens=self.sink_tokens if self.compresses else 0,
            importance=self.importance,
            statistics=self.tracks_attention,
            rows=rows,
        )


def _check(condition: bool, name: str, expected: object, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {got}")


def _with_field(config: CompressionConfig, field: str, value: object) -> CompressionConfig:
    changes: dict[str, Any] = {field: value}
    if field == "levels" and value != 3:  # what only three levels can do gives way
        changes |= {"seal_level": 1, "demote_after_tokens": None}
        changes |= {"fine_bits": None if config.fine_bits == 2 else config.fine_bits}
    return dataclasses.replace(config, **changes)


def _table(path: str | Path, name: str, kind: Any, values: object) -> Any:
    fields = dataclasses.fields(kind)
    names = [f.name for f in fields]
    if not isinstance(values, dict) or not set(values) <= set(names):
        raise ConfigError(f"{path}: {name}: expected a table with {names}, got {values!r}")
    for field in fields:
        got = values.get(field.name)
        text = str(field.type) == "str"
        if got is not None and (isinstance(got, bool) or isinstance(got, str) is not text):
            expected = "a text" if text else "a number"
            raise ConfigError(f"{path}: {name}: {field.name}: expected {expected}, got {got!r}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{path}: {name}: {str(e).removeprefix(f'{name}: ')}") from None


def _flag(text: str) -> bool:
    flags = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if text.strip().lower() not in flags:
        raise ValueError(f"expected 0 or 1, got {text!r}")
    return flags[text.strip().lower()]


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {text!r}") from None


_VARIABLES = (
    ("VLLM_ENABLE_KV_COMPRESSION", "enabled", _flag),
    ("VLLM_KV_COMPRESSION_RATIO", "ratio", _number),
    ("VLLM_KV_COMPRESSION_LEVELS", "levels", _whole),
    ("KVCOMPRESS_FINE_BITS", "fine_bits", _whole),
    ("KVCOMPRESS_PAGE_SIZE", "page_size", _whole),
    ("KVCOMPRESS_WINDOW_TOKENS", "window_tokens", _whole),
    ("KVCOMPRESS_SINK_TOKENS", "sink_tokens", _whole),
    ("KVCOMPRESS_SEAL_LEVEL", "seal_level", _whole),
    ("KVCOMPRESS_DEMOTE_AFTER_TOKENS", "demote_after_tokens", _whole),
    ("KVCOMPRESS_HOST_BYTES", "host_bytes", _whole),
    ("KVCOMPRESS_DISK_BYTES", "disk_bytes", _whole),
    ("KVCOMPRESS_DISK_PATH", "disk_path", str),
    ("KVCOMPRESS_PREFIX_CACHE_BYTES", "prefix_cache_bytes", _whole),
    ("KVCOMPRESS_PROFILE", "profile", str),
    ("KVCOMPRESS_LEARNED_IMPORTANCE", "learned_importance", str),
    ("KVCOMPRESS_ERROR_FEEDBACK", "error_feedback", _flag),
    ("KVCOMPRESS_TELEMETRY_SHARE", "telemetry_share", _number),
    ("KVCOMPRESS_FORCE", "force", _flag),
)

# What says in which order the tokens of a page are refined.
_ORDERING = ("weights", "magnitude", "attention", "learned_importance")
FILES = ("profile", "learned_importance")  # fields that name a file
_TABLES = {"weights": ImportanceWeights, "bound": QualityBound, "measured": Measured}
# Of fields whose default is None.
_TYPES = {
    "demote_after_tokens": int,
    "fine_bits": int,
    "disk_path": str,
    "prefix_cache_bytes": int,
    "profile": str,
    "learned_importance": str,
    "error_feedback": bool,
}

RECIPES = {
    "safe": CompressionConfig(levels=2),
    "balanced": CompressionConfig(),
    "mixed": CompressionConfig(fine_bits=4),
    "compact": CompressionConfig(seal_level=2),
    "extreme": CompressionConfig(seal_level=2, page_size=128, window_tokens=0),
}
