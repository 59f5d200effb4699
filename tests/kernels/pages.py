"""Small raw pages, and the code of pages decoded by NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.kernels.pools import CodePools, init_pools

LAYERS, HEADS, RAW_PAGES, PAGES, CHUNKS = 2, 2, 4, 5, 7


def raw_pages(page_size: int, dim: int, dtype: str, seed: int = 0) -> jax.Array:
    """With an outlier channel in keys; page 3 is poison."""
    shape = (LAYERS, RAW_PAGES, 2, HEADS, page_size, dim)
    raw = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    raw = raw.at[:, :, 0, :, :, 3].mul(30.0).at[:, 3].set(jnp.nan)
    return raw.astype(dtype)


def empty_pools(page_size: int, dim: int, fine_rows: int, fine_bits: int = 4) -> CodePools:
    """Pools of 0xAA and NaN."""
    pools = init_pools(
        layers=LAYERS,
        pages=PAGES,
        chunks=CHUNKS if fine_rows else 0,
        heads=HEADS,
        page_size=page_size,
        dim=dim,
        fine_rows=fine_rows,
        fine_bits=fine_bits,
    )
    return jax.tree.map(
        lambda x: jnp.full(x.shape, 0xAA if x.dtype == jnp.uint8 else jnp.nan, x.dtype), pools
    )


def same_bytes(a: jax.Array, b: jax.Array) -> bool:
    """NaN is equal to NaN, and 0 is not -0."""
    x, y = np.asarray(a), np.asarray(b)
    return x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()


def page_of(pools: CodePools, page: int) -> dict[str, np.ndarray]:
    """Everything but the fine plane, all layers."""
    fields = (f.name for f in dataclasses.fields(pools) if not f.name.startswith("fine"))
    return {name: np.asarray(getattr(pools, name)[:, page]) for name in fields}


def decode_float64(pools: CodePools, page: int, chunks: list[int]) -> np.ndarray:
    """f64[layers, 2, heads, page_size, dim] in token order, straight from the documented format."""
    dim, page_size, rows = pools.dim, pools.page_size, pools.fine_rows
    fields = page_of(pools, page)

    def codes(flat: np.ndarray, kind: int, slots: int) -> np.ndarray:
        shape = (slots, dim // 2) if kind == 0 else (dim // 2, slots)
        packed = flat.reshape(shape) if kind == 0 else flat.reshape(shape).T
        return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float64)

    out = np.full((LAYERS, 2, HEADS, page_size, dim), np.nan)
    for layer in range(LAYERS):
        for kind in range(2):
            for head in range(HEADS):
                position = codes(fields["base"][layer, kind, head], kind, page_size)
                if rows and chunks[layer] >= 0:
                    fine = np.asarray(pools.fine[chunks[layer], kind, head])
                    detail = codes(fine, kind, rows)
                    if pools.fine_bits == 2:  # two slots to a nibble, the first in its lower bits
                        detail = 4 * np.concatenate([detail % 4, detail // 4])
                    position[: len(detail)] += (detail - 8) / 16
                name = "key" if kind == 0 else "value"
                step = fields[f"{name}_step"][layer, head].astype(np.float64)
                zero = fields[f"{name}_zero"][layer, head].astype(np.float64)
                if kind == 1:
                    step, zero = step[:, None], zero[:, None]
                out[layer, kind, head, fields["order"][layer, head]] = (position + zero) * step
    return out
