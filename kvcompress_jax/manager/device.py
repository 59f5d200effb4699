"""The device work that the manager asks for: each a compiled program, each with one name."""

import functools
from typing import Protocol

import jax
import numpy as np

from kvcompress_jax.codec import NonFiniteError, check_finite
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.plan import Plan, apply_plan
from kvcompress_jax.paged.sharding import (
    REPLICATED,
    HeadSharding,
    image_specs,
    plan_specs,
    raw_image_specs,
    read_cache,
    update_cache,
)
from kvcompress_jax.paged.transfer import (
    PageIds,
    RawImage,
    SealedImage,
    export_pages,
    export_raw,
    import_pages,
    import_raw,
)

# Of a cache without a sharding where `sharding` is None.
_updating = functools.partial(jax.jit, donate_argnums=0, static_argnames="sharding")
_reading = functools.partial(jax.jit, static_argnames="sharding")


@_updating
def apply_plan_in_place(
    cache: PagedCache, plan: Plan, *, sharding: HeadSharding | None = None
) -> tuple[PagedCache, jax.Array | None]:
    """`apply_plan`, and bool[entries]: which of its seals have a code, None if there are none. The
    cache is donated."""
    specs = None if sharding is None else (plan_specs(sharding, plan),)
    cache = update_cache(sharding, apply_plan, cache, plan, specs=specs)
    return cache, None if plan.seals is None else cache.sealed[plan.seals.page]


@_reading
def _fine_planes(
    cache: PagedCache, chunks: jax.Array, *, sharding: HeadSharding | None
) -> jax.Array:
    out = None if sharding is None else sharding.at(2)
    planes: jax.Array = read_cache(
        sharding, lambda cache, chunks: cache.fine[chunks], cache, chunks, out_specs=out
    )
    return planes


@_reading
def _export(
    cache: PagedCache, ids: PageIds, *, sharding: HeadSharding | None
) -> tuple[RawImage, SealedImage]:
    out = None if sharding is None else image_specs(sharding, cache.layout)
    images: tuple[RawImage, SealedImage] = read_cache(
        sharding, export_pages, cache, ids, out_specs=out
    )
    return images


@_reading
def _export_raw(cache: PagedCache, raw: jax.Array, *, sharding: HeadSharding | None) -> RawImage:
    out = None if sharding is None else raw_image_specs(sharding)
    image: RawImage = read_cache(sharding, export_raw, cache, raw, out_specs=out)
    return image


@_updating
def _import(
    cache: PagedCache,
    ids: PageIds,
    raw: RawImage,
    sealed: SealedImage,
    *,
    sharding: HeadSharding | None,
) -> PagedCache:
    specs = None if sharding is None else (REPLICATED, *image_specs(sharding, cache.layout))
    return update_cache(sharding, import_pages, cache, ids, raw, sealed, specs=specs)


@_updating
def _import_raw(
    cache: PagedCache, raw: jax.Array, image: RawImage, *, sharding: HeadSharding | None
) -> PagedCache:
    specs = None if sharding is None else (REPLICATED, raw_image_specs(sharding))
    return update_cache(sharding, import_raw, cache, raw, image, specs=specs)


# A copy: the cache is donated to the next step. Heat is on every device, so that none is named.
_heat = jax.jit(lambda cache: cache.heat + 0.0)


class Device(Protocol):
    """What a manager needs of the machine that holds the pools."""

    def apply(
        self, cache: PagedCache, plan: Plan
    ) -> tuple[PagedCache, jax.Array | np.ndarray | None]:
        """Applies a plan; `cache` is donated. Also bool[entries], on its way to the host: which of
        the plan's seals have a code; None if there are none. Does not wait."""

    def sealed(self, cache: PagedCache) -> np.ndarray:
        """bool[sealed_pages]: which hold a code. Waits."""

    def fine_planes(self, cache: PagedCache, chunks: np.ndarray) -> jax.Array | np.ndarray:
        """u8[chunks, 2, heads, fine_rows * dim/2], copied out of the pool. Does not wait."""

    def export(self, cache: PagedCache, ids: PageIds) -> tuple[RawImage, SealedImage]:
        """Copies pages out of the pools. Does not wait."""

    def restore(
        self, cache: PagedCache, ids: PageIds, images: tuple[RawImage, SealedImage]
    ) -> PagedCache:
        """Writes pages back; `cache` is donated."""

    def export_raw(self, cache: PagedCache, raw: list[int]) -> RawImage:
        """Copies raw pages out of the pools. Does not wait."""

    def restore_raw(self, cache: PagedCache, raw: list[int], image: RawImage) -> PagedCache:
        """Writes raw pages back; `cache` is donated."""

    def heat(self, cache: PagedCache) -> jax.Array | np.ndarray:
        """f32[sealed_pages], copied, and on its way to the host. Does not wait."""

    def why_rejected(self, cache: PagedCache, raw: int, first_page: int) -> str:
        """Names what is wrong with a raw page that could not be sealed. Waits."""


class JaxDevice:
    """The pools are arrays of JAX, on one device or with their heads split over several."""

    def __init__(self, sharding: HeadSharding | None = None) -> None:
        self._sharding = sharding

    def apply(self, cache: PagedCache, plan: Plan) -> tuple[PagedCache, jax.Array | None]:
        cache, sealed = apply_plan_in_place(cache, plan, sharding=self._sharding)
        if sealed is not None:
            sealed.copy_to_host_async()
        return cache, sealed

    def sealed(self, cache: PagedCache) -> np.ndarray:
        return np.asarray(cache.sealed)

    def fine_planes(self, cache: PagedCache, chunks: np.ndarray) -> jax.Array:
        return _fine_planes(cache, chunks, sharding=self._sharding)

    def export(self, cache: PagedCache, ids: PageIds) -> tuple[RawImage, SealedImage]:
        return _export(cache, ids, sharding=self._sharding)

    def restore(
        self, cache: PagedCache, ids: PageIds, images: tuple[RawImage, SealedImage]
    ) -> PagedCache:
        return _import(cache, ids, *images, sharding=self._sharding)

    def export_raw(self, cache: PagedCache, raw: list[int]) -> RawImage:
        return _export_raw(cache, np.array(raw, np.int32), sharding=self._sharding)

    def restore_raw(self, cache: PagedCache, raw: list[int], image: RawImage) -> PagedCache:
        return _import_raw(cache, np.array(raw, np.int32), image, sharding=self._sharding)

    def heat(self, cache: PagedCache) -> jax.Array:
        heat = _heat(cache)
        heat.copy_to_host_async()
        return heat

    def why_rejected(self, cache: PagedCache, raw: int, first_page: int) -> str:
        """Names layer, head and page of the first value that is not finite."""
        for layer, kv in enumerate(cache.raw[:, raw]):
            for name, x in (("keys", kv[0]), ("values", kv[1])):
                try:
                    check_finite(name, x[None], layer=layer, first_page=first_page)
                except NonFiniteError as e:
                    return str(e)
        return f"page {first_page}: expected values that a calibrated code can hold"
