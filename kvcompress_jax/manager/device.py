"""The device work that the manager asks for: each a compiled program, each with one name."""

from typing import Protocol

import jax
import numpy as np

from kvcompress_jax.codec import NonFiniteError, check_finite
from kvcompress_jax.paged.cache import PagedCache
from kvcompress_jax.paged.plan import Plan, apply_plan
from kvcompress_jax.paged.transfer import (
    PageIds,
    RawImage,
    SealedImage,
    export_pages,
    export_raw,
    import_pages,
    import_raw,
)

apply_plan_in_place = jax.jit(apply_plan, donate_argnums=0)
_fine_planes = jax.jit(lambda cache, chunks: cache.fine[chunks])
_export = jax.jit(export_pages)
_export_raw = jax.jit(export_raw)
_import_raw = jax.jit(import_raw, donate_argnums=0)
_heat = jax.jit(lambda cache: cache.heat + 0.0)  # a copy: the cache is donated to the next step
_import = jax.jit(import_pages, donate_argnums=0)


class Device(Protocol):
    """What a manager needs of the machine that holds the pools."""

    def apply(self, cache: PagedCache, plan: Plan) -> PagedCache:
        """Applies a plan; `cache` is donated."""

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
    """The pools are arrays of JAX."""

    def apply(self, cache: PagedCache, plan: Plan) -> PagedCache:
        return apply_plan_in_place(cache, plan)

    def sealed(self, cache: PagedCache) -> np.ndarray:
        return np.asarray(cache.sealed)

    def fine_planes(self, cache: PagedCache, chunks: np.ndarray) -> jax.Array:
        return _fine_planes(cache, chunks)

    def export(self, cache: PagedCache, ids: PageIds) -> tuple[RawImage, SealedImage]:
        return _export(cache, ids)

    def restore(
        self, cache: PagedCache, ids: PageIds, images: tuple[RawImage, SealedImage]
    ) -> PagedCache:
        return _import(cache, ids, *images)

    def export_raw(self, cache: PagedCache, raw: list[int]) -> RawImage:
        return _export_raw(cache, np.array(raw, np.int32))

    def restore_raw(self, cache: PagedCache, raw: list[int], image: RawImage) -> PagedCache:
        return _import_raw(cache, np.array(raw, np.int32), image)

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
