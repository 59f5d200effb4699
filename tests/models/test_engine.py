"""Continuous batching: who runs beside, what is preempted and what is shared changes no answer."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import OutOfPagesError
from kvcompress_jax.models.dense import dense_forward
from kvcompress_jax.models.engine import Engine
from kvcompress_jax.models.runner import Runner
from kvcompress_jax.paged import PoolSizes
from tests.models.tiny import CONFIGS, random_tokens, tiny_model

MODEL = tiny_model(CONFIGS["llama"])
PROMPTS = [random_tokens(MODEL.config, n, seed=n) for n in (5, 40, 18, 33, 64)]
OFF = CompressionConfig(enabled=False, page_size=16)
ON = CompressionConfig(page_size=16, window_tokens=16)


def engine_of(config, sizes, *, max_sequences=3, chunk_tokens=16):
    return Engine(
        Runner(
            MODEL,
            config,
            sizes,
            max_sequences=max_sequences,
            kv_dtype="float32",
            chunk_tokens=chunk_tokens,
        )
    )


ROOMY = PoolSizes(raw_pages=64, sealed_pages=0, fine_chunks=0, sink_slots=0)


def greedy(prompt, count):
    """Token by token, each from a dense pass over everything before it."""
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.array([tokens + [0] * (96 - len(tokens))], jnp.int32)
        out = dense_forward(MODEL.params, MODEL.config, padded)
        tokens.append(int(jnp.argmax(out[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def answers(engine, prompts, **options):
    requests = [engine.submit(p, max_new_tokens=12, **options) for p in prompts]
    engine.run()
    engine.runner.manager.verify(engine.runner.cache)
    assert engine.runner.manager.raw.used == 0
    return [r.generated for r in requests]


def test_greedy_answers_are_the_dense_ones():
    got = answers(engine_of(OFF, ROOMY), PROMPTS)
    assert got == [greedy(p, 12) for p in PROMPTS]
    assert got[0] != got[1]


def test_looking_ahead_changes_no_answer():
    """Seals are begun while the device computes, or when they are due: the codes are the same."""
    sizes = PoolSizes(raw_pages=40, sealed_pages=24, fine_chunks=72, sink_slots=4)
    found, begun = [], []
    for ahead in (True, False):
        engine, in_advance = engine_of(ON, sizes), []
        runner = engine.runner
        if not ahead:
            runner.look_ahead = lambda: None
        apply, advance = runner.manager.device.apply, runner.advance

        def spy(cache, plan, *, apply=apply, inside=in_advance, engine=engine):
            inside.append(engine.advancing)
            return apply(cache, plan)

        def watched(*, advance=advance, engine=engine):
            engine.advancing = True
            advance()
            engine.advancing = False

        engine.advancing, runner.advance, runner.manager.device.apply = False, watched, spy
        found.append(answers(engine, PROMPTS))
        begun.append(in_advance)
        found[-1].append(runner.manager.counters.seals)
    assert found[0] == found[1] and found[0][-1] > 4
    assert not any(begun[0]) and all(begun[1])


@pytest.mark.parametrize("config", [OFF, ON], ids=["off", "on"])
def test_preemption_changes_no_answer(config):
    """In a cache that is too small for all, requests move to host memory and back."""
    sealed = 12 if config.compresses else 0
    roomy = PoolSizes(
        raw_pages=40, sealed_pages=2 * sealed, fine_chunks=6 * sealed, sink_slots=sealed // 3
    )
    small = PoolSizes(
        raw_pages=5 if sealed else 7,
        sealed_pages=sealed,
        fine_chunks=3 * sealed,
        sink_slots=sealed // 3,
    )
    calm, tight = (engine_of(config, sizes) for sizes in (roomy, small))
    want = answers(calm, PROMPTS)
    assert calm.runner.manager.counters.preemptions == 0
    assert answers(tight, PROMPTS) == want
    counters = tight.runner.manager.counters
    assert counters.preemptions == counters.resumes > 0


def test_requests_share_a_prefix():
    engine = engine_of(OFF, ROOMY)
    manager = engine.runner.manager
    prefix = engine.hold_prefix(PROMPTS[1])
    held = manager.raw.used
    requests = [engine.submit(p[:4], max_new_tokens=5, prefix=prefix) for p in PROMPTS]
    engine.step()
    assert manager.raw.used <= held + 2 * 2  # an own page each for the two that fit beside it
    engine.run()
    for request, prompt in zip(requests, PROMPTS, strict=True):
        assert request.generated == greedy(PROMPTS[1] + prompt[:4], 5)
    manager.free(prefix)
    manager.verify(engine.runner.cache)
    assert manager.raw.used == 0


def test_sampling_does_not_depend_on_the_batch():
    alone = [answers(engine_of(OFF, ROOMY), [p], temperature=1.0, seed=7)[0] for p in PROMPTS[:3]]
    together = answers(engine_of(OFF, ROOMY), PROMPTS[:3], temperature=1.0, seed=7)
    assert alone == together
    other = answers(engine_of(OFF, ROOMY), PROMPTS[:3], temperature=1.0, seed=8)
    assert other != together


def test_sampling_follows_the_distribution():
    from kvcompress_jax.models.sampling import sample

    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    n = 4000
    draw = lambda t: np.bincount(  # noqa: E731
        sample(
            jnp.broadcast_to(logits, (n, 4)),
            np.full(n, t, np.float32),
            np.arange(n, dtype=np.uint32),
            np.zeros(n, np.int32),
        ),
        minlength=4,
    )
    share = draw(1.0) / n
    sigma = np.sqrt(0.25 / n)
    assert np.all(np.abs(share - np.exp(logits)) < 5 * sigma)
    assert np.any(np.abs(draw(0.5) / n - np.exp(logits)) > 5 * sigma)
    assert draw(0.0)[0] == n


def test_a_request_that_can_never_fit_fails_and_the_others_go_on():
    engine = engine_of(OFF, PoolSizes(raw_pages=4, sealed_pages=0, fine_chunks=0, sink_slots=0))
    small = engine.submit(PROMPTS[0], max_new_tokens=3)
    huge = engine.submit(PROMPTS[4] + PROMPTS[3], max_new_tokens=3)
    with pytest.raises(OutOfPagesError, match="request 1 does not fit into the cache: raw pages"):
        engine.run()
    assert huge.finish_reason == "out_of_pages"
    engine.run()
    assert small.generated == greedy(PROMPTS[0], 3)
    assert engine.runner.manager.raw.used == 0


def test_cancel():
    engine = engine_of(OFF, ROOMY)
    requests = [engine.submit(p, max_new_tokens=12) for p in PROMPTS]
    for _ in range(4):
        engine.step()
    for request in (requests[0], requests[-1]):
        engine.cancel(request)
    engine.run()
    assert [r.finish_reason for r in requests] == ["cancelled", *["length"] * 3, "cancelled"]
    assert requests[1].generated == greedy(PROMPTS[1], 12)
    assert engine.runner.manager.raw.used == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt: expected at least one token, got none"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected at least 0, got -1.0"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        engine_of(OFF, ROOMY).submit(**({"prompt": [1], "max_new_tokens": 1} | change))
