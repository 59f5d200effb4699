"""One layer and its blocks, driven as vLLM drives them, beside attention in float64."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from kvcompress_jax.config import CompressionConfig, ConfigError  # noqa: E402
from kvcompress_jax.interop.vllm.all_layers import AllLayers  # noqa: E402
from kvcompress_jax.interop.vllm.blocks import BlockStates  # noqa: E402
from kvcompress_jax.interop.vllm.carve import (  # noqa: E402
    carve,
    carve_layers,
    content_bytes,
    layer_layout,
)
from kvcompress_jax.interop.vllm.layer import LayerMemory  # noqa: E402
from kvcompress_jax.interop.vllm.stats import compression_stats, merge  # noqa: E402
from kvcompress_jax.interop.vllm.tables import NO_TABLES  # noqa: E402
from kvcompress_jax.interop.vllm.verify import verify  # noqa: E402

HEADS, GROUP, DIM, PAGE = 2, 2, 32, 16
SCALE = DIM**-0.5
SMALL = CompressionConfig(page_size=PAGE, window_tokens=PAGE)
CONFIGS = {
    "raw": dataclasses.replace(SMALL, levels=1),
    "safe": dataclasses.replace(SMALL, levels=2),
    "balanced": SMALL,
    "compact": dataclasses.replace(SMALL, seal_level=2),
    "no window": dataclasses.replace(SMALL, window_tokens=0),
    "some refined": dataclasses.replace(SMALL, ratio=0.25),
}
# Of two layers the second is a floor layer, and all of its tokens have 8 bits.
FLOORS = {
    name: dataclasses.replace(CONFIGS[name], floor_layers=(-1,), ratio=1.0)
    for name in ("balanced", "compact")
}
# Relative error of attention to normal noise. A 4-bit code of 16 normal values has steps of about
# 3.6 / 15 standard deviations, an error of 0.07; averaging over tokens leaves some of it. 8 bits:
# a sixteenth. Raw pages: float32.
BOUNDS = {"raw": 1e-5, "safe": 0.02}


class Engine:
    """vLLM's part: blocks, sequences, and steps over them. One layer, and a floor layer behind it
    where the configuration has one."""

    def __init__(
        self,
        config,
        *,
        blocks=48,
        raw_share=0.5,
        fine_share=0.75,
        tables=NO_TABLES,
        dtype="float32",
    ):
        layout = layer_layout(config, heads=HEADS, dim=DIM, dtype=dtype)
        carves = carve_layers(
            config, layout, blocks=blocks, raw_share=raw_share, fine_share=fine_share
        )
        self.executor = AllLayers()
        kinds = [c for c in (carves.common, carves.floor) if c is not None]
        for i, kind in enumerate(kinds):
            # What was never written must never be read: all bits set are NaN in every float type.
            memory = torch.full((kind.buffer_bytes,), 0xFF, dtype=torch.uint8)
            layer = LayerMemory(memory, kind, config, tables)
            self.executor.memories[f"layer {i}"] = layer
            for name in ("mass", "seen"):  # vLLM zeroes its memory; statistics are added to
                layer.pools[name].zero_()
        self.layers = list(self.executor.memories.values())
        self.layer, self.carve = self.layers[0], carves.common
        self.states = BlockStates(carves, config, layers=len(kinds), floors=len(kinds) - 1)
        self.free = list(range(blocks - 1, 0, -1))
        self.random = np.random.default_rng(0)

    def tokens(self, count):
        """Keys, values and queries of new tokens."""

        def normal(heads):
            return self.random.normal(size=(count, heads, DIM)).astype(np.float32)

        return normal(HEADS), normal(HEADS), normal(HEADS * GROUP)

    def sequence(self, prefix=None, pages=0):
        """A new one; with the first full pages of another."""
        new = {"blocks": [], "k": np.zeros((0, HEADS, DIM), np.float32)}
        new |= {"v": new["k"]}
        if prefix is not None:
            new["blocks"] = prefix["blocks"][:pages]
            new |= {n: prefix[n][: pages * PAGE] for n in "kv"}
        return new

    def finish(self, sequence, shared=()):
        self.free += [b for b in sequence["blocks"] if b not in shared]

    def step(self, batch):
        """One step of (sequence, new tokens) pairs; returns the largest relative error, where there
        is a floor layer that of either layer."""
        starts, lengths, parts = [0], [], []
        for sequence, count in batch:
            k, v, q = self.tokens(count)
            if not len(sequence["k"]):  # first tokens are unlike the others: they are kept exactly
                k[:4], v[:4] = 4 * k[:4], 4 * v[:4]
            sequence["k"] = np.concatenate([sequence["k"], k])
            sequence["v"] = np.concatenate([sequence["v"], v])
            length = len(sequence["k"])
            while len(sequence["blocks"]) * PAGE < length:
                sequence["blocks"] = [*sequence["blocks"], self.free.pop()]
            starts.append(starts[-1] + count)
            lengths.append(length)
            parts.append((k, v, q))
        tables = np.zeros((len(batch), max(len(s["blocks"]) for s, _ in batch)), np.int32)
        for r, (sequence, _) in enumerate(batch):
            tables[r, : len(sequence["blocks"])] = sequence["blocks"]
        k, v, q = (torch.from_numpy(np.concatenate(x)) for x in zip(*parts, strict=True))
        step = self.states.plan(np.array(starts), np.array(lengths), tables, self.executor)
        wanted = [dense(sequence, q) for (sequence, _), (_, _, q) in zip(batch, parts, strict=True)]
        worst = []
        for layer in self.layers:
            out = torch.full(q.shape, torch.nan)
            layer.forward(q, k, v, out, step, scale=SCALE, soft_cap=None)
            errors = []
            for r, expected in enumerate(wanted):
                got = out[starts[r] : starts[r + 1]].numpy()
                norm = np.linalg.norm(expected, axis=-1)
                errors.append((np.linalg.norm(got - expected, axis=-1) / norm).max())
            worst.append(max(errors))
        verify(self.states)
        return worst[0] if len(worst) == 1 else np.array(worst)


def dense(sequence, q):
    """Causal attention of the newest queries, in float64."""
    k, v = sequence["k"].astype(np.float64), sequence["v"].astype(np.float64)
    count = len(q)
    q = q.astype(np.float64).reshape(count, HEADS, GROUP, DIM)
    logits = np.einsum("qhgd,thd->qhgt", q, k) * SCALE
    position = np.arange(len(k) - count, len(k))
    logits[
        np.broadcast_to(np.arange(len(k)) > position[:, None, None, None], logits.shape)
    ] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("qhgt,thd->qhgd", weights, v).reshape(count, HEADS * GROUP, DIM)


def work(engine):
    """Chunked prompts, mixed batches, a shared prefix, an abort, blocks that are used again."""
    one, two = engine.sequence(), engine.sequence()
    errors = [engine.step([(one, 40), (two, 7)])]
    errors += [engine.step([(two, 1), (one, 30)])]
    errors += [engine.step([(one, 1), (two, 1)]) for _ in range(20)]
    pages = len(one["k"]) // PAGE
    third = engine.sequence(one, pages - 1)  # a hit in the prefix cache: sealed pages and raw ones
    errors += [engine.step([(one, 1), (third, 35)])]
    engine.finish(two)  # aborted
    fourth = engine.sequence()
    errors += [engine.step([(one, 1), (fourth, 40)])]
    errors += [engine.step([(third, 1), (fourth, 1)]) for _ in range(18)]
    engine.finish(third, one["blocks"])
    return one, fourth, max(errors)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_that_of_the_levels(name):
    engine = Engine(CONFIGS[name])
    one, fourth, error = work(engine)
    bound = BOUNDS.get(name, 0.3)
    assert error < bound
    stats = compression_stats(engine.states, damaged=engine.layer.damaged)
    if name == "raw":
        assert stats["seals"] == 0 and stats["blocks_level_0"] > 0
        return
    assert stats["seals"] >= 8 and stats["damaged"] == 0
    expected = {"compact": ("blocks_level_2", "blocks_level_1")}
    some, none = expected.get(name, ("blocks_level_1", "blocks_level_2"))
    assert stats[some] > 0 and stats[none] == 0
    # The judge can say no: another page's codes in the place of a sealed one's.
    first, second = np.flatnonzero(engine.states.sealed)[:2]
    engine.layer.pools["base"][int(first)] = ~engine.layer.pools["base"][int(second)]
    assert engine.step([(one, 1), (fourth, 1)]) > bound


def test_few_chunks_demote_and_a_hot_block_is_promoted_bit_for_bit():
    config = dataclasses.replace(SMALL, host_bytes=1 << 20, promote_heat=1e6)
    engine = Engine(config, fine_share=0.1)  # 4 chunks
    states = engine.states
    one = engine.sequence()
    for _ in range(6):
        engine.step([(one, 32)])
    assert states.counters.demotions > 0 and states.kept
    block = next(iter(states.kept))
    saved = states.kept[block][0].copy()
    assert states.counters.promotions == 0  # nothing is a million times hotter than the median
    states.heat[block] = 1e9
    engine.step([(one, 1)])
    assert states.counters.promotions == 1
    assert states.chunk_of[block] >= 0 and block not in states.kept
    got = engine.layer.pools["fine"][int(states.chunk_of[block])].numpy()
    np.testing.assert_array_equal(got, saved)


def test_a_floor_layer_has_8_bits_where_the_other_has_4():
    config = dataclasses.replace(FLOORS["balanced"], host_bytes=1 << 20)
    engine = Engine(config, fine_share=0.1)  # 4 chunks
    states, (plain, floor) = engine.states, engine.layers
    one = engine.sequence()
    coarse, fine = np.max([engine.step([(one, count)]) for count in (32, 32, 32, 32, 1)], axis=0)
    assert fine < BOUNDS["safe"] and coarse > 3 * BOUNDS["safe"]
    assert states.counters.demotions > 0
    stats = compression_stats(states, damaged=0)
    assert stats["floor_layers"] == 1 and stats["blocks_level_2"] >= 3
    # Every byte that is in use, layer by layer.
    layout, sealed = engine.carve.layout, int(states.sealed.sum())
    both = states.raw.used * layout.raw_page_bytes + sealed * layout.sealed_page_bytes
    both += states.sinks.used * layout.sink_slot_bytes
    chunks = states.chunks.used + sealed
    assert stats["allocated_bytes"] == 2 * both + chunks * layout.fine_chunk_bytes
    assert stats["pool_bytes"] == plain.carve.buffer_bytes + floor.carve.buffer_bytes
    # Planes on the host are of one layer.
    assert states.kept_bytes == len(states.kept) * layout.fine_chunk_bytes
    assert all(len(saved) == 1 for saved in states.kept.values())
    # The judge can say no: the fine plane of another block.
    first, second = (floor.pools["fine"][int(b)] for b in np.flatnonzero(states.sealed)[:2])
    first.copy_(~second)
    assert engine.step([(one, 1)])[1] > BOUNDS["safe"]


def test_a_floor_layer_orders_its_tokens_by_attention_where_no_other_need():
    engine = Engine(dataclasses.replace(FLOORS["compact"], ratio=0.5))
    one = engine.sequence()
    for _ in range(3):
        engine.step([(one, 2 * PAGE)])
    plain, floor = engine.layers
    raw = engine.states.raw_of[engine.states.raw_of >= 0]
    assert floor.tracks_attention and float(floor.pools["mass"][raw].sum()) > 0
    assert not plain.tracks_attention and float(plain.pools["mass"].sum()) == 0


def test_without_host_memory_nothing_is_kept_or_promoted():
    engine = Engine(SMALL, fine_share=0.1)
    one = engine.sequence()
    for _ in range(6):
        engine.step([(one, 32)])
    assert engine.states.counters.demotions > 0
    assert engine.states.counters.promotions == 0 and not engine.states.kept


def test_the_longest_unused_first_page_gives_its_slot_to_a_new_one():
    """Nobody tells that a sequence ended: its slot would else be lost until its block is reused."""
    engine = Engine(dataclasses.replace(CONFIGS["balanced"], host_bytes=1 << 20))
    states = engine.states
    assert states.sinks.capacity == 2
    one, two, three = (engine.sequence() for _ in range(3))
    for sequence in (one, two):
        engine.step([(sequence, 3 * PAGE)])
    first, second = (s["blocks"][0] for s in (one, two))
    kept = [np.zeros(1, np.uint8)]
    states.chunks.give_back([int(states.chunk_of[first])])
    states.chunk_of[first] = -1
    states._keep(first, kept)  # as if it had been demoted
    engine.step([(two, 1)])
    engine.step([(three, 3 * PAGE), (two, 1)])
    third = three["blocks"][0]
    assert [states.sink_of[b] >= 0 for b in (first, second, third)] == [False, True, True]
    assert states.counters.without_sink == 1
    assert first not in states.kept  # a fine plane of another code
    assert engine.step([(three, 1)]) < 0.3
    # Whoever had it goes on, with first tokens as coarse as others; four times as large here.
    assert engine.step([(one, 1)]) < 1
    # In use all of them: the newest has none.
    fourth = engine.sequence()
    engine.step([(two, 1), (three, 1), (fourth, 3 * PAGE)])
    assert states.sink_of[fourth["blocks"][0]] == -1 and states.counters.without_sink == 2


def test_too_few_raw_pages_seal_early_and_then_say_so():
    config = dataclasses.replace(SMALL, window_tokens=64)
    engine = Engine(config, raw_share=0.35)
    raw = engine.carve.sizes.raw_pages
    sequences = [engine.sequence() for _ in range(4)]
    for _ in range(8):
        for sequence in sequences:
            engine.step([(sequence, 16)])
    assert engine.states.counters.early_seals > 0
    with pytest.raises(RuntimeError, match=r"raw pages: expected \d+ free.*lower max_num_seqs"):
        engine.step([(engine.sequence(), 1) for _ in range(raw + 1)])


def test_verify_can_say_no():
    engine = Engine(SMALL)
    engine.step([(engine.sequence(), 60)])
    states = engine.states
    block = int(np.flatnonzero(states.sealed)[0])
    chunk = states.chunk_of[block]
    states.chunk_of[block] = -1
    with pytest.raises(AssertionError, match="fine chunks: expected 2 in use, got 1"):
        verify(states)
    states.chunk_of[block] = chunk
    verify(states)
    states.raw_of[block] = states.raw_of[states.raw_of >= 0][0]
    with pytest.raises(AssertionError, match="raw pages: expected each id once"):
        verify(states)


def test_a_block_that_is_gone_is_an_error_not_an_answer():
    engine = Engine(SMALL)
    one = engine.sequence()
    engine.step([(one, 20)])
    lost = engine.sequence(one, 1)
    lost["blocks"] = [40]
    with pytest.raises(RuntimeError, match="block 40: expected keys and values, got none"):
        engine.step([(lost, 5)])
    one["k"], one["v"] = one["k"][:18], one["v"][:18]
    with pytest.raises(RuntimeError, match="expected a raw page with 2 tokens, got 4"):
        engine.step([(one, 5)])


def test_rows_without_blocks_get_zeros():
    engine = Engine(SMALL)
    step = engine.states.plan(
        np.array([0, 3]), np.array([3]), np.zeros((1, 1), np.int32), engine.executor
    )
    out = torch.full((3, HEADS * GROUP, DIM), torch.nan)
    k, v, q = (torch.from_numpy(x) for x in engine.tokens(3))
    engine.layer.forward(q, k, v, out, step, scale=SCALE, soft_cap=None)
    assert float(out.abs().sum()) == 0


def test_a_value_that_is_not_finite_is_counted():
    engine = Engine(dataclasses.replace(SMALL, window_tokens=0))
    assert damaged_by_infinity(engine) == 1


def damaged_by_infinity(engine):
    """Pages that were counted as damaged, of a sequence of one page."""
    one = engine.sequence()
    engine.tokens = lambda count: tuple(  # type: ignore[method-assign]
        np.full((count, n, DIM), np.inf if n == HEADS else 1.0, np.float32)
        for n in (HEADS, HEADS, HEADS * GROUP)
    )
    with np.errstate(all="ignore"):
        engine.step([(one, 16)])
    return engine.layer.damaged


def end_of_regions(made):
    """Where the last one ends; they are aligned and do not overlap."""
    end = 0
    for region in made.regions:
        assert region.offset_bytes >= end and region.offset_bytes % 64 == 0
        end = region.offset_bytes + region.nbytes
    return end


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("heads", "dim", "page"), [(3, 64, 64), (1, 256, 16), (8, 128, 128)])
@pytest.mark.parametrize("name", ["balanced", "compact", "safe", "raw"])
def test_all_pools_are_inside_the_memory(name, heads, dim, page, dtype):
    config = dataclasses.replace(CONFIGS[name], page_size=page)
    layout = layer_layout(config, heads=heads, dim=dim, dtype=dtype)
    content = content_bytes(config, layout, raw_share=0.3, fine_share=0.75)
    made = carve(config, layout, blocks=101, content=content, fine_share=0.75)
    end = end_of_regions(made)
    assert end <= made.buffer_bytes == 101 * heads * page * content
    # And little of it is wasted: less than a raw page, and what alignment takes.
    assert made.buffer_bytes - end < layout.raw_page_bytes + 64 * 12
    assert made.buffer_bytes % 64 == 0


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("fine_share", [0.1, 0.75, 0.99])
@pytest.mark.parametrize("name", FLOORS)
def test_floor_layers_take_what_they_need_and_share_the_ids(name, fine_share, page):
    config = dataclasses.replace(FLOORS[name], page_size=page, ratio=0.5)
    layout = layer_layout(config, heads=3, dim=64, dtype="bfloat16")
    made = carve_layers(config, layout, blocks=101, raw_share=0.3, fine_share=fine_share)
    alone = dataclasses.replace(config, floor_layers=())
    without = carve_layers(alone, layout, blocks=101, raw_share=0.3, fine_share=fine_share)
    assert without.floor is None and without.common.buffer_bytes == made.common.buffer_bytes
    common, floor = made.common, made.floor
    assert floor.sizes == dataclasses.replace(common.sizes, fine_chunks=101)
    assert without.common.sizes.raw_pages - common.sizes.raw_pages <= 1
    needed = (101 - common.sizes.fine_chunks) * layout.fine_chunk_bytes
    # Rounded up to whole bytes per token and head, or to what keeps layers aligned.
    rounding = 101 * 3 * page * max(1, 64 // page)
    assert needed - layout.fine_chunk_bytes < floor.buffer_bytes - common.buffer_bytes
    assert floor.buffer_bytes - common.buffer_bytes <= needed + rounding
    for kind in (common, floor):
        assert end_of_regions(kind) <= kind.buffer_bytes and kind.buffer_bytes % 64 == 0


@pytest.mark.parametrize(
    ("config", "fine_share"),
    [
        (dataclasses.replace(SMALL, floor_layers=(0,)), 1.0),
        (dataclasses.replace(CONFIGS["raw"], floor_layers=(0,)), 0.75),
        (CONFIGS["compact"], 0.75),
    ],
    ids=["chunks for all", "no codes", "no floors"],
)
def test_layers_are_alike_where_floors_make_no_difference(config, fine_share):
    layout = layer_layout(config, heads=HEADS, dim=DIM, dtype="float32")
    made = carve_layers(config, layout, blocks=48, raw_share=0.5, fine_share=fine_share)
    assert made.floor is None


@pytest.mark.parametrize(("name", "least"), [("balanced", 2.3), ("compact", 3.3)])
def test_the_capacity_that_is_promised(name, least):
    config = dataclasses.replace(CONFIGS[name], page_size=64)
    layout = layer_layout(config, heads=3, dim=64, dtype="bfloat16")
    content = content_bytes(config, layout, raw_share=0.05, fine_share=0.75)
    assert 2 * 64 * 2 / content >= least


def test_too_little_memory_is_refused():
    layout = layer_layout(SMALL, heads=HEADS, dim=DIM, dtype="float32")
    content = content_bytes(SMALL, layout, raw_share=0.05, fine_share=0.75)
    with pytest.raises(ConfigError, match="KV cache memory: expected room for 2 raw pages"):
        carve(SMALL, layout, blocks=8, content=content, fine_share=0.75)


def test_merging_workers_adds_bytes():
    engine = Engine(SMALL)
    engine.step([(engine.sequence(), 60)])
    one = compression_stats(engine.states, damaged=0)
    two = merge([one, one])
    assert two["pool_bytes"] == 2 * one["pool_bytes"]
    assert two["avg_compression_ratio"] == pytest.approx(one["avg_compression_ratio"])
    assert two["seals"] == one["seals"]
    with pytest.raises(ValueError, match="workers: expected at least one"):
        merge([])
