"""Random lives of a cache against a plain Python model of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import KVCacheManager, OutOfPagesError
from kvcompress_jax.manager.page import NONE
from kvcompress_jax.paged import PoolSizes, append, apply_plan, init_cache
from tests.paged.batch import poison, reference_page

CONFIG = CompressionConfig(
    page_size=16, window_tokens=16, sink_tokens=2, host_bytes=20_000, floor_layers=(0,)
)
LAYOUT = CONFIG.layout(layers=2, kv_heads=1, head_dim=8, dtype="float32")
SIZES = PoolSizes(raw_pages=12, sealed_pages=9, fine_chunks=8, sink_slots=3)
MAX_SEQUENCES = 4

_append = jax.jit(append, donate_argnums=0)
_apply = jax.jit(apply_plan, donate_argnums=0)


class CacheMachine(RuleBasedStateMachine):
    """`tokens[s]` is what sequence s must hold: [layers, 2, n, dim]; None for evicted tokens."""

    def __init__(self):
        super().__init__()
        self.manager = KVCacheManager(LAYOUT, SIZES, CONFIG, max_sequences=MAX_SEQUENCES)
        self.cache = poison(init_cache(LAYOUT, SIZES))
        self.tokens: dict[int, np.ndarray] = {}
        self.evicted: dict[int, set[int]] = {}
        self.preempted: set[int] = set()
        self.rng = np.random.default_rng(0)
        self.ages = 0

    def resident(self):
        return sorted(set(self.tokens) - self.preempted)

    def pick(self, data, among):
        return data.draw(st.sampled_from(sorted(among)))

    @rule()
    def add(self):
        if len(self.resident()) == MAX_SEQUENCES:
            with pytest.raises(OutOfPagesError, match="sequences"):
                self.manager.add()
            return
        sequence = self.manager.add()
        assert sequence not in self.tokens
        self.tokens[sequence] = np.zeros((2, 2, 0, 8), np.float32)
        self.evicted[sequence] = set()

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), n=st.integers(1, 50), bad=st.integers(0, 19))
    def grow(self, data, n, bad):
        sequence = self.pick(data, self.resident())
        self.cache = self.manager.advance(self.cache)
        free = self.manager.raw.free
        try:
            slots = self.manager.append_slots(sequence, n)
        except OutOfPagesError:
            assert self.manager.raw.free == free
            assert self.manager.length(sequence) == self.tokens[sequence].shape[2]
            return
        new = self.rng.normal(size=(2, 2, n, 8)).astype(np.float32)
        if bad == 0:
            new[1, 0, n // 2, 3] = np.nan
        for layer in range(2):
            k, v = (jnp.asarray(x)[:, None] for x in new[layer])
            self.cache = _append(self.cache, layer, *_padded(k, v), _padded_slots(slots))
        self.tokens[sequence] = np.concatenate([self.tokens[sequence], new], axis=2)

    @rule()
    def advance(self):
        self.cache = self.manager.advance(self.cache)

    @rule()
    def look_ahead(self):
        self.manager.commit(self.cache)  # without which a plan of the rule below is refused
        self.cache = self.manager.look_ahead(self.cache)

    @rule(confirm=st.booleans())
    def plan_and_commit_later(self, confirm):
        self.manager.commit(self.cache)
        plan = self.manager.plan(self.cache)
        if plan is not None:
            self.cache = _apply(self.cache, plan)
        if confirm:
            self.manager.commit(self.cache)

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def fork(self, data):
        sequence = self.pick(data, self.resident())
        try:
            child = self.manager.fork(sequence)
        except OutOfPagesError:
            return
        self.tokens[child] = self.tokens[sequence]
        self.evicted[child] = set(self.evicted[sequence])
        self.cache = self.manager.advance(self.cache)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        sequence = self.pick(data, self.tokens)
        self.manager.free(sequence)
        del self.tokens[sequence], self.evicted[sequence]
        self.preempted.discard(sequence)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), pages=st.sets(st.integers(0, 4)))
    def demote(self, data, pages):
        self.manager.demote_pages(self.pick(data, self.resident()), pages)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), pages=st.sets(st.integers(0, 4)))
    def promote(self, data, pages):
        self.manager.promote_pages(self.pick(data, self.resident()), pages)

    @rule(heat=st.lists(st.floats(0, 10), min_size=9, max_size=9))
    def report_heat(self, heat):
        self.manager.report_heat(np.array(heat, np.float32))

    @precondition(lambda self: self.resident())
    @rule(data=st.data())
    def preempt(self, data):
        sequence = self.pick(data, self.resident())
        self.cache = self.manager.advance(self.cache)
        self.manager.preempt(sequence, self.cache)
        self.preempted.add(sequence)

    @precondition(lambda self: self.preempted)
    @rule(data=st.data())
    def resume(self, data):
        sequence = self.pick(data, self.preempted)
        try:
            self.cache = self.manager.resume(sequence, self.cache)
        except OutOfPagesError:
            return
        self.preempted.discard(sequence)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), index=st.integers(0, 4))
    def evict(self, data, index):
        sequence = self.pick(data, self.resident())
        there = (index + 1) * 16 <= self.tokens[sequence].shape[2]
        if not there or index in self.evicted[sequence]:
            with pytest.raises(ValueError, match="indices: expected full pages"):
                self.manager.evict(sequence, [index])
            return
        self.cache = self.manager.advance(self.cache)
        self.manager.evict(sequence, [index])
        self.evicted[sequence].add(index)

    @invariant()
    def nothing_leaks(self):
        self.manager.verify(self.cache)
        stats = self.manager.get_compression_stats()
        assert stats["sequences"] + stats["preempted_sequences"] == len(self.tokens)
        if not self.tokens:
            assert stats["allocated_bytes"] == 0 == self.manager.raw.used
            assert self.manager.host.used_bytes == 0

    @invariant()
    def contents_are_within_the_bound_of_their_level(self):
        host = jax.tree.map(np.asarray, self.cache)
        for sequence in self.resident():
            tokens = self.tokens[sequence]
            if tokens.shape[2] == 0:
                continue
            table = self.manager.table([sequence])
            assert table.length[0] == tokens.shape[2]
            found = set()
            for i in range(int(table.raw_count[0])):
                index, page = int(table.raw_index[0, i]), int(table.raw[0, i])
                want = tokens[:, :, index * 16 : index * 16 + 16]
                got = host.raw[:, page, :, 0, : want.shape[2]]
                assert np.array_equal(got, want, equal_nan=True)
                found.add(index)
            for i in range(int(table.sealed_count[0])):
                index, page = int(table.sealed_index[0, i]), int(table.sealed[0, i])
                self.check_sealed(host, tokens, index, page, int(table.sink[0]))
                found.add(index)
            every = set(range(-(-tokens.shape[2] // 16)))
            assert found == every - self.evicted[sequence]

    def check_sealed(self, host, tokens, index, page, sink):
        for layer in range(2):
            want = tokens[layer, :, index * 16 : index * 16 + 16]
            assert np.isfinite(want).all()
            got = np.stack([x[0] for x in reference_page(host, layer, page)])
            if index == 0 and sink != NONE:
                got[:, :2] = host.sinks[layer, sink, :, 0]
            refined = int(host.fine_of[layer, page]) >= 0
            assert refined or layer != 0  # a floor layer never goes below level 1
            order = host.order[layer, page, 0].astype(int)
            # Half a step; half of a cell where it is refined, and both where it was.
            off, cell = np.full(16, 0.5), 0.5 / 2**LAYOUT.fine_bits
            off[order[: LAYOUT.refined_slots]] = cell if refined else 0.5 + cell
            key_step = host.key_scale.step[layer, page, 0].astype(np.float64)[None, :]
            value_step = host.value_scale.step[layer, page, 0].astype(np.float64)
            for g, w, step in zip(
                got, want, (key_step, value_step[np.argsort(order)][:, None]), strict=True
            ):
                exact = np.zeros((16, 1), bool)
                exact[:2] = index == 0 and sink != NONE
                bound = np.where(exact, 0, step * (off[:, None] + 2.0**-12))
                assert np.all(np.abs(g - w) <= bound)


def _padded(*arrays):
    """To one width, so that one compiled append serves all."""
    return [jnp.pad(x, ((0, 50 - x.shape[0]), (0, 0), (0, 0))) for x in arrays]


def _padded_slots(slots):
    return np.pad(slots, (0, 50 - len(slots)), constant_values=-1)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def _fails(change):
    """Whether random lives show that a manager with this change is broken."""

    class Broken(CacheMachine):
        def __init__(self):
            super().__init__()
            change(self.manager)

    case = Broken.TestCase
    case.settings = settings(
        max_examples=2000,
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
    )
    try:
        case().runTest()
    except Exception:  # whatever a broken manager runs into
        return True
    return False


def _forget_to_free_raw(manager):
    manager.raw.give_back = lambda ids: None


def _skip_the_copy_of_a_fork(manager):
    fork = manager.fork

    def broken(sequence):
        child = fork(sequence)
        manager._lives.copies.clear()
        return child

    manager.fork = broken


def _share_the_last_page_of_a_fork(manager):
    def broken(sequence):
        parent = manager.sequences[sequence]
        child = manager.sequences[manager.add()]
        for page in parent.pages:
            manager.store.adopt(child, page)
        child.length = parent.length
        manager._tables.refresh(child)
        return child.id

    manager.fork = broken


def _lose_the_level_of_a_floor_layer(manager):
    manager.store.floors = frozenset()


def _keep_the_chunks_of_evicted_pages(manager):
    back = manager.chunks.give_back

    def broken(ids):
        back(list(ids)[1:])

    manager.chunks.give_back = broken


def _trust_the_seal(manager):
    apply = manager.device.apply

    def broken(cache, plan):
        cache, sealed = apply(cache, plan)
        return cache, None if sealed is None else jnp.ones_like(sealed)

    manager.device.apply = broken


@pytest.mark.parametrize(
    "change",
    [
        _forget_to_free_raw,
        _skip_the_copy_of_a_fork,
        _share_the_last_page_of_a_fork,
        _lose_the_level_of_a_floor_layer,
        _keep_the_chunks_of_evicted_pages,
        pytest.param(_trust_the_seal, marks=pytest.mark.first),
    ],
)
def test_the_oracle_sees_a_broken_manager(change):
    assert _fails(change)
