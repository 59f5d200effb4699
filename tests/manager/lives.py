"""Random lives of a manager against a plain Python model of what every sequence must find.

The value of a token depends on all tokens before it and on the steps that they were fed in, as keys
and values do. A page that comes from another prompt, from another tenant, or from the same tokens
fed in other steps is seen.
"""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import KVCacheManager, OutOfPagesError
from kvcompress_jax.manager.page import NONE
from kvcompress_jax.paged import PoolSizes
from tests.manager.fake_device import FakeDevice, fake_cache

SIZE, WINDOW = 16, 16
SIZES = PoolSizes(raw_pages=16, sealed_pages=16, fine_chunks=16, sink_slots=8)
MAX_SEQUENCES = 8
SHARES = {"a": 0.375}  # of each pool a whole number
CONFIGS = {
    "shared": CompressionConfig(
        page_size=SIZE,
        window_tokens=WINDOW,
        sink_tokens=2,
        host_bytes=300,
        floor_layers=(0,),
        prefix_cache_bytes=8000,
    ),
    "aged": CompressionConfig(
        page_size=SIZE,
        window_tokens=WINDOW,
        sink_tokens=2,
        host_bytes=10_000,
        demote_after_tokens=40,
        prefix_cache_bytes=3000,
    ),
}
# Prompts that begin alike and go apart at different places.
_RNG = np.random.default_rng(5)
_COMMON = _RNG.integers(1, 99, 64).tolist()
PROMPTS = [_COMMON[:n] + _RNG.integers(1, 99, 96 - n).tolist() for n in (0, 20, 32, 48, 64, 64)]
STEPS = (16, 32)


def values_of(tokens, ends):
    """Values 1 to 240 of tokens that were fed in steps which end at `ends`."""
    out, state, begins = [], 7, {0, *ends}
    for i, token in enumerate(tokens):
        state = (state * 31 + token + (100 if i in begins else 0)) % 65_521
        out.append(1 + state % 240)
    return out


class Sequence:
    """What a sequence must find."""

    def __init__(self, tenant, prompt=None, step=None, length=0):
        self.tenant, self.prompt, self.step = tenant, prompt, step
        self.ends = list(range(step, length + 1, step)) if length else []
        self.tokens = list(prompt[:length]) if length else []
        self.bad = set()  # pages with a value that is not finite
        self.evicted = set()
        self.alone = True  # no other sequence gave attention to its raw pages

    def copy(self):
        self.alone = False
        twin = Sequence(self.tenant)
        twin.alone = False
        twin.tokens, twin.ends = list(self.tokens), list(self.ends)
        twin.bad, twin.evicted = set(self.bad), set(self.evicted)
        return twin

    @property
    def feeding(self):
        """Whether its prompt goes on, in steps as at the beginning."""
        return self.prompt is not None and len(self.tokens) + self.step <= len(self.prompt)

    def masses(self):
        """Attention that each token received: one from each token of later steps."""
        ends = np.array([*self.ends, len(self.tokens)])
        written = ends[np.searchsorted(ends, np.arange(len(self.tokens)), side="right")]
        return len(self.tokens) - written


class ManagerMachine(RuleBasedStateMachine):
    """Every rule is something that a serving loop does."""

    def __init__(self):
        super().__init__()
        self.known: dict[int, Sequence] = {}
        self.preempted: set[int] = set()
        self.operations = 0
        self.votes: dict[int, set[int]] = {}  # owners that asked for level 2, by page
        self.before: dict[int, set[int]] = {}  # owners of pages at level 1, by page
        self.busy: set[str] = set()  # tenants that wanted fine chunks

    @initialize(name=st.sampled_from(sorted(CONFIGS)))
    def start(self, name):
        self.begin_with(name)

    def begin_with(self, name):
        """A manager with a configuration of this name."""
        config = CONFIGS[name]
        layout = config.layout(layers=2, kv_heads=1, head_dim=2, dtype="float32")
        self.manager = KVCacheManager(
            layout,
            SIZES,
            config,
            max_sequences=MAX_SEQUENCES,
            tenant_shares=SHARES,
            device=FakeDevice(),
        )
        self.cache = fake_cache(layout, SIZES)
        for name in ("take_code", "take_fine"):
            setattr(self.manager.store, name, self.watched(getattr(self.manager.store, name)))

    def watched(self, take):
        def call(page, *args, **options):
            self.busy.add(page.tenant)
            return take(page, *args, **options)

        return call

    # What is chosen from

    def resident(self):
        return sorted(set(self.known) - self.preempted)

    def pick(self, data, among):
        return data.draw(st.sampled_from(sorted(among)))

    def write(self, sequence, slots, start, *, bad=False):
        """What a model does in a step: keys for the new tokens, attention to the old ones."""
        known = self.known[sequence]
        values = np.array(values_of(known.tokens, known.ends)[start:], np.float32)
        if bad:
            values[len(values) // 2] = np.nan
            known.bad.add((start + len(values) // 2) // SIZE)
        table = self.manager.table([sequence])
        for i in range(int(table.raw_count[0])):
            first = int(table.raw_index[0, i]) * SIZE
            self.cache.mass[:, table.raw[0, i], :, : max(0, start - first)] += len(values)
        page, offset = slots // SIZE, slots % SIZE
        self.cache.raw[:, page, :, :, offset] = 0
        self.cache.raw[:, page, 0, 0, offset, 0] = values
        self.cache.mass[:, page, :, offset] = 0
        self.cache.seen[:, page, offset] = 0

    def no_room_is_true(self, error, need):
        """A tenant with a share is only refused what is over its share."""
        pool = self.manager.raw
        if error.tenant in SHARES:
            assert pool.used_by(error.tenant) + need > pool.most(error.tenant)

    # Rules

    @rule(tenant=st.sampled_from(["a", "b", ""]))
    def add(self, tenant):
        rows = self.manager.rows
        full = rows.room(tenant) == 0
        if full:
            with pytest.raises(OutOfPagesError, match="sequences"):
                self.manager.add(tenant)
            return
        sequence = self.manager.add(tenant)
        assert sequence not in self.known
        self.known[sequence] = Sequence(tenant)

    @rule(
        tenant=st.sampled_from(["a", "b"]),
        prompt=st.integers(0, len(PROMPTS) - 1),
        step=st.sampled_from(STEPS),
        steps=st.integers(0, 6),
        twice=st.booleans(),
    )
    def serve(self, tenant, prompt, step, steps, twice):
        found = [self.begin(tenant, prompt, step) for _ in range(1 + twice)]
        for sequence in found:
            if sequence is not None and steps:
                self.feed_steps(sequence, steps)

    def begin(self, tenant, prompt, step):
        prompt = PROMPTS[prompt]
        free = self.manager.rows.free, self.manager.raw.free
        try:
            sequence, self.cache = self.manager.add_prompt(
                self.cache, prompt, step_tokens=step, tenant=tenant
            )
        except OutOfPagesError:
            assert free == (self.manager.rows.free, self.manager.raw.free)
            return None
        length = self.manager.length(sequence)
        assert length % step == 0 and length < len(prompt)
        self.known[sequence] = Sequence(tenant, prompt, step, length)
        masses = {}
        for page in self.manager.sequences[sequence].pages:
            if page.sealed != NONE:
                # Sealed after the step in which it left the window.
                end = -(-((page.index + 1) * SIZE + WINDOW) // step) * step
                first = page.index * SIZE
                shorter = Sequence(tenant, prompt, step, end)
                masses[page.sealed] = shorter.masses()[first : first + SIZE]
        for sealed, mass in masses.items():
            assert np.array_equal(self.cache.order[0, sealed, 0], mass.astype(np.uint8))
        return sequence

    @precondition(lambda self: any(self.known[s].feeding for s in self.resident()))
    @rule(data=st.data(), steps=st.integers(1, 3))
    def feed(self, data, steps):
        self.feed_steps(
            self.pick(data, [s for s in self.resident() if self.known[s].feeding]), steps
        )

    def feed_steps(self, sequence, steps):
        known = self.known[sequence]
        for _ in range(steps):
            self.cache = self.manager.advance(self.cache)
            if not known.feeding:
                return
            if known.tokens:
                self.manager.remember(sequence, known.tokens, self.cache)
            start = len(known.tokens)
            need = -(-(start + known.step) // SIZE) + -start // SIZE
            try:
                slots = self.manager.append_slots(sequence, known.step)
            except OutOfPagesError as error:
                self.no_room_is_true(error, need)
                return
            known.tokens += known.prompt[start : start + known.step]
            known.ends.append(start + known.step)
            self.write(sequence, slots, start)
        self.cache = self.manager.advance(self.cache)
        self.manager.remember(sequence, known.tokens, self.cache)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), n=st.integers(1, 50), bad=st.integers(0, 19))
    def grow(self, data, n, bad):
        sequence = self.pick(data, self.resident())
        self.cache = self.manager.advance(self.cache)
        known, free = self.known[sequence], self.manager.raw.free
        start = len(known.tokens)
        try:
            slots = self.manager.append_slots(sequence, n)
        except OutOfPagesError as error:
            assert self.manager.raw.free == free
            self.no_room_is_true(error, -(-(start + n) // SIZE) + -start // SIZE)
            return
        self.tell(known, n, bad)
        self.write(sequence, slots, start, bad=bad == 0)

    def tell(self, known, n, bad):
        known.prompt = None
        known.tokens += [(7 * len(known.tokens) + bad + i) % 99 for i in range(n)]
        known.ends.append(len(known.tokens))

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), steps=st.integers(1, 20), token=st.integers(1, 99), ahead=st.booleans())
    def decode(self, data, steps, token, ahead):
        batch = data.draw(st.lists(st.sampled_from(self.resident()), min_size=1, unique=True))
        for _ in range(steps):
            self.cache = self.manager.advance(self.cache)
            lengths = [len(self.known[s].tokens) for s in batch]
            chunk = (batch[-1], 5) if token % 3 == 0 and len(batch) > 1 else None
            ones = batch[:-1] if chunk else batch
            free = self.manager.raw.free
            try:
                position, slots, more = self.manager.append_step(ones, chunk)
            except OutOfPagesError:
                assert self.manager.raw.free == free
                assert lengths == [self.manager.length(s) for s in batch]
                return
            assert position.tolist() == lengths[: len(ones)]
            for sequence, slot in zip(ones, slots, strict=True):
                self.tell(self.known[sequence], 1, token)
                self.write(sequence, np.array([slot]), len(self.known[sequence].tokens) - 1)
            if chunk:
                self.tell(self.known[chunk[0]], 5, token)
                self.write(chunk[0], more, len(self.known[chunk[0]].tokens) - 5)
            if ahead:
                self.cache = self.manager.look_ahead(self.cache)

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
            self.cache, _ = self.manager.device.apply(self.cache, plan)
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
        self.known[child] = self.known[sequence].copy()
        self.cache = self.manager.advance(self.cache)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), more=st.booleans())
    def free(self, data, more):
        self.end(self.pick(data, self.known))
        if more and self.known:
            self.end(self.pick(data, self.known))

    def end(self, sequence):
        self.manager.free(sequence)
        del self.known[sequence]
        self.preempted.discard(sequence)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), pages=st.sets(st.integers(0, 4)))
    def demote(self, data, pages):
        sequence = self.pick(data, self.resident())
        for page in self.manager.sequences[sequence].pages:
            if page.index in pages:
                self.votes.setdefault(page.uid, set()).add(sequence)
        self.manager.demote_pages(sequence, pages)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), pages=st.sets(st.integers(0, 4)))
    def promote(self, data, pages):
        self.manager.promote_pages(self.pick(data, self.resident()), pages)

    @rule(seed=st.integers(0, 99))
    def report_heat(self, seed):
        heat = np.random.default_rng(seed).exponential(size=SIZES.sealed_pages)
        self.manager.report_heat(heat.astype(np.float32))

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), back=st.booleans())
    def preempt(self, data, back):
        sequence = self.pick(data, self.resident())
        self.cache = self.manager.advance(self.cache)
        self.manager.preempt(sequence, self.cache)
        self.known[sequence].prompt = None
        self.preempted.add(sequence)
        if back:
            self.bring_back(sequence)

    @precondition(lambda self: self.preempted)
    @rule(data=st.data())
    def resume(self, data):
        self.bring_back(self.pick(data, self.preempted))

    def bring_back(self, sequence):
        try:
            self.cache = self.manager.resume(sequence, self.cache)
        except OutOfPagesError:
            return
        self.preempted.discard(sequence)

    @precondition(lambda self: self.resident())
    @rule(data=st.data(), index=st.integers(0, 4))
    def evict(self, data, index):
        sequence = self.pick(data, self.resident())
        known = self.known[sequence]
        if (index + 1) * SIZE > len(known.tokens) or index in known.evicted:
            with pytest.raises(ValueError, match="indices: expected full pages"):
                self.manager.evict(sequence, [index])
            return
        self.cache = self.manager.advance(self.cache)
        self.manager.evict(sequence, [index])
        known.prompt = None
        known.evicted.add(index)

    # What must hold after each of them

    @invariant()
    def nothing_leaks(self):
        if not hasattr(self, "manager"):
            return
        self.operations += 1
        self.manager.verify(self.cache)
        stats = self.manager.get_compression_stats()
        assert stats["sequences"] + stats["preempted_sequences"] == len(self.known)
        if not self.known:
            assert self.manager.raw.used == 0
            held = {p.uid for f in self.manager.prefixes.prefixes.values() for p in f.pages}
            assert held == set(self.manager.pages)

    @invariant()
    def nobody_demotes_for_others(self):
        """A page goes to level 2 when all its owners asked for it, when it is old, or when its own
        tenant seals pages or wants others at level 1: then, and for nobody else."""
        if not hasattr(self, "manager"):
            return
        pages = self.manager.pages
        aged = self.manager.config.demote_after_tokens is not None
        for uid, owners in self.before.items():
            page = pages.get(uid)
            if page is None or page.level != 2 or aged or page.tenant in self.busy:
                continue
            assert self.votes.get(uid, set()) >= (owners & page.owners)
        self.busy.clear()
        self.before = {
            p.uid: set(p.owners) for p in pages.values() if p.level == 1 and not p.pending
        }

    @invariant()
    def sequences_find_what_they_were_fed(self):
        for sequence in self.resident():
            known = self.known[sequence]
            table = self.manager.table([sequence])
            assert table.length[0] == len(known.tokens)
            values = np.array(values_of(known.tokens, known.ends), np.float32)
            masses = known.masses()
            found = set()
            for i in range(int(table.raw_count[0])):
                index, page = int(table.raw_index[0, i]), int(table.raw[0, i])
                want = values[index * SIZE :][:SIZE]
                got = self.cache.raw[:, page, 0, 0, : len(want), 0]
                finite = np.isfinite(got)
                assert np.all(got[finite] == np.broadcast_to(want, got.shape)[finite])
                assert finite.all() or index in known.bad
                mass = self.cache.mass[:, page, 0, : len(want)]
                assert not known.alone or np.all(mass == masses[index * SIZE :][:SIZE])
                found.add(index)
            for i in range(int(table.sealed_count[0])):
                index, page = int(table.sealed_index[0, i]), int(table.sealed[0, i])
                self.check_sealed(index, page, values[index * SIZE :][:SIZE], int(table.sink[0]))
                assert index not in known.bad
                found.add(index)
            every = set(range(-(-len(known.tokens) // SIZE)))
            assert found == every - known.evicted

    def check_sealed(self, index, page, want, sink):
        cache, layout = self.cache, self.manager.layout
        for layer in range(layout.layers):
            assert np.array_equal(cache.base[layer, page].reshape(-1)[:SIZE], want)
            chunk = int(cache.fine_of[layer, page])
            assert chunk >= 0 or layer not in self.manager.store.floors
            if chunk >= 0:
                fine = cache.fine[chunk].reshape(-1)[: layout.fine_rows]
                assert np.array_equal(fine, (want[: layout.fine_rows] + layer).astype(np.uint8))
            if index == 0 and sink != NONE:
                assert np.array_equal(cache.sinks[layer, sink, 0, 0, :, 0], want[:2])
