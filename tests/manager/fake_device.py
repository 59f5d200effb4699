"""A device without a device: the pools are NumPy arrays, and a code is a copy of what it is of."""

import jax
import numpy as np

from kvcompress_jax.paged import init_cache
from kvcompress_jax.paged.transfer import RawImage, SealedImage


def fake_cache(layout, sizes):
    """The arrays of `init_cache`, in NumPy and poisoned."""
    cache = jax.tree.map(lambda x: np.array(x), init_cache(layout, sizes))
    for pool in (cache.raw, cache.mass, cache.seen, cache.sinks, cache.heat):
        pool[...] = np.nan
    for pool in (cache.base, cache.order, cache.fine):
        pool[...] = 255
    return cache


class FakeDevice:
    """Token t of a page is one number, at channel 0 of its key: a sealed page has the numbers in
    its base plane, the attention that they had received in its order, and the numbers plus the
    layer in its fine planes. All of it is done at once, in place."""

    def apply(self, cache, plan):
        if plan.copies is not None:
            for i in range(int(plan.copies.count)):
                for pool in (cache.raw, cache.mass, cache.seen):
                    pool[:, plan.copies.target[i]] = pool[:, plan.copies.source[i]]
        if plan.uploads is not None:
            for i in range(int(plan.uploads.count)):
                cache.fine[plan.uploads.chunk[i]] = plan.uploads.fine[i]
        if plan.tables is not None:
            for i in range(int(plan.tables.count)):
                cache.fine_of[:, plan.tables.page[i]] = plan.tables.chunks[i]
        if plan.seals is not None:
            for i in range(int(plan.seals.count)):
                self._seal(cache, plan.seals, i)
        return cache, None if plan.seals is None else cache.sealed[plan.seals.page]

    def _seal(self, cache, seals, i):
        raw, page, size = seals.raw[i], seals.page[i], cache.layout.page_size
        tokens = cache.raw[0, raw, 0, 0, :, 0]
        cache.sealed[page] = finite = bool(np.isfinite(tokens).all())
        if not finite:
            return
        tokens = tokens.astype(np.uint8)
        for layer in range(cache.layout.layers):
            cache.base[layer, page].reshape(-1)[:size] = tokens
            cache.order[layer, page, 0] = cache.mass[layer, raw, 0].astype(np.uint8)
            if (chunk := seals.chunks[i, layer]) >= 0:
                cache.fine[chunk].reshape(-1)[: cache.layout.fine_rows] = (
                    tokens[: cache.layout.fine_rows] + layer
                )
            if seals.sink[i] >= 0:
                kv = cache.raw[layer, raw, :, :, : cache.layout.sink_tokens]
                cache.sinks[layer, seals.sink[i]] = kv
        cache.fine_of[:, page] = seals.chunks[i]
        cache.heat[page] = 0.0

    def sealed(self, cache):
        return cache.sealed

    def fine_planes(self, cache, chunks):
        return cache.fine[chunks].copy()

    def export(self, cache, ids):
        pick = lambda pool, index: np.moveaxis(pool[:, np.maximum(index, 0)], 1, 0).copy()  # noqa: E731
        sealed = SealedImage(
            base=pick(cache.base, ids.sealed),
            key_scale=jax.tree.map(lambda x: pick(x, ids.sealed), cache.key_scale),
            value_scale=jax.tree.map(lambda x: pick(x, ids.sealed), cache.value_scale),
            order=pick(cache.order, ids.sealed),
            refined=np.zeros(len(ids.sealed), np.uint8),
            first=np.zeros(len(ids.sealed), np.int32),
            heat=cache.heat[np.maximum(ids.sealed, 0)],
            fine=cache.fine[np.maximum(ids.chunks, 0)],
            sinks=pick(cache.sinks, ids.sink),
        )
        return self.export_raw(cache, ids.raw), sealed

    def restore(self, cache, ids, images):
        raw, sealed = images
        cache = self.restore_raw(cache, ids.raw, raw)
        for i, page in enumerate(ids.sealed):
            if page < 0:
                continue
            cache.base[:, page], cache.order[:, page] = sealed.base[i], sealed.order[i]
            cache.heat[page], cache.sealed[page] = sealed.heat[i], True
            cache.fine_of[:, page] = ids.chunks[i]
            for layer, chunk in enumerate(ids.chunks[i]):
                if chunk >= 0:
                    cache.fine[chunk] = sealed.fine[i, layer]
            if ids.sink[i] >= 0:
                cache.sinks[:, ids.sink[i]] = sealed.sinks[i]
        return cache

    def export_raw(self, cache, raw):
        index = np.maximum(np.asarray(raw), 0)
        pools = (cache.raw, cache.mass, cache.seen)
        return RawImage(*(np.moveaxis(pool[:, index], 1, 0).copy() for pool in pools))

    def restore_raw(self, cache, raw, image):
        for i, page in enumerate(raw):
            if page >= 0:
                cache.raw[:, page], cache.mass[:, page] = image.kv[i], image.mass[i]
                cache.seen[:, page] = image.seen[i]
        return cache

    def heat(self, cache):
        return cache.heat.copy()

    def why_rejected(self, cache, raw, first_page):
        return f"page {first_page}"
