"""`seal_page`: the kernels, the GPU's interpreted, against the paged cache's own code and against
float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.feedback import PageFeedback
from kvcompress_jax.importance import ImportanceRule
from kvcompress_jax.kernels.seal_page import seal_page
from kvcompress_jax.kernels.seal_page.cpu import seal_page_cpu
from kvcompress_jax.kernels.seal_page.reference import seal_page_reference
from kvcompress_jax.kernels.seal_page.triton import seal_page_triton
from kvcompress_jax.paged.page_code import code_rows, fit_page, lay_out
from tests.kernels.pages import (
    CHUNKS,
    HEADS,
    LAYERS,
    PAGES,
    decode_float64,
    empty_pools,
    page_of,
    raw_pages,
    same_bytes,
)

RULE = ImportanceRule()
N, COUNT = 4, 3
SOURCE, TARGET = [0, 2, 1, 3], [4, 1, 2, 0]  # the fourth is padding, and its page poison
CHUNK_OF = [[0, 3], [-1, 6], [1, 2], [4, 5]]
SINKS = 3  # exact first tokens of the first page
# page size, dim, fine rows, dtype, channels of a piece, bits of a refined slot
SIZES = [
    (16, 64, 8, "bfloat16", 32, 4),
    (16, 64, 16, "float16", 16, 4),
    (16, 64, 0, "float32", 32, 4),
    (32, 96, 10, "bfloat16", 16, 4),
    (16, 256, 8, "bfloat16", 64, 4),
    (64, 128, 32, "bfloat16", 32, 4),
    (16, 64, 8, "float16", 16, 2),
    (64, 128, 32, "bfloat16", 32, 2),
    (32, 64, 8, "bfloat16", 32, 2),
]


@dataclasses.dataclass(frozen=True)
class Work:
    raw: jax.Array
    fits: object  # PageFit [n, layers, ...]
    worth: jax.Array | None
    fine_bits: int = 4

    @property
    def tables(self):
        return {
            "source": jnp.array(SOURCE, jnp.int32),
            "target": jnp.array(TARGET, jnp.int32),
            "chunks": jnp.array(CHUNK_OF, jnp.int32),
            "count": jnp.int32(COUNT),
            "exact": jnp.array([SINKS, 0, 0, 0], jnp.int32),
            "worth": self.worth,
        }


@functools.cache
def make_work(page_size, dim, fine_rows, dtype, fine_bits=4):
    raw = raw_pages(page_size, dim, dtype)
    kv = raw[:, jnp.array(SOURCE)].swapaxes(0, 1)  # [n, layers, 2, heads, page_size, dim]
    mass = jax.random.uniform(jax.random.key(1), (N, LAYERS, HEADS, page_size))
    exact = jnp.arange(page_size)[None, :] < jnp.array([SINKS, 0, 0, 0])[:, None]

    def fit(kv, mass, exact):
        seen = jnp.arange(page_size, 0, -1, dtype=jnp.float32)
        return fit_page(
            kv[0], kv[1], mass, seen, exact, rule=RULE, refined=fine_rows * 4 // fine_bits
        )

    layers = jax.vmap(fit, in_axes=(0, 0, None))
    fits = jax.jit(jax.vmap(layers))(kv, mass, exact)
    return Work(raw, fits, fits.worth, fine_bits)


@functools.partial(jax.jit, static_argnames=("channels", "pairs"))
def _run_triton(raw, pools, tables, channels, pairs=4):
    tuning = {"num_warps": 4, "num_stages": 1, "channels": channels}
    return seal_page_triton(raw, pools, pairs=pairs, tuning=tuning, interpret=True, **tables)


def run_triton(work, pools, channels, **changes):
    return _run_triton(work.raw, pools, work.tables | changes, channels)


@jax.jit
def _run_cpu(raw, pools, tables):
    return seal_page_cpu(raw, pools, **tables)


def run_cpu(work, pools, channels, **changes):
    del channels  # of Triton's pieces
    return _run_cpu(work.raw, pools, work.tables | changes)


KERNELS = {"triton": run_triton, "cpu": run_cpu}
kernels = pytest.mark.parametrize("kernel", KERNELS)
# To the byte, where XLA fuses products and sums as the C++ compiler does.
fused = pytest.mark.parametrize("kernel", ["triton", pytest.param("cpu", marks=pytest.mark.slow)])


@functools.partial(jax.jit, static_argnames=("fine_rows", "fine_bits"))
def _code_page(keys, values, fit, refines, *, fine_rows, fine_bits):
    fine = {"fine_rows": fine_rows, "fine_bits": fine_bits}
    return lay_out(code_rows(keys, values, fit, None, refines, **fine), fit, **fine).joined()


def expected_page(work, entry, layer, fine_rows):
    """The paged cache's own code of one page of one layer."""
    fit = jax.tree.map(lambda x: x[entry, layer], work.fits)
    kv = work.raw[layer, SOURCE[entry]]
    refines = jnp.asarray(CHUNK_OF[entry][layer] >= 0)
    return _code_page(*kv, fit, refines, fine_rows=fine_rows, fine_bits=work.fine_bits)


def is_the_code(work, pools, fine_rows):
    """Whether the pools hold, byte for byte, the code of the pages that were to be sealed."""
    for entry in range(COUNT):
        for layer in range(LAYERS):
            code = expected_page(work, entry, layer, fine_rows)
            page = {name: x[layer] for name, x in page_of(pools, TARGET[entry]).items()}
            pairs = [
                (page["base"], code.base),
                (page["key_step"], code.key_scale.step),
                (page["key_zero"], code.key_scale.zero),
                (page["value_step"], code.value_scale.step),
                (page["value_zero"], code.value_scale.zero),
                (page["order"], code.order),
            ]
            chunk = CHUNK_OF[entry][layer]
            if fine_rows and chunk >= 0:
                pairs.append((pools.fine[chunk], code.fine))
            if not all(same_bytes(got, want) for got, want in pairs):
                return False
    return True


@kernels
@pytest.mark.slow
@pytest.mark.parametrize(("page_size", "dim", "fine_rows", "dtype", "channels", "fine_bits"), SIZES)
def test_is_the_code_of_the_paged_cache_to_the_byte(
    kernel, page_size, dim, fine_rows, dtype, channels, fine_bits
):
    work = make_work(page_size, dim, fine_rows, dtype, fine_bits)
    before = empty_pools(page_size, dim, fine_rows, fine_bits)
    after, sealed = KERNELS[kernel](work, before, channels)
    assert np.array_equal(sealed, [True, True, True, False])
    assert is_the_code(work, after, fine_rows)
    # The judge says no to another order, another page, and a page that was not written.
    assert not is_the_code(work, before, fine_rows)
    other = dataclasses.replace(work, raw=work.raw.at[1, 1, 1, 1, 2, 5].add(0.5))
    assert not is_the_code(other, after, fine_rows)
    if work.worth is not None:
        other_order = KERNELS[kernel](work, before, channels, worth=-work.worth)[0]
        assert not is_the_code(work, other_order, fine_rows)
    # What was not asked for is as it was: other pages, and the chunks of nobody and of the padding.
    for page in set(range(PAGES)) - set(TARGET[:COUNT]):
        was, now = page_of(before, page), page_of(after, page)
        assert all(same_bytes(was[name], now[name]) for name in was)
    if fine_rows:
        for chunk in set(range(CHUNKS)) - {0, 1, 2, 3, 6}:
            assert same_bytes(before.fine[chunk], after.fine[chunk])


@fused
@pytest.mark.parametrize(("fine_rows", "fine_bits"), [(8, 4), (0, 4), (8, 2)])
def test_the_reference_is_the_kernel(kernel, fine_rows, fine_bits):
    work = make_work(16, 64, fine_rows, "bfloat16", fine_bits)
    before = empty_pools(16, 64, fine_rows, fine_bits)
    got, sealed = jax.jit(seal_page_reference)(work.raw, before, **work.tables)
    want, _ = KERNELS[kernel](work, before, 32)
    assert np.array_equal(sealed, [True, True, True, False])
    assert all(same_bytes(a, b) for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True))


@functools.cache
def feedback_of(dim):
    """Of every page, layer and head its own, as large as measured ones."""
    shape = (N, LAYERS, HEADS, 2, 4, dim)
    sizes = jnp.array([1.0, 0.1])[None, None, None, :, None, None]
    return jax.random.normal(jax.random.key(3), shape) * sizes


def fed_code(work, entry, layer, fine_rows, feedback):
    """The paged cache's own code of a page with feedback, planes as rows."""
    fit = jax.tree.map(lambda x: x[entry, layer], work.fits)
    kv = work.raw[layer, SOURCE[entry]]
    both = feedback[entry, layer].reshape(HEADS, 2, 4, 2, -1).transpose(1, 0, 3, 4, 2)
    refines = jnp.asarray(CHUNK_OF[entry][layer] >= 0)

    @jax.jit
    def code(keys, values, fit, carry, answer):
        page = PageFeedback(carry=carry, answer=answer)
        fine = {"fine_rows": fine_rows, "fine_bits": work.fine_bits}
        rows = code_rows(keys, values, fit, page, refines, **fine)
        return lay_out(rows, fit, **fine).joined()

    return code(kv[0], kv[1], fit, *both)


def fed_differences(work, pools, fine_rows, feedback):
    """Shares of the bytes of keys' planes, and of all else, that are not the paged cache's.

    Not to the byte: the sum of what a channel owes may be a float32 that rounds the other way, and
    then every code that follows in its token may be another.
    """
    keys, rest = [], []
    for entry in range(COUNT):
        for layer in range(LAYERS):
            code = fed_code(work, entry, layer, fine_rows, feedback)
            page = {name: x[layer] for name, x in page_of(pools, TARGET[entry]).items()}
            keys.append(np.asarray(page["base"])[0] != np.asarray(code.base)[0])
            rest.append(np.asarray(page["base"])[1] != np.asarray(code.base)[1])
            rest.append(np.asarray(page["order"]) != np.asarray(code.order))
            chunk = CHUNK_OF[entry][layer]
            if fine_rows and chunk >= 0:
                fine = np.asarray(pools.fine[chunk]) != np.asarray(code.fine)
                keys.append(fine[0])
                rest.append(fine[1])
    return [float(np.concatenate([x.ravel() for x in each]).mean()) for each in (keys, rest)]


@kernels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("page_size", "dim", "fine_rows", "dtype", "channels", "fine_bits"),
    [SIZES[0], SIZES[2], SIZES[3], SIZES[6], SIZES[8]],
)
def test_keys_are_fed_back_as_in_the_paged_cache(
    kernel, page_size, dim, fine_rows, dtype, channels, fine_bits
):
    work = make_work(page_size, dim, fine_rows, dtype, fine_bits)
    feedback = feedback_of(dim)
    before = empty_pools(page_size, dim, fine_rows, fine_bits)
    after, sealed = KERNELS[kernel](work, before, channels, feedback=feedback)
    assert np.array_equal(sealed, [True, True, True, False])
    keys, rest = fed_differences(work, after, fine_rows, feedback)
    assert rest == 0
    assert keys < 0.01
    plain, _ = KERNELS[kernel](work, before, channels)
    assert fed_differences(work, plain, fine_rows, feedback)[0] > 0.1
    other = KERNELS[kernel](work, before, channels, feedback=feedback[:, :, ::-1])[0]
    assert fed_differences(work, other, fine_rows, feedback)[0] > 0.1
    reference, _ = jax.jit(functools.partial(seal_page_reference, pairs=4))(
        work.raw, before, **work.tables | {"feedback": feedback}
    )
    keys, rest = fed_differences(work, reference, fine_rows, feedback)
    assert rest == 0
    assert keys < 0.01


def within_level(work, pools, fine_rows):
    """Every value is within half a cell of the raw one: a step's 32nd where it is refined.

    Scales are rounded so that the range is covered: the zero point's rounding, 2**-11 of it, and
    float32's are within 2**-6 of a step for zero points up to 30 steps.
    """
    for entry in range(COUNT):
        got = decode_float64(pools, TARGET[entry], CHUNK_OF[entry])
        raw = np.asarray(work.raw[:, SOURCE[entry]], np.float64)
        fields = page_of(pools, TARGET[entry])
        slot = np.argsort(fields["order"], axis=-1)  # [layers, heads, token]
        refined = (slot < fine_rows) & (np.array(CHUNK_OF[entry]) >= 0)[:, None, None]
        cell = np.where(refined, 1 / 32, 1 / 2)[..., None] + 2.0**-6
        key_step = fields["key_step"].astype(np.float64)[:, :, None, :]
        value_step = np.take_along_axis(fields["value_step"].astype(np.float64), slot, axis=-1)
        counted = np.arange(raw.shape[-2])[:, None] >= (SINKS if entry == 0 else 0)
        key_error = np.abs(got[:, 0] - raw[:, 0]) * counted
        value_error = np.abs(got[:, 1] - raw[:, 1])
        if np.any(key_error > key_step * cell) or np.any(
            value_error > value_step[..., None] * cell
        ):
            return False
    return True


@kernels
def test_is_within_the_bound_of_its_bits_in_float64(kernel):
    work = make_work(16, 64, 8, "bfloat16")
    after, _ = KERNELS[kernel](work, empty_pools(16, 64, 8), 32)
    assert within_level(work, after, 8)
    assert not within_level(work, after, 9)  # one slot more than there are
    flipped = dataclasses.replace(
        after, base=after.base.at[0, TARGET[0], 1, 0, 9].add(jnp.uint8(2))
    )
    assert not within_level(work, flipped, 8)


@kernels
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_page_that_is_not_finite_is_refused_and_spoils_no_other(kernel, bad, kind):
    work = make_work(16, 64, 8, "bfloat16")
    pools = empty_pools(16, 64, 8)
    healthy, _ = KERNELS[kernel](work, pools, 32)
    spoiled = dataclasses.replace(work, raw=work.raw.at[1, 2, kind, 1, 5, 7].set(bad))
    after, sealed = KERNELS[kernel](spoiled, pools, 32)
    assert np.array_equal(sealed, [True, False, True, False])
    for page in (4, 2, 0, 3):
        was, now = page_of(healthy, page), page_of(after, page)
        assert all(same_bytes(was[name], now[name]) for name in was)
    assert same_bytes(healthy.fine[jnp.array([0, 1, 2, 3, 4, 5])], after.fine[:6])


@kernels
def test_order_of_equals_infinities_and_nan(kernel):
    work = make_work(16, 64, 8, "bfloat16")
    worth = jnp.zeros((N, LAYERS, HEADS, 16)).at[..., 4].set(jnp.inf).at[..., 9].set(jnp.inf)
    worth = worth.at[..., 0].set(jnp.nan).at[..., 15].set(-jnp.inf).at[..., 2].set(-1.0)
    after, _ = KERNELS[kernel](work, empty_pools(16, 64, 8), 32, worth=worth)
    expected = [4, 9, 1, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14, 2, 0, 15]
    assert np.array_equal(page_of(after, 4)["order"][1, 1], expected)


def test_bad_input_is_one_line():
    work = make_work(16, 64, 8, "bfloat16")
    pools = empty_pools(16, 64, 8)
    with pytest.raises(ValueError, match=r"^raw: expected \[2, raw_pages, 2, 2, 16, 64\], got \["):
        seal_page(work.raw[:, :, :, :, :8], pools, **work.tables)
    with pytest.raises(ValueError, match=r"^target: expected int32\[4\], got int32\[3\]$"):
        seal_page(work.raw, pools, **work.tables | {"target": jnp.array(TARGET[:3], jnp.int32)})
    feedback = feedback_of(64)
    with pytest.raises(ValueError, match=r"^feedback: expected float32\[4, 2, 2, 2, 4, 64\], got"):
        seal_page(work.raw, pools, **work.tables, feedback=feedback[1:])
    with pytest.raises(ValueError, match=r"^pairs: expected a power of two that divides 32 "):
        seal_page(work.raw, pools, **work.tables, feedback=feedback, pairs=3)
    with pytest.raises(ValueError, match=r"^implementation: expected one of .*, got 'cuda'$"):
        seal_page(work.raw, pools, **work.tables, implementation="cuda")
    with pytest.raises(NotImplementedError, match="triton: expected a CUDA device, got cpu"):
        seal_page(work.raw, pools, **work.tables, implementation="triton")
    with pytest.raises(
        NotImplementedError, match=r"channels: expected a power of two that divides 32"
    ):
        run_triton(work, pools, 24)
    shared = empty_pools(16, 64, 6, 2)
    with pytest.raises(NotImplementedError, match="fine_rows: expected a power of two where two"):
        seal_page_triton(work.raw, shared, **work.tables, interpret=True)
