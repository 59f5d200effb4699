"""What vLLM's pages are coded with beside their layout: calibrated codes, scores, feedback."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from kvcompress_jax.calibrated.fit import fit_keys  # noqa: E402
from kvcompress_jax.calibrated.profile import save_profile  # noqa: E402
from kvcompress_jax.calibrated.row import RowLayout  # noqa: E402
from kvcompress_jax.config import CompressionConfig, ConfigError  # noqa: E402
from kvcompress_jax.feedback import at_position, fit_feedback  # noqa: E402
from kvcompress_jax.importance.learned import (  # noqa: E402
    feature_count,
    init_learned,
    save_learned,
)
from kvcompress_jax.interop.vllm.model_files import Source, layer_index  # noqa: E402
from kvcompress_jax.interop.vllm.offload.pages import BlockPages  # noqa: E402
from kvcompress_jax.interop.vllm.stats import compression_stats  # noqa: E402
from kvcompress_jax.interop.vllm.step import Seals  # noqa: E402
from kvcompress_jax.interop.vllm.tables import (  # noqa: E402
    NO_TABLES,
    CodeTables,
    check_files,
    load_tables,
)
from kvcompress_jax.interop.vllm.verify import verify  # noqa: E402
from kvcompress_jax.models.errors import ModelError  # noqa: E402
from kvcompress_jax.models.load import load_model, read_outline  # noqa: E402
from kvcompress_jax.paged import encode_page  # noqa: E402
from tests.calibrated.synthetic import frequencies, make_profile  # noqa: E402
from tests.interop.vllm.test_layer import (  # noqa: E402
    DIM,
    HEADS,
    PAGE,
    SMALL,
    Engine,
    damaged_by_infinity,
    work,
)
from tests.interop.vllm.test_offload import error_without_a_slot  # noqa: E402
from tests.lab.small import write_small_model  # noqa: E402

BOUND = 0.06  # of normal noise with 6 bits: a quarter of what 4 bits leave (`test_layer`), and room


def profile_of_noise(seed=0):
    """For keys that are normal noise, which RoPE leaves what it is, with 6 bits."""
    keys = np.random.default_rng(seed).normal(size=(HEADS, 1500, DIM))
    fits = [fit_keys(k, np.eye(DIM), bits=6 * DIM) for k in keys]
    made, _ = make_profile(heads=HEADS, dim=DIM)
    arrays = {
        name: np.array([[getattr(f, name) for f in fits]], getattr(made, name).dtype)
        for name in ("mean", "decode", "scale", "step", "widths")
    }
    rows = RowLayout(key_bytes=6 * DIM // 8, value_bits=6, refine_every=16)
    return dataclasses.replace(made, rows=rows, **arrays)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """`calibrated()` is an engine whose pages have rows of a calibrated code."""
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    save_profile(path, profile_of_noise())

    def engine(seed=0, window=PAGE, **options):
        config = dataclasses.replace(SMALL, profile=str(path), window_tokens=window)
        code = profile_of_noise(seed).code(jnp.asarray(frequencies(1, DIM)))
        tables = jax.device_get(CodeTables(code=code)).of(0, slice(None))
        return Engine(config, tables=tables, **options)

    return engine


def test_attention_to_rows_of_a_calibrated_code(calibrated):
    engine = calibrated()
    one, fourth, error = work(engine)
    assert error < BOUND
    stats = compression_stats(engine.states, damaged=engine.layer.damaged)
    assert stats["blocks_level_3"] >= 8 and stats["blocks_level_0"] > 0
    assert stats["blocks_level_1"] == stats["blocks_level_2"] == stats["damaged"] == 0
    assert 6 < stats["effective_bits"] < 8.5
    assert engine.layer.tracks_attention
    # The judge can say no: pages that are taken to be elsewhere.
    engine.states.index += engine.states.sealed
    assert engine.step([(one, 1), (fourth, 1)]) > 2 * BOUND


def test_pages_of_a_calibrated_code_leave_and_come_back(calibrated):
    one, other = calibrated(), calibrated()
    sequence = one.sequence()
    one.step([(sequence, 5 * PAGE + 3)])
    one.step([(sequence, 1)])
    pages, back = (BlockPages(e.states, e.executor) for e in (one, other))
    assert [p.name for p in pages.planes] == ["base", "refined", "sinks", "heat"]
    # Rows of another profile mean something else, whatever their size.
    foreign = calibrated(seed=1)
    assert pages.code == back.code != BlockPages(foreign.states, foreign.executor).code
    copy = other.sequence() | {n: sequence[n][: 5 * PAGE] for n in "kv"}
    copy["blocks"] = [other.free.pop() for _ in range(5)]
    for place, block in enumerate(copy["blocks"]):
        left = pages.take_out(sequence["blocks"][place])  # the last ones are raw until now
        back.put_in(block, place, left)
        verify(other.states)
        again = back.take_out(block)
        assert left.keys() == again.keys()
        assert all(np.array_equal(left[n], again[n]) for n in left)
    assert other.step([(copy, 1)]) < BOUND
    # The judge can say no: the second page in the place of the first.
    back.put_in(copy["blocks"][0], 0, pages.take_out(sequence["blocks"][1]))
    assert other.step([(copy, 1)]) > 2 * BOUND


def test_a_first_page_without_a_slot_is_coded_again(calibrated):
    # First tokens are four times as large as the others here, and now as coarse.
    assert error_without_a_slot(calibrated(), calibrated()) < 4 * BOUND


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_too_large_for_a_calibrated_code_is_counted(calibrated, dtype):
    assert damaged_by_infinity(calibrated(window=0, dtype=dtype)) == 1


def feedback_of_noise():
    rng = np.random.default_rng(3)
    q = rng.normal(size=(HEADS, 400, 3)) @ rng.normal(size=(HEADS, 3, DIM))
    moment = np.einsum("hnd,hne->hde", q, q)[None] / q.shape[1]
    step = np.full((1, HEADS, DIM // 2), 0.25)
    return fit_feedback(moment, step, frequencies(1, DIM), windows=(1,))


def score_of_noise(layers=1, heads=HEADS, dim=DIM):
    shape = (layers, heads, feature_count(dim))
    score = init_learned(jax.random.key(0), jnp.zeros(shape), jnp.ones(shape), hidden=4)
    return jax.tree.map(lambda x: x * 3, score)


def of_layer(table):
    return jax.tree.map(lambda x: x[0], table)


@pytest.mark.parametrize("name", ["learned", "feedback"])
def test_pages_are_coded_with_the_tables_of_their_layer(name):
    config = dataclasses.replace(SMALL, sink_tokens=0, ratio=0.25)
    made = {"learned": score_of_noise, "feedback": feedback_of_noise}[name]()
    tables = jax.device_get(CodeTables(**{name: made})).of(0, slice(None))
    layer = Engine(config, tables=tables).layer
    assert layer.tracks_attention
    rng, layout = np.random.default_rng(5), layer.carve.layout
    kv = rng.normal(size=(2, 2, HEADS, PAGE, DIM)).astype(np.float32)
    mass = rng.uniform(0.1, 9, (2, HEADS, PAGE)).astype(np.float32)
    seen = rng.uniform(1, 50, (2, PAGE)).astype(np.float32)
    layer.seal_pages(
        *(torch.from_numpy(x) for x in (kv, mass, seen)),
        Seals(
            raw=np.zeros(2, np.int64),
            block=np.array([7, 5]),
            chunk=np.array([0, 1]),
            sink=np.array([-1, -1]),
            first=np.array([0, 6 * PAGE], np.int32),
        ),
    )
    got = layer.pools["base"][5][0].numpy()  # of the keys

    def coded(**tables):
        code = encode_page(
            *(jnp.asarray(x) for x in (*kv[1], mass[1], seen[1])),
            None,
            rule=layout.importance,
            fine_rows=layout.fine_rows,
            fine_bits=layout.fine_bits,
            **tables,
        )
        return np.asarray(code.base[0])

    there = of_layer(made) if name == "learned" else at_position(of_layer(made), 6 * PAGE)
    assert np.mean(got == coded(**{name: there})) > 0.99  # but for sums that round otherwise
    # The judge can say no.
    assert np.mean(got == coded()) < 0.95
    if name == "feedback":
        assert np.mean(got == coded(feedback=at_position(of_layer(made), 0))) < 0.95


def test_a_worker_has_the_tables_of_its_heads_and_layer():
    code = make_profile(layers=3, heads=4, dim=DIM)[0].code(jnp.asarray(frequencies(3, DIM)))
    moved = dataclasses.replace(
        code, value_unit=jnp.arange(12.0).reshape(3, 4), frequencies=code.frequencies.at[1].mul(2)
    )
    learned = score_of_noise(layers=3, heads=4)
    tables = CodeTables(code=moved, learned=learned)
    mine = tables.of(1, Source("x", rank=1, ranks=2).heads(4, 2))
    np.testing.assert_array_equal(mine.code.value_unit, [[6.0, 7.0]])
    np.testing.assert_array_equal(mine.code.frequencies, moved.frequencies[1:2])
    np.testing.assert_array_equal(mine.code.decode, code.decode[1:2, 2:])
    np.testing.assert_array_equal(mine.learned.gain, learned.gain[1:2, 2:])
    assert mine.feedback is None
    assert layer_index("model.layers.17.self_attn.attn") == 17
    with pytest.raises(ModelError, match=r"expected one number in its name, got \[1, 2\]"):
        layer_index("encoder.1.layers.2")
    # Fewer heads than workers: some have the same one.
    assert [Source("x", rank=r, ranks=4).heads(2, 1).start for r in range(4)] == [0, 0, 1, 1]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("model") / "tiny")


def test_tables_are_read_for_their_model_and_no_other(small_model, tmp_path):
    known = read_outline(small_model)
    decoder = known.config
    shape = {"heads": decoder.num_kv_heads, "dim": decoder.head_dim}
    made, _ = make_profile(layers=decoder.num_layers, **shape)
    profile, score = tmp_path / "profile.safetensors", tmp_path / "score.safetensors"
    save_profile(profile, dataclasses.replace(made, fingerprint=known.fingerprint))
    save_learned(score, score_of_noise(decoder.num_layers, **shape), fingerprint=known.fingerprint)
    other = str(write_small_model(tmp_path / "other", "qwen2"))
    coded = CompressionConfig(profile=str(profile))
    scored = CompressionConfig(learned_importance=str(score))
    found = load_tables(coded, str(small_model))
    np.testing.assert_array_equal(found.code.decode, made.decode)
    assert found.learned is None and found.feedback is None
    found = load_tables(scored, str(small_model))
    assert found.learned is not None and found.code is None and found.feedback is None
    for config, message in ((coded, "expected a profile of this model"), (scored, "fingerprint")):
        check_files(config, str(small_model))
        for read in (check_files, load_tables):
            with pytest.raises(ConfigError, match=message):
                read(config, other)
    with pytest.raises(ConfigError, match="expected a model that this package reads"):
        check_files(coded, str(tmp_path))
    gone = dataclasses.replace(coded, profile=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="gone: expected a profile"):
        check_files(gone, str(small_model))
    # Nothing is read where nothing is named or nothing is compressed.
    assert load_tables(CompressionConfig(), "nowhere") is NO_TABLES
    assert load_tables(dataclasses.replace(coded, enabled=False), "nowhere") is NO_TABLES


def test_feedback_is_that_of_the_model(small_model):
    config = CompressionConfig(error_feedback=True)
    found = load_tables(config, str(small_model))
    want = load_model(small_model).key_feedback
    jax.tree.map(np.testing.assert_array_equal, found.feedback, jax.device_get(want))
    assert found.code is None and found.learned is None
    with pytest.raises(ConfigError, match="expected a model that this package reads"):
        load_tables(config, "nowhere")
