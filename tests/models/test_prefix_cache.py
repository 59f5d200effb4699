"""A prompt that begins like an earlier one is fed from where they differ, with the same answer."""

import jax
import numpy as np
import pytest

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import OutOfPagesError
from kvcompress_jax.models.engine import Engine
from kvcompress_jax.models.runner import Runner
from kvcompress_jax.paged import PoolSizes
from tests.models.tiny import CONFIGS, random_tokens, tiny_model

pytestmark = pytest.mark.slow

MODEL = tiny_model(CONFIGS["llama"])
FIRST = random_tokens(MODEL.config, 150, seed=1)
SECOND = FIRST[:100] + random_tokens(MODEL.config, 40, seed=2)
STEP = 32
SIZES = PoolSizes(raw_pages=16, sealed_pages=24, fine_chunks=72, sink_slots=6)
# Steps of other shapes compute other last bits of keys, of which some get another code: where two
# tokens are as good, a random model may say the other one. Any other lies behind by standard
# deviations, which is what `behind` tells.
NEAR = 0.05


def engine(*, prefix_cache_bytes=10**7, sizes=SIZES, shares=None, window=16):
    config = CompressionConfig(
        page_size=16, window_tokens=window, prefix_cache_bytes=prefix_cache_bytes
    )
    runner = Runner(
        MODEL,
        config,
        sizes,
        max_sequences=3,
        kv_dtype="float32",
        chunk_tokens=STEP,
        tenant_shares=shares or {},
    )
    return Engine(runner)


def answer(engine, prompt, tenant="", tokens=8):
    request = engine.submit(prompt, max_new_tokens=tokens, tenant=tenant)
    engine.run()
    engine.runner.manager.verify(engine.runner.cache)
    return request.generated


def behind(engine, prompt, tokens):
    """How far each token's logit is below the best, where the sequence is fed token by token, in
    standard deviations of that step's logits."""
    runner = engine.runner
    sequence = runner.begin(prompt)
    logits = runner.extend(sequence, prompt)
    found = []
    for token in tokens:
        row = np.asarray(logits[0])
        found.append((row.max() - row[token]) / row.std())
        runner.advance()
        logits, _ = runner.forward([(sequence, token)])
    runner.manager.free(sequence)
    return max(found)


def assert_answers_of(engine, requests):
    for request in requests:
        assert behind(engine, request.prompt, request.generated) < NEAR
        assert behind(engine, request.prompt, request.generated[::-1]) > 1


def stats(engine):
    return engine.runner.manager.get_compression_stats()


def state_after(engine, prompt):
    """Everything that the last token of a prompt attends to, in order of its position, and its
    logits."""
    runner = engine.runner
    sequence = runner.begin(prompt)
    hit = runner.manager.length(sequence)
    for start in range(hit, len(prompt), STEP):
        runner.advance()
        if start:
            runner.manager.remember(sequence, prompt[:start], runner.cache)
        _, logits = runner.forward(prefilling=(sequence, prompt[start : start + STEP]))
    runner.advance()
    host = jax.tree.map(np.asarray, runner.cache)
    found = []
    for page in runner.manager.sequences[sequence].pages:
        if page.sealed < 0:
            filled = len(prompt) - page.index * 16
            found.append(host.raw[:, page.raw, :, :, :filled])
            found += [host.mass[:, page.raw, :, :filled], host.seen[:, page.raw, :filled]]
            continue
        pools = (host.base, host.order, host.key_scale.step, host.key_scale.zero)
        pools += (host.value_scale.step, host.value_scale.zero)
        found += [pool[:, page.sealed] for pool in pools]
        found.append(host.fine[np.array(page.chunks)])
    runner.manager.free(sequence)
    return hit, found, np.asarray(logits)


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("window", [16, 0, 40])
def test_a_hit_leaves_every_bit_as_it_would_be(window):
    _, want, want_logits = state_after(engine(prefix_cache_bytes=None, window=window), SECOND)
    cached = engine(window=window)
    assert state_after(cached, FIRST)[0] == 0
    hit, got, logits = state_after(cached, SECOND)
    assert hit == 96  # three steps; the fourth holds tokens that differ
    assert same(want, got)
    assert np.array_equal(want_logits, logits)
    # The judge sees another beginning.
    other = [(FIRST[0] + 1) % 97, *SECOND[1:]]
    hit, got, logits = state_after(cached, other)
    assert hit == 0
    assert not same(want, got) and not np.array_equal(want_logits, logits)


def test_answers_are_the_same_with_hits():
    plain, cached = engine(prefix_cache_bytes=None), engine()
    prompts = [FIRST, SECOND, FIRST, SECOND[:60], SECOND + FIRST[:30]]
    want = [answer(plain, p) for p in prompts]
    assert [answer(cached, p) for p in prompts] == want
    found = stats(cached)
    assert found["prefix_hits"] == 4
    assert found["prefix_hit_tokens"] == 96 + 128 + 32 + 128
    assert found["pages_retained"] > 0 == stats(plain)["pages_retained"]
    assert stats(plain)["prefix_hits"] == 0


def test_requests_that_run_together_share_pages():
    cached = engine()
    requests = [cached.submit(p, max_new_tokens=8) for p in (FIRST, FIRST, SECOND)]
    cached.run()
    assert stats(cached)["pages_merged"] > 0
    plain = engine(prefix_cache_bytes=None)
    assert_answers_of(plain, requests)


def test_tenants_find_only_their_own():
    cached = engine()
    want = answer(cached, FIRST, tenant="a")
    assert answer(cached, FIRST, tenant="b") == want
    assert stats(cached)["prefix_hits"] == 0
    answer(cached, FIRST, tenant="b")
    assert stats(cached)["prefix_hits"] == 1


def test_another_configuration_is_another_prefix():
    keys = set()
    for window in (0, 16):
        cached = engine(window=window)
        answer(cached, FIRST)
        keys |= set(cached.runner.manager.prefixes.prefixes)
        assert len(cached.runner.manager.prefixes.prefixes) == 4
    assert len(keys) == 8


def test_retained_pages_make_room_for_requests():
    tight = PoolSizes(raw_pages=16, sealed_pages=12, fine_chunks=36, sink_slots=6)
    cached, plain = engine(sizes=tight), engine(prefix_cache_bytes=None, sizes=tight)
    prompts = [random_tokens(MODEL.config, 140, seed=s) for s in range(4)]
    for prompt in prompts:
        assert answer(cached, prompt) == answer(plain, prompt)
    assert stats(cached)["prefix_evictions"] > 0 == stats(cached)["preemptions"]


def test_a_tenant_with_a_share_keeps_what_it_has():
    roomy = PoolSizes(raw_pages=24, sealed_pages=24, fine_chunks=72, sink_slots=6)
    cached = engine(sizes=roomy, shares={"a": 0.5})
    answer(cached, FIRST, tenant="a")
    for seed in range(4):
        answer(cached, random_tokens(MODEL.config, 140, seed=seed), tenant="b")
    answer(cached, SECOND, tenant="a")
    found = stats(cached)
    assert found["prefix_hits"] == 1 and found["prefix_evictions"] > 0
    # Too much for its own share is refused, however empty the rest of the pools is.
    long = cached.submit(FIRST * 3, max_new_tokens=1, tenant="a")
    beside = cached.submit(SECOND, max_new_tokens=4, tenant="b")
    with pytest.raises(OutOfPagesError, match=r"not fit into the cache: .* for tenant 'a'"):
        cached.run()
    cached.run()
    assert long.finish_reason == "out_of_pages" and beside.finish_reason == "length"
    cached.runner.manager.verify(cached.runner.cache)


def test_a_preempted_request_gives_its_pages_back():
    tight = PoolSizes(raw_pages=8, sealed_pages=16, fine_chunks=48, sink_slots=6)
    cached, plain = engine(sizes=tight), engine(prefix_cache_bytes=None)
    requests = [cached.submit(p, max_new_tokens=16) for p in (FIRST, SECOND, FIRST[20:])]
    cached.run()
    cached.runner.manager.verify(cached.runner.cache)
    assert stats(cached)["preemptions"] > 0
    # A preempted request is fed its own tokens in steps of another shape.
    assert_answers_of(plain, requests)


def test_wrong_calls():
    cached = engine()
    sequence = cached.runner.begin(FIRST)
    with pytest.raises(ValueError, match="tokens: expected 0, got 3"):
        cached.runner.manager.remember(sequence, [1, 2, 3], cached.runner.cache)
    held = cached.hold_prefix(FIRST[:20], tenant="a")
    with pytest.raises(ValueError, match="prefix: expected one of tenant 'b'"):
        cached.submit(FIRST, max_new_tokens=1, prefix=held, tenant="b")
