"""The device fails in the middle of steps: who is to blame is told so, everybody else goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.models.engine import Engine
from kvcompress_jax.models.runner import Runner
from kvcompress_jax.paged import PoolSizes
from tests.models.tiny import CONFIGS, random_tokens, tiny_model

MODEL = tiny_model(CONFIGS["llama"])
PROMPTS = [random_tokens(MODEL.config, n, seed=n) for n in (5, 40, 18, 33)]
GROWING = (1, 3, 0, 2)  # the two that start together in a crowd and do not fit when they grow
OFF = CompressionConfig(enabled=False, page_size=16)
ON = CompressionConfig(page_size=16, window_tokens=16)
ROOMY = PoolSizes(raw_pages=12, sealed_pages=0, fine_chunks=0, sink_slots=0)  # for three requests
SEALED = PoolSizes(raw_pages=12, sealed_pages=12, fine_chunks=36, sink_slots=4)


def _fire(x):
    raise RuntimeError("the device is on fire")


@jax.jit
def _burn(x):
    return jax.pure_callback(_fire, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


_burn_in_place = jax.jit(lambda cache: jax.tree.map(_burn, cache), donate_argnums=0)


class Fails(Runner):
    """A real error of a compiled program, in the steps that `when` names by their number and
    sequences; with the cache, which is donated to it, or without."""

    def __init__(self, config, sizes):
        super().__init__(MODEL, config, sizes, max_sequences=3, kv_dtype="float32", chunk_tokens=16)
        self.steps = 0
        self.when = lambda step, sequences: False
        self.takes_cache = True

    def forward(self, decoding=(), prefilling=None, **options):
        sequences = {s for s, _ in decoding} | ({prefilling[0]} if prefilling else set())
        self.steps += 1
        if self.when(self.steps, sequences):
            self.manager.append_slots(min(sequences), 1)  # it was in the middle of it
            if self.takes_cache:
                self.cache = _burn_in_place(self.cache)
            _burn(jnp.zeros(3)).block_until_ready()
        return super().forward(decoding, prefilling, **options)


def engine_of(config=OFF, sizes=ROOMY):
    return Engine(Fails(config, sizes))


def crowded():
    """An engine without room for three; others hold the pages."""
    engine = engine_of()
    manager = engine.runner.manager
    engine.hostage = manager.add()
    manager.append_slots(engine.hostage, 6 * 16)
    return engine


def run(engine, prompts=PROMPTS, new_tokens=10):
    requests = [engine.submit(p, max_new_tokens=new_tokens) for p in prompts]
    engine.run()
    if getattr(engine, "hostage", None) in engine.runner.manager.sequences:
        engine.runner.manager.free(engine.hostage)
    nothing_leaks(engine)
    return requests


def nothing_leaks(engine):
    manager = engine.runner.manager
    manager.verify(engine.runner.cache)
    pools = (manager.raw, manager.sealed, manager.chunks, manager.sinks, manager.rows)
    assert [pool.used for pool in pools] == [0] * 5
    assert not manager.sequences and not manager.pages and engine.idle


@pytest.fixture(scope="module")
def answers():
    """What is generated when nothing fails."""
    return [r.generated for r in run(engine_of())]


@pytest.mark.parametrize("takes_cache", [True, False])
@pytest.mark.parametrize("at", [{1}, {4, 12}])
def test_an_error_that_goes_away_ends_nobody(answers, at, takes_cache):
    engine = engine_of()
    engine.runner.takes_cache = takes_cache
    engine.runner.when = lambda step, _: step in at
    requests = run(engine)
    assert [r.generated for r in requests] == answers
    assert {r.finish_reason for r in requests} == {"length"} and engine.failed_steps == len(at)
    assert engine.recomputed_requests > 0
    assert engine.runner.manager.next_sequence_id >= len(PROMPTS)


@pytest.mark.parametrize("takes_cache", [True, False])
def test_the_request_that_fails_is_told_and_the_others_go_on(answers, takes_cache):
    """It fails while it decodes, whenever it is in a step, and nobody knows that but the test."""
    engine = engine_of()
    engine.runner.takes_cache = takes_cache
    requests = [engine.submit(p, max_new_tokens=10) for p in PROMPTS]
    poison = requests[2]
    engine.runner.when = lambda _, s: poison.sequence in s and len(poison.generated) == 4
    engine.run()
    nothing_leaks(engine)
    assert poison.finish_reason == "error" and poison.generated == answers[2][:4]
    assert poison.error.startswith("request 2: the device failed: ") and "\n" not in poison.error
    assert len(poison.error) > len("request 2: the device failed: ") + 10
    for i in (0, 1, 3):
        assert (requests[i].finish_reason, requests[i].error) == ("length", None)
        assert requests[i].generated == answers[i]
    assert engine.finished == {"length": 3, "error": 1} and engine.failed_steps == 2


def test_a_device_that_is_gone_ends_everybody():
    engine = engine_of()
    engine.runner.when = lambda *_: True
    requests = run(engine)
    assert [r.finish_reason for r in requests] == ["error"] * 4
    assert [r.error.split(":")[0] for r in requests] == [f"request {i}" for i in range(4)]


def test_with_compression():
    """Pages at all levels: nothing of it leaks or is mixed up."""
    engine = engine_of(ON, SEALED)
    engine.runner.when = lambda step, _: step == 9
    requests = run(engine, PROMPTS[2:], new_tokens=6)
    assert {r.finish_reason for r in requests} == {"length"} and engine.failed_steps == 1
    assert engine.runner.manager.counters.seals > 0


def test_requests_in_host_memory_start_over_with_a_lost_cache(answers):
    engine = crowded()
    engine.runner.when = lambda *_: bool(engine.preempted) and engine.failed_steps == 0
    requests = run(engine, [PROMPTS[i] for i in GROWING])
    wanted = [answers[i] for i in GROWING]
    assert [r.generated for r in requests] == wanted and engine.failed_steps == 1


def test_an_error_while_pages_move_costs_the_cache(answers):
    """What the host decided is not what is on the device then."""
    engine = engine_of()
    runner, advance = engine.runner, engine.runner.advance
    first = runner.manager

    def fail_once():
        advance()
        if len(engine.running) == 3 and engine.failed_steps == 0:
            _burn(jnp.zeros(3)).block_until_ready()

    runner.advance = fail_once
    requests = run(engine)
    assert [r.generated for r in requests] == answers
    assert engine.failed_steps == 1 and runner.manager is not first


def test_held_prefixes_are_read_again(answers):
    engine = engine_of()
    prefix = engine.hold_prefix(PROMPTS[1][:30])
    other = engine.runner.manager.add()  # of somebody whom the engine does not know
    engine.runner.extend(other, PROMPTS[0])
    engine.runner.when = lambda step, _: step == 8
    ours = engine.submit(PROMPTS[1][30:], max_new_tokens=10, prefix=prefix)
    theirs = engine.submit(PROMPTS[0], max_new_tokens=10, prefix=other)
    engine.run()
    assert engine.failed_steps == 1
    assert ours.generated == answers[1]
    assert theirs.finish_reason == "error"
    assert theirs.error == f"request 1: prefix: sequence: expected a live one, got {other}"
    engine.release_prefix(prefix)
    nothing_leaks(engine)
    with pytest.raises(ValueError, match="prefix: expected one of hold_prefix, got 0"):
        engine.release_prefix(prefix)


def test_a_prefix_that_cannot_be_read(answers):
    engine = engine_of()
    request = engine.submit(PROMPTS[0], max_new_tokens=10)
    for _ in range(3):
        engine.step()
    engine.runner.when = lambda *_: True
    with pytest.raises(jax.errors.JaxRuntimeError, match="on fire"):
        engine.hold_prefix(PROMPTS[1])
    engine.runner.when = lambda *_: False
    engine.run()
    assert request.generated == answers[0]
    nothing_leaks(engine)


class NotFinite(Fails):
    """The logits of one sequence are NaN."""

    poisoned = -1

    def forward(self, decoding=(), prefilling=None, **options):
        decoded, fed = super().forward(decoding, prefilling, **options)
        for row, (sequence, _) in enumerate(decoding):
            if sequence == self.poisoned:
                decoded = decoded.at[row, 3].set(jnp.nan)
        return decoded, fed


def test_logits_that_are_not_finite_end_their_request_alone(answers):
    engine = Engine(NotFinite(OFF, ROOMY))
    engine.runner.poisoned = 1
    requests = run(engine)
    assert [r.finish_reason for r in requests] == ["length", "error", "length", "length"]
    assert requests[1].error == "request 1: its logits are not finite"
    assert [r.generated for r in requests[2:]] == answers[2:]
    assert requests[1].generated == answers[1][:1]


def test_no_host_memory_to_preempt(answers):
    engine = crowded()
    manager = engine.runner.manager

    def no_memory(*_):
        raise MemoryError("no room for 123 bytes")

    manager.preempt = no_memory
    requests = run(engine, [PROMPTS[i] for i in GROWING])
    failed = [r for r in requests if r.finish_reason == "error"]
    assert failed and all("no host memory to preempt it: no room" in r.error for r in failed)
    for request, i in zip(requests, GROWING, strict=True):
        assert request in failed or request.generated == answers[i]
    assert len(failed) < 4


def test_cancelled_in_every_state():
    engine = crowded()
    requests = [engine.submit(p, max_new_tokens=10) for p in PROMPTS]
    seen = set()
    for _ in range(60):
        for request in list(requests):
            state = (
                "waiting"
                if request in engine.waiting
                else "preempted"
                if request in engine.preempted
                else "decoding"
                if request.decoding
                else "prefilling"
                if request.fed
                else "admitted"
            )
            if state not in seen and request.finish_reason is None:
                seen.add(state)
                engine.cancel(request)
                assert request.finish_reason == "cancelled" and request not in engine.running
                requests.append(engine.submit(request.prompt, max_new_tokens=10))
                break
        engine.step()
    assert seen >= {"waiting", "preempted", "decoding", "prefilling"}
    engine.run()
    engine.runner.manager.free(engine.hostage)
    nothing_leaks(engine)
    assert np.all([r.finish_reason in ("cancelled", "length") for r in requests])
