"""A decoder on the paged cache: one call is one step of a serving loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.config import CompressionConfig, ConfigError
from kvcompress_jax.importance import LearnedScore
from kvcompress_jax.manager import NO_SHARES, KVCacheManager, pools_for_tokens
from kvcompress_jax.manager.disk import open_disk_tier
from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.decoder import decode, logits
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.params import DecoderParams
from kvcompress_jax.models.rope import layer_frequencies
from kvcompress_jax.paged import (
    CacheLayout,
    PagedCache,
    PageTable,
    PoolSizes,
    append,
    attend,
    cool,
    init_cache,
    observe,
)
from kvcompress_jax.paged.host_arrays import HostArray
from kvcompress_jax.paged.measure import measure
from kvcompress_jax.paged.raw_bits import hold_bits, release_bits
from kvcompress_jax.quality import admit

if TYPE_CHECKING:
    from kvcompress_jax.calibrated.profile import Profile


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Sequences that get the same number of query slots in a step."""

    table: PageTable
    query_lengths: HostArray  # i32[rows]: new tokens of each; the rest of its slots is padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Tokens of one step: first those of the decoding rows, one each, then a chunk for each
    prefilling row."""

    tokens: HostArray  # i32[decoding + prefilling * chunk]
    positions: HostArray  # i32, like tokens
    slots: HostArray  # i32, like tokens; -1 for padding
    decoding: Rows | None
    prefilling: Rows | None
    wanted: HostArray  # i32[n] indices into tokens whose logits are returned
    shadows: HostArray | None = None  # sealed page of each shadow, in steps that are measured


@functools.partial(
    jax.jit, static_argnames=("config", "track_mass", "decay"), donate_argnames="cache"
)
def run_step(
    params: DecoderParams,
    cache: PagedCache,
    step: Step,
    *,
    config: DecoderConfig,
    track_mass: bool,
    decay: float,
) -> tuple[jax.Array, PagedCache]:
    """Appends a step's tokens and attends to the cache, layer by layer.

    Args:
      params: weights of the decoder.
      cache: donated.
      step: tokens, where they go, and whom they belong to.
      config: of the decoder.
      track_mass: whether attention mass is observed, for importance and heat.
      decay: what is left of the pages' heat after a step.

    Returns:
      f32[n, vocab] logits of `step.wanted`, and the cache.
    """
    groups = [rows for rows in (step.decoding, step.prefilling) if rows is not None]

    def attention(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        cache: PagedCache,
    ) -> tuple[jax.Array, PagedCache]:
        cache = append(cache, layer, k, v, step.slots)
        outs, first = [], 0
        for rows in groups:
            sequences = rows.query_lengths.shape[0]
            queries = 1 if rows is step.decoding else (q.shape[0] - first) // sequences
            part = q[first : first + sequences * queries]
            first += sequences * queries
            part = part.reshape(sequences, queries, *q.shape[1:])
            out, lse, mass = attend(
                part,
                cache,
                layer,
                rows.table,
                query_lengths=rows.query_lengths,
                scale=config.query_scale,
                window=window if any(config.layer_windows) else None,
                soft_cap=config.soft_cap,
                return_mass=track_mass,
            )
            if mass is not None:
                cache = observe(cache, layer, rows.table, rows.query_lengths, mass)
            if step.shadows is not None:
                cache = measure(
                    cache,
                    layer,
                    part,
                    rows.table,
                    step.shadows,
                    out,
                    lse,
                    query_lengths=rows.query_lengths,
                    scale=config.query_scale,
                    window=window if any(config.layer_windows) else None,
                    soft_cap=config.soft_cap,
                )
            outs.append(out.reshape(sequences * queries, *q.shape[1:]))
        return jnp.concatenate(outs), cache

    if track_mass:
        cache = cool(cache, decay)
    hidden, cache = decode(params, config, step.tokens, step.positions, attention, hold_bits(cache))
    return logits(params, config, hidden[step.wanted]), release_bits(cache)


class Runner:
    """Weights, cache and manager of one model.

    Attributes:
      cache: the current value of the paged cache.
      manager: who has which pages.
    """

    def __init__(
        self,
        model: Model,
        config: CompressionConfig,
        sizes: PoolSizes,
        *,
        max_sequences: int,
        kv_dtype: str = "bfloat16",
        chunk_tokens: int = 256,
        profile: Profile | None = None,
        tenant_shares: Mapping[str, float] = NO_SHARES,
    ) -> None:
        """Allocates the cache.

        Args:
          model: weights and their configuration.
          config: of the compression.
          sizes: of the pools (`kvcompress_jax.manager.divide_budget`).
          max_sequences: that are on the device at the same time.
          kv_dtype: of level 0.
          chunk_tokens: most tokens of a prompt in a step.
          profile: what `config.profile` names (`read_profile`).
          tenant_shares: part of every pool that is a tenant's own, see `KVCacheManager`.

        Raises:
          QualityError: the configuration has a bound that this model does not keep with it, or
            was never seen to keep.
        """
        admit(config, model.fingerprint)
        self.model = model
        self.config = config
        self.chunk_tokens = chunk_tokens
        self.max_sequences = max_sequences
        self.layout = cache_layout(model.config, config, kv_dtype, profile)
        learned = learned_score(model, config)
        sizes = dataclasses.replace(
            sizes, learned_bytes=sum(x.nbytes for x in jax.tree.leaves(learned))
        )
        self.sizes = sizes
        self.tenant_shares = tenant_shares
        self._code = None if profile is None else profile.code(layer_frequencies(model.config))
        self._learned = learned
        self.disk = open_disk_tier(config, self.layout, model_fingerprint=model.fingerprint)
        self.manager, self.cache = self._new_cache(first_sequence_id=0)

    def _new_cache(self, first_sequence_id: int) -> tuple[KVCacheManager, PagedCache]:
        manager = KVCacheManager(
            self.layout,
            self.sizes,
            self.config,
            max_sequences=self.max_sequences,
            fingerprint=self.model.fingerprint,
            tenant_shares=self.tenant_shares,
            disk=self.disk,
            first_sequence_id=first_sequence_id,
        )
        return manager, init_cache(self.layout, self.sizes, self._code, learned=self._learned)

    def intact(self) -> bool:
        """Whether the cache is still there: a step that fails on the device takes it along, as it
        was donated. Waits for the device."""
        if any(x.is_deleted() for x in jax.tree.leaves(self.cache)):
            return False
        try:
            jax.block_until_ready(self.cache)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def rebuild(self) -> None:
        """An empty cache in the place of one that was lost, and a manager without sequences; no id
        of a sequence is used again. Counters begin anew."""
        first_sequence_id = self.manager.next_sequence_id
        del self.cache  # or there would be two of them for a moment
        self.manager, self.cache = self._new_cache(first_sequence_id)

    def close(self) -> None:
        """Lets go of the disk tier's folder, if there is one; a runner that nobody holds does so by
        itself."""
        if self.disk is not None:
            self.disk.close()

    def begin(self, prompt: ListOf[int], tenant: str = "") -> int:
        """A new sequence for a prompt, which may hold a part of it already: the prefix that it
        shares with an earlier one (`KVCacheManager.add_prompt`)."""
        sequence, self.cache = self.manager.add_prompt(
            self.cache, prompt, step_tokens=self.chunk_tokens, tenant=tenant
        )
        return sequence

    def advance(self) -> None:
        """Applies what the manager has due; call it before every `forward`."""
        self.cache = self.manager.advance(self.cache)

    def forward(
        self,
        decoding: ListOf[tuple[int, int]] = (),
        prefilling: tuple[int, ListOf[int]] | None = None,
        *,
        all_logits: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """One step: a token for each decoding sequence, a chunk for one that is prefilling.

        Args:
          decoding: (sequence, token) pairs.
          prefilling: (sequence, tokens), at most `chunk_tokens` of them.
          all_logits: return logits for every token of the chunk, not only its last.

        Returns:
          f32[decoding, vocab] and f32[tokens of the chunk or 1 (0 without one), vocab].

        Raises:
          OutOfPagesError: no raw pages for all of it; nothing was changed.
          ValueError: nothing to do, or a chunk that is too long.
        """
        chunk = list(prefilling[1]) if prefilling else []
        if not decoding and not chunk:
            raise ValueError("forward: expected at least one token")
        if len(chunk) > self.chunk_tokens:
            raise ValueError(f"prefilling: at most {self.chunk_tokens} tokens, got {len(chunk)}")
        sequences = [sequence for sequence, _ in decoding]
        before = self.manager.length(prefilling[0]) if prefilling else 0
        position, slots, chunk_slots = self.manager.append_step(
            sequences, (prefilling[0], len(chunk)) if prefilling else None
        )
        rows = self.max_sequences if decoding else 0
        size = rows + (self.chunk_tokens if chunk else 0)
        tokens, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        targets = np.full(size, -1, np.int32)
        tokens[: len(decoding)] = [token for _, token in decoding]
        positions[: len(decoding)], targets[: len(decoding)] = position, slots
        if chunk:
            part = slice(rows, rows + len(chunk))
            tokens[part], targets[part] = chunk, chunk_slots
            positions[part] = before + np.arange(len(chunk))
        last = rows + len(chunk) - 1
        wanted = np.arange(size) if all_logits else np.arange(rows + bool(chunk))
        if chunk and not all_logits:
            wanted[-1] = last
        shadows = self.manager.shadows.sample()
        out, self.cache = run_step(
            self.model.params,
            self.cache,
            Step(
                tokens=tokens,
                positions=positions,
                slots=targets,
                decoding=self._rows(sequences, [1] * len(decoding), rows),
                prefilling=self._rows([prefilling[0]], [len(chunk)], 1) if prefilling else None,
                wanted=wanted.astype(np.int32),
                shadows=shadows,
            ),
            config=self.model.config,
            track_mass=self.config.tracks_attention,
            decay=self.config.heat_decay,
        )
        if shadows is not None and self.cache.telemetry is not None:
            # A copy, read when somebody asks: the cache is donated to the next step.
            self.manager.shadows.sums = jax.tree.map(jnp.copy, self.cache.telemetry.sums)
        chunk_logits = out[rows : rows + (len(chunk) if all_logits else bool(chunk))]
        return out[: len(decoding)], chunk_logits

    def extend(self, sequence: int, tokens: ListOf[int], *, all_logits: bool = False) -> jax.Array:
        """Feeds tokens of one sequence, chunk by chunk, sealing what becomes due in between.

        Returns:
          f32[tokens, vocab] with `all_logits`, else f32[1, vocab] of the last token.
        """
        parts: list[jax.Array] = []
        for i in range(0, len(tokens), self.chunk_tokens):
            self.advance()
            part = tokens[i : i + self.chunk_tokens]
            _, out = self.forward(prefilling=(sequence, part), all_logits=all_logits)
            parts = [*parts, out] if all_logits else [out]
        return jnp.concatenate(parts)

    def _rows(self, sequences: list[int], lengths: list[int], rows: int) -> Rows | None:
        if not sequences:
            return None
        padded = np.zeros(rows, np.int32)
        padded[: len(lengths)] = lengths
        table = self.manager.table(sequences, padded_rows=rows)
        return Rows(table=table, query_lengths=padded)


def make_runner(
    model: Model,
    config: CompressionConfig,
    *,
    tokens: int,
    max_sequences: int,
    chunk_tokens: int = 256,
    kv_dtype: str = "bfloat16",
    tenant_shares: Mapping[str, float] = NO_SHARES,
) -> Runner:
    """A runner whose pools hold a given number of tokens.

    Args:
      model: weights and their configuration.
      config: of the compression.
      tokens: of all sequences together; shared ones count once.
      max_sequences: that are on the device at the same time.
      chunk_tokens: most tokens of a prompt in a step.
      kv_dtype: of level 0.
      tenant_shares: part of every pool that is a tenant's own, see `KVCacheManager`.
    """
    profile = read_profile(config, model)
    sizes = pools_for_tokens(
        cache_layout(model.config, config, kv_dtype, profile),
        config,
        tokens=tokens,
        max_sequences=max_sequences,
        step_tokens=chunk_tokens,
    )
    return Runner(
        model,
        config,
        sizes,
        max_sequences=max_sequences,
        kv_dtype=kv_dtype,
        chunk_tokens=chunk_tokens,
        profile=profile,
        tenant_shares=tenant_shares,
    )


def learned_score(model: Model, config: CompressionConfig) -> LearnedScore | None:
    """The trained importance that a configuration names, None when it names none or nothing is
    compressed.

    Raises:
      ConfigError: the file is not one for this model.
    """
    if config.learned_importance is None or not config.compresses:
        return None
    from kvcompress_jax.importance.learned import ImportanceFileError, load_learned

    try:
        return load_learned(
            config.learned_importance,
            fingerprint=model.fingerprint,
            layers=model.config.num_layers,
            kv_heads=model.config.num_kv_heads,
            head_dim=model.config.head_dim,
        )
    except ImportanceFileError as e:
        raise ConfigError(f"learned_importance: {e}") from None


def read_profile(config: CompressionConfig, model: Model) -> Profile | None:
    """What `config.profile` names, checked against the model; None without one.

    Raises:
      ProfileError: it cannot be read, or is of another model.
    """
    if config.profile is None or not config.compresses:
        return None
    # Only now: safetensors is not needed otherwise.
    from kvcompress_jax.calibrated.profile import load_profile

    return load_profile(config.profile, model.config, model.fingerprint)


def cache_layout(
    decoder: DecoderConfig,
    config: CompressionConfig,
    kv_dtype: str,
    profile: Profile | None = None,
) -> CacheLayout:
    """The page layout of a configuration for a model."""
    return config.layout(
        layers=decoder.num_layers,
        kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        dtype=kv_dtype,
        rows=None if profile is None else profile.rows,
    )
