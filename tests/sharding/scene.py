"""One life of a cache, whose pools are looked at on the way: on one device, or on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import KVCacheManager
from kvcompress_jax.paged import PoolSizes, append, attend, cool, init_cache, observe
from kvcompress_jax.paged.sharding import (
    REPLICATED,
    HeadSharding,
    cache_specs,
    update_cache,
    whole,
)

HEADS, GROUP, DIM, LAYERS = 8, 2, 32, 2
LENGTHS = (70, 37, 16)
CONFIG = CompressionConfig(
    page_size=16, window_tokens=16, sink_tokens=2, seal_level=1, host_bytes=1 << 20
)
SIZES = PoolSizes(raw_pages=12, sealed_pages=10, fine_chunks=20, sink_slots=3)


def sharding_of(shards, **options):
    """The first so many devices; None for 0: no mesh."""
    if not shards:
        return None
    return HeadSharding(jax.sharding.Mesh(np.array(jax.devices()[:shards]), ("heads",)), **options)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def append_tokens(cache, layer, k, v, slots, *, sharding):
    specs = sharding and (REPLICATED, sharding.at(1), sharding.at(1), REPLICATED)
    return update_cache(sharding, append, cache, layer, k, v, slots, specs=specs)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def attend_and_observe(cache, layer, q, table, query_lengths, *, sharding):
    layout = cache.layout

    def one(cache, layer, q, table, query_lengths):
        out, lse, mass = attend(
            q, cache, layer, table, query_lengths=query_lengths, return_mass=True
        )
        cache = observe(cool(cache, 0.9), layer, table, query_lengths, mass)
        return out, lse, cache

    if sharding is None:
        return one(cache, layer, q, table, query_lengths)

    def on_device(cache, *args):
        out, lse, cache = one(sharding.shard(cache), *args)
        return out, lse, whole(cache, layout)

    specs, heads = cache_specs(sharding, cache), sharding.at(2)
    return sharding.run(
        on_device,
        *(cache, layer, q, table, query_lengths),
        in_specs=(specs, REPLICATED, heads, REPLICATED, REPLICATED),
        out_specs=(heads, heads, specs),
    )


@dataclasses.dataclass
class Scene:
    """Three sequences that are appended, attended to, sealed, demoted, promoted, preempted.

    Attributes:
      shots: every array of the cache after each of these, by stage and name.
      outs: what attention returned, by stage.
      seen: (q, table, first query, cache in NumPy) of each of these, for the reference.
    """

    sharding: HeadSharding | None
    config: CompressionConfig = CONFIG
    sizes: PoolSizes = SIZES
    profile: object = None
    learned: object = None
    spoiled_head: int | None = None  # NaN in a key of the second page of the first sequence
    shots: dict = dataclasses.field(default_factory=dict)
    outs: dict = dataclasses.field(default_factory=dict)
    seen: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        rows, code = None, None
        if self.profile is not None:
            rows = self.profile.rows
            frequency = np.full((LAYERS, DIM // 2), 0.01, np.float32)
            code = self.profile.code(jnp.asarray(frequency))
        self.layout = self.config.layout(
            layers=LAYERS, kv_heads=HEADS, head_dim=DIM, dtype="float32", rows=rows
        )
        init = init_cache if self.sharding is None else self.sharding.init
        self.cache = init(self.layout, self.sizes, code, learned=self.learned)
        self.manager = KVCacheManager(
            self.layout,
            self.sizes,
            self.config,
            max_sequences=len(LENGTHS),
            sharding=self.sharding,
        )
        self.rng = np.random.default_rng(0)
        self.ids = [self.manager.add() for _ in LENGTHS]
        slots = np.concatenate(
            [self.manager.append_slots(i, n) for i, n in zip(self.ids, LENGTHS, strict=True)]
        )
        for layer in range(LAYERS):
            k, v = (
                self.rng.normal(size=(sum(LENGTHS), HEADS, DIM)).astype(np.float32)
                for _ in range(2)
            )
            k[..., 1] *= 20  # an outlier channel
            k[:2] *= 3
            if self.spoiled_head is not None and layer == 1:
                k[20, self.spoiled_head, 5] = np.nan
            self.cache = append_tokens(
                self.cache, np.int32(layer), k, v, slots, sharding=self.sharding
            )

    def attend(self, stage):
        shape = (len(self.ids), 3, HEADS * GROUP, DIM)
        table = self.manager.table(self.ids, sealed_columns=4)
        wide = ((0, 0), (0, 8 - table.raw.shape[1]))  # one compiled program for all stages
        table = dataclasses.replace(
            table, raw=np.pad(table.raw, wide), raw_index=np.pad(table.raw_index, wide)
        )
        lengths = np.array([3, 1, 2], np.int32)  # queries of each
        for layer in range(LAYERS):
            q = self.rng.normal(size=shape).astype(np.float32)
            out, lse, self.cache = attend_and_observe(
                self.cache, np.int32(layer), q, table, lengths, sharding=self.sharding
            )
            self.outs[stage, layer] = np.asarray(out), np.asarray(lse)
        self.seen[stage] = q, table, lengths, jax.tree.map(np.asarray, self.cache)
        self.shoot(stage)

    def seal(self):
        self.cache = self.manager.advance(self.cache)
        self.shoot("sealed")

    def live(self):
        """What comes after sealing."""
        self.attend("coded")
        for sequence in self.ids[:2]:
            self.manager.demote_pages(sequence, [0, 1])
        self.cache = self.manager.advance(self.cache)
        self.shoot("demoted")
        self.attend("lower")
        self.manager.promote_pages(self.ids[0], [1])
        self.cache = self.manager.advance(self.cache)
        self.shoot("promoted")
        self.manager.preempt(self.ids[0], self.cache)
        self.cache = self.manager.resume(self.ids[0], self.cache)
        self.shoot("resumed")
        self.manager.verify(self.cache)
        return self

    def shoot(self, stage):
        self.shots[stage] = {
            jax.tree_util.keystr(path): np.asarray(x)
            for path, x in jax.tree_util.tree_leaves_with_path(self.cache)
        }


def different(a, b):
    """Arrays of the shots of two scenes that are not equal to the bit, as "stage: name"."""
    return [
        f"{stage}: {name}"
        for stage in sorted(a.keys() & b.keys())
        for name in sorted(a[stage].keys() | b[stage].keys())
        if name not in a[stage]
        or name not in b[stage]
        or a[stage][name].tobytes() != b[stage][name].tobytes()
    ]


def torn(cache):
    """Arrays that should be the same on several devices and are not."""
    names = []
    for path, x in jax.tree_util.tree_leaves_with_path(cache):
        parts = {}
        for part in x.addressable_shards:
            parts.setdefault(str(part.index), set()).add(np.asarray(part.data).tobytes())
        if any(len(contents) > 1 for contents in parts.values()):
            names.append(jax.tree_util.keystr(path))
    return names
