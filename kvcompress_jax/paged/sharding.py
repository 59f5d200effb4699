"""A cache whose KV heads are split over the devices of a mesh axis.

Every operation of the cache runs under `jax.shard_map` with the heads of its own device, as on a
cache with fewer heads. Tables, plans and what belongs to pages as a whole (`seen`, `fine_of`,
`heat`, ...) are on every device, and equal there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvcompress_jax.calibrated import CalibratedCode
from kvcompress_jax.feedback import HEAD_AXIS, KeyFeedback
from kvcompress_jax.importance import LearnedScore
from kvcompress_jax.paged.cache import PagedCache, init_cache
from kvcompress_jax.paged.heads import HeadSplit
from kvcompress_jax.paged.layout import CacheLayout, PoolSizes
from kvcompress_jax.paged.plan import FineUpload, Plan
from kvcompress_jax.paged.transfer import RawImage, SealedImage

REPLICATED = PartitionSpec()

_Tree = TypeVar("_Tree")


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """How the KV heads of a cache are spread. Hashable: a static argument of jit.

    Attributes:
      mesh: of devices; along other axes than `axis`, everything is replicated.
      axis: of the mesh, that heads are split over.
      split_weights: whether a `Runner` splits the weights of the decoder's layers as well. Without,
        every device computes all keys and values, and they are those of one device to the bit.
    """

    mesh: Mesh
    axis: str = "heads"
    split_weights: bool = False

    def __post_init__(self) -> None:
        if self.axis not in self.mesh.axis_names:
            raise ValueError(f"axis: expected one of {self.mesh.axis_names}, got {self.axis!r}")

    @property
    def shards(self) -> int:
        """Devices along the axis."""
        return int(self.mesh.shape[self.axis])

    def split(self, name: str, size: int) -> int:
        """Each shard's part of a number of things.

        Raises:
          ValueError: they cannot be split evenly.
        """
        if size % self.shards:
            raise ValueError(
                f"mesh: expected {name} ({size}) to be a multiple of the {self.shards} devices"
                f" along {self.axis!r}"
            )
        return size // self.shards

    def local_layout(self, layout: CacheLayout) -> CacheLayout:
        """The layout of what one device holds: for byte counts.

        Raises:
          ValueError: the KV heads cannot be split evenly.
        """
        return dataclasses.replace(layout, kv_heads=self.split("kv_heads", layout.kv_heads))

    def local_sizes(self, sizes: PoolSizes) -> PoolSizes:
        """The pools of one device: pages are the same on all, and trained weights are split."""
        return dataclasses.replace(sizes, learned_bytes=sizes.learned_bytes // self.shards)

    def at(self, axis: int) -> PartitionSpec:
        """The heads are at this axis of an array."""
        return PartitionSpec(*[None] * axis, self.axis)

    def place(self, tree: _Tree, specs: Any) -> _Tree:
        """Puts arrays where specs, a pytree of the same structure, say."""
        return jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs))

    def init(
        self,
        layout: CacheLayout,
        sizes: PoolSizes,
        code: CalibratedCode | None = None,
        *,
        learned: LearnedScore | None = None,
        feedback: KeyFeedback | None = None,
    ) -> PagedCache:
        """`init_cache` on all devices; none ever has more than its own part.

        Raises:
          ValueError: the KV heads cannot be split evenly, or as `init_cache`.
        """
        self.local_layout(layout)
        make = functools.partial(init_cache, layout, sizes)
        cache = jax.eval_shape(make, code, learned=learned, feedback=feedback)

        def place(x: jax.ShapeDtypeStruct, spec: PartitionSpec) -> NamedSharding:
            # JAX calls empty arrays replicated after every program; not to compile the first twice:
            return NamedSharding(self.mesh, spec if x.size else REPLICATED)

        where = jax.tree.map(place, cache, cache_specs(self, cache))
        return jax.jit(make, out_shardings=where)(code, learned=learned, feedback=feedback)

    def run(self, function: Callable[..., Any], *args: Any, in_specs: Any, out_specs: Any) -> Any:
        """Calls a function on every device with its own part of the arguments."""
        # The compiler cannot know that what is made of gathered heads is equal on all devices.
        shared = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return shared(*args)

    def shard(self, cache: PagedCache) -> PagedCache:
        """Inside `run`: what is there of a cache, as a cache of fewer heads."""
        return dataclasses.replace(
            cache,
            layout=self.local_layout(cache.layout),
            split=HeadSplit(axis=self.axis, shards=self.shards),
        )


def whole(cache: PagedCache, layout: CacheLayout) -> PagedCache:
    """Inside `HeadSharding.run`: a shard as what it is part of, the inverse of
    `HeadSharding.shard`."""
    return dataclasses.replace(cache, layout=layout, split=None)


def update_cache(
    sharding: HeadSharding | None,
    function: Callable[..., PagedCache],
    cache: PagedCache,
    *args: Any,
    specs: tuple[Any, ...] | None = None,
) -> PagedCache:
    """`function(cache, *args)` on every device of a sharding, or simply without one.

    Args:
      sharding: of the cache.
      function: a pure one of `kvcompress_jax.paged` that returns the cache.
      cache: the cache.
      args: of the function.
      specs: of each argument; None: all are replicated.
    """
    if sharding is None:
        return function(cache, *args)
    layout = cache.layout

    def one(cache: PagedCache, *args: Any) -> PagedCache:
        return whole(function(sharding.shard(cache), *args), layout)

    of_cache = cache_specs(sharding, cache)
    in_specs = (of_cache, *(specs or [REPLICATED] * len(args)))
    updated: PagedCache = sharding.run(one, cache, *args, in_specs=in_specs, out_specs=of_cache)
    return updated


def read_cache(
    sharding: HeadSharding | None,
    function: Callable[..., Any],
    cache: PagedCache,
    *args: Any,
    specs: tuple[Any, ...] | None = None,
    out_specs: Any,
) -> Any:
    """Like `update_cache`, for a function that reads the cache and returns something else, whose
    parts are where `out_specs` say."""
    if sharding is None:
        return function(cache, *args)

    def one(cache: PagedCache, *args: Any) -> Any:
        return function(sharding.shard(cache), *args)

    in_specs = (cache_specs(sharding, cache), *(specs or [REPLICATED] * len(args)))
    return sharding.run(one, cache, *args, in_specs=in_specs, out_specs=out_specs)


def cache_specs(sharding: HeadSharding, cache: PagedCache) -> PagedCache:
    """Where the heads are in each array of a cache, as a cache of `PartitionSpec`s.

    Raises:
      ValueError: a trained score whose weights are not per layer and KV head.
    """
    at = sharding.at
    for leaf in jax.tree.leaves(cache.learned):
        if leaf.ndim < 2 or leaf.shape[1] != cache.layout.kv_heads:
            raise ValueError(
                f"learned: expected leaves [layers, {cache.layout.kv_heads} (kv_heads), ...] to"
                f" split, got {list(leaf.shape)}"
            )
    parts: dict[str, Any] = jax.tree.map(
        lambda _: REPLICATED, {f.name: getattr(cache, f.name) for f in _arrays(cache)}
    )
    heads = {"raw": 3, "mass": 2, "base": 3, "order": 2, "fine": 2, "refined": 2, "sinks": 3}
    heads |= {"key_scale": 2, "value_scale": 2, "code": 1, "learned": 1, "feedback": HEAD_AXIS}
    if cache.layout.rows is not None:
        heads["base"] = 2
    for name, axis in heads.items():
        parts[name] = jax.tree.map(lambda _, axis=axis: at(axis), getattr(cache, name))
    if cache.code is not None:
        parts["code"] = dataclasses.replace(parts["code"], frequencies=REPLICATED)
    if cache.feedback is not None:
        parts["feedback"] = dataclasses.replace(parts["feedback"], frequencies=REPLICATED)
    if cache.telemetry is not None:
        parts["telemetry"] = dataclasses.replace(parts["telemetry"], shadow=at(3))
    return dataclasses.replace(cache, **parts)


def plan_specs(sharding: HeadSharding, plan: Plan) -> Plan:
    """Of a plan: only uploaded fine planes have heads."""
    specs: Plan = jax.tree.map(lambda _: REPLICATED, plan)
    if plan.uploads is None:
        return specs
    uploads = FineUpload(chunk=REPLICATED, fine=sharding.at(2), count=REPLICATED)
    return dataclasses.replace(specs, uploads=uploads)


def raw_image_specs(sharding: HeadSharding) -> Any:
    """Of pages off the device, a `RawImage`."""
    parts: dict[str, Any] = {"kv": sharding.at(3), "mass": sharding.at(2), "seen": REPLICATED}
    return RawImage(**parts)


def image_specs(sharding: HeadSharding, layout: CacheLayout) -> Any:
    """Of pages off the device, a `RawImage` and a `SealedImage`."""
    at = sharding.at
    parts: dict[str, Any] = {
        "base": at(3) if layout.rows is None else at(2),
        "key_scale": at(2),
        "value_scale": at(2),
        "order": at(2),
        "refined": at(2),
        "first": REPLICATED,
        "heat": REPLICATED,
        "fine": at(3),
        "sinks": at(3),
    }
    return raw_image_specs(sharding), SealedImage(**parts)


def _arrays(cache: PagedCache) -> list[Any]:
    """Fields that are not static."""
    return [f for f in dataclasses.fields(cache) if not f.metadata.get("static")]
