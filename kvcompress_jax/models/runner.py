"""A decoder on the paged cache: one call is one step of a serving loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import NO_SHARES, KVCacheManager, pools_for_tokens
from kvcompress_jax.manager.disk import open_disk_tier
from kvcompress_jax.models.cache_settings import cache_layout, learned_score, read_profile
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.rope import layer_frequencies
from kvcompress_jax.models.sharding import shard_params
from kvcompress_jax.models.step import Rows, Step, run_step
from kvcompress_jax.paged import PagedCache, PoolSizes, init_cache
from kvcompress_jax.paged.sharding import HeadSharding
from kvcompress_jax.quality import admit

if TYPE_CHECKING:
    from kvcompress_jax.calibrated.profile import Profile


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
        sharding: HeadSharding | None = None,
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
          sharding: devices that share the KV heads and the weights; None: the default device has
            all.

        Raises:
          ValueError: KV heads or weights that cannot be split evenly over the devices.
          QualityError: the configuration has a bound that this model does not keep with it, or
            was never seen to keep.
        """
        admit(config, model.fingerprint)
        # Of the model as it was given, which knows it already if there was a runner before.
        self._feedback = model.key_feedback if config.feeds_errors_back else None
        self.sharding = sharding
        if sharding is not None:
            params = shard_params(sharding, model.config, model.params)
            model = dataclasses.replace(model, params=params)
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
            sharding=self.sharding,
        )
        init = init_cache if self.sharding is None else self.sharding.init
        cache = init(
            self.layout,
            self.sizes,
            self._code,
            learned=self._learned,
            feedback=self._feedback,
        )
        return manager, cache

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

    def look_ahead(self) -> None:
        """Starts what will be due, while the device is busy; call it after `forward`, or not."""
        self.cache = self.manager.look_ahead(self.cache)

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
            sharding=self.sharding,
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
    sharding: HeadSharding | None = None,
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
      sharding: devices that share the KV heads and the weights; None: the default device has all.
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
        sharding=sharding,
    )
