"""Checks on eight simulated devices, which need a process of their own:

    python -m tests.sharding.checks OUT.json

Every function of `CHECKS` runs once; OUT.json says what came of each: "" or the traceback.
"""

import dataclasses
import functools
import json
import re
import sys
import traceback
import warnings
from unittest import mock

import numpy as np
import pytest

from tests.models.tiny import CONFIGS, tiny_model

DEVICES = 8


@functools.cache
def life(shards, *, whole=True):
    """A life with a trained score, or its first part."""
    from tests.importance.test_learned import learned
    from tests.sharding import scene

    score = learned(layers=scene.LAYERS, heads=scene.HEADS, dim=scene.DIM)
    nbytes = sum(x.nbytes for x in scene.jax.tree.leaves(score))
    sizes = dataclasses.replace(scene.SIZES, learned_bytes=nbytes)
    begun = scene.Scene(scene.sharding_of(shards), sizes=sizes, learned=score)
    begun.attend("raw")
    begun.seal()
    if whole:
        begun.live()
    return begun


@functools.cache
def sealed(shards, what):
    """Pages of something else, sealed unseen."""
    from tests.sharding import scene

    options = {"spoiled_head": 5}
    if what == "calibrated":
        from tests.calibrated.synthetic import make_profile

        profile, _ = make_profile(layers=scene.LAYERS, heads=scene.HEADS, dim=scene.DIM)
        config = dataclasses.replace(scene.CONFIG, profile="a file", host_bytes=0)
        sizes = dataclasses.replace(scene.SIZES, fine_chunks=0)
        options = {"profile": profile, "config": config, "sizes": sizes}
    done = scene.Scene(scene.sharding_of(shards), **options)
    done.seal()
    return done


def all_pools_are_equal_to_the_bit():
    """The whole life, whatever the number of shards, statistics and attention included."""
    from tests.sharding.scene import different

    one, eight = life(1), life(8)
    counters = one.manager.counters
    assert counters.seals == 4 and counters.demotions == 3 and counters.promotions == 1
    assert set(one.shots) == {"raw", "sealed", "coded", "demoted", "lower", "promoted", "resumed"}
    assert different(one.shots, eight.shots) == []
    for shards in (2, 4):
        begun = life(shards, whole=False)
        assert set(begun.shots) == {"raw", "sealed"}
        assert different(one.shots, begun.shots) == []
        assert outputs(one)[:4] == outputs(begun)
    assert outputs(one) == outputs(eight)
    base = one.shots["sealed"][".base"]
    swapped = {"sealed": one.shots["sealed"] | {".base": np.roll(base, 4, axis=3)}}
    assert different(swapped, {"sealed": one.shots["sealed"]}) == ["sealed: .base"]


def outputs(scene):
    return [x.tobytes() for outs in scene.outs.values() for x in outs]


def calibrated_codes_are_split():
    from tests.sharding.scene import different

    one, four = sealed(1, "calibrated"), sealed(4, "calibrated")
    assert different(one.shots, four.shots) == []
    assert four.manager.counters.seals == 4


def attention_is_that_of_float64():
    from tests.paged.batch import reference_attention, reference_tokens
    from tests.sharding.scene import DIM, LAYERS

    scene = life(8)
    for stage in ("raw", "coded", "lower"):
        q, table, lengths, cache = scene.seen[stage]
        out, lse = scene.outs[stage, LAYERS - 1]
        for row, count in enumerate(lengths):
            position, _, keys, values = reference_tokens(cache, table, row, LAYERS - 1)
            first = int(table.length[row]) - count
            want, want_lse, _ = reference_attention(
                q[row, :count], position, keys, values, first, scale=DIM**-0.5
            )
            # Float32 sums of a hundred products of size ten at most; seen: 2e-6.
            assert np.abs(out[row, :count] - want).max() < 1e-4, (stage, row)
            assert np.abs(lse[row, :count] - want_lse).max() < 1e-4, (stage, row)
            swapped = np.roll(out[row, :count], 2, axis=1)  # every device had its neighbour's heads
            assert np.abs(swapped - want).max() > 1e-2


def what_all_devices_have_is_the_same_on_all():
    from kvcompress_jax.manager.device import apply_plan_in_place
    from tests.sharding.scene import torn

    for cache in (life(8).cache, sealed(2, "spoiled").cache):
        assert torn(cache) == []
    # The judge sees shards that decide each for itself.
    apply_plan_in_place.clear_cache()
    room = "kvcompress_jax.paged"
    own = {"on_all_heads": lambda split, flag: flag}
    with (
        mock.patch.multiple(sys.modules[f"{room}.seal"], **own),
        mock.patch.multiple(sys.modules[f"{room}.seal_kernels"], **own),
    ):
        assert {".sealed", ".rejected"} <= set(torn(sealed.__wrapped__(2, "spoiled").cache))
    apply_plan_in_place.clear_cache()


def nan_on_one_head_keeps_the_page_on_all_devices():
    import logging

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("kvcompress_jax.manager").addHandler(handler)
    scene = sealed(2, "spoiled")
    logging.getLogger("kvcompress_jax.manager").removeHandler(handler)
    assert scene.manager.counters.rejected == 1 and scene.manager.counters.seals == 3
    assert int(scene.cache.rejected) == 1
    assert "1 that are not in layer 1, head 5, page 1" in "".join(records), records
    assert scene.manager.get_compression_stats()["seals"] == 3


def bytes_are_exact_on_every_device():
    import jax

    for shards in (1, 8):
        scene = life(shards)
        stats = scene.manager.get_compression_stats()
        on = {}
        for x in jax.tree.leaves(scene.cache):
            for part in x.addressable_shards:
                on[part.device] = on.get(part.device, 0) + part.data.nbytes
        rejected = scene.cache.rejected.nbytes
        assert {n - rejected for n in on.values()} == {stats["device_pool_bytes"]}
        assert stats["devices"] == len(on) == shards
        assert stats["pool_bytes"] == sum(on.values()) - shards * rejected
        assert stats["allocated_bytes"] <= stats["pool_bytes"]
    # What is split is most of it: eight devices have little more than an eighth each.
    one, eight = (life(n).manager.get_compression_stats()["device_pool_bytes"] for n in (1, 8))
    assert one / 8 < eight < one / 6


def same_but_for_rounding(ours, theirs):
    """Of caches that two programs filled: on some processors, XLA adds up a projection in another
    order when it is split. A number may then be off by a few roundings, and one of a thousand bytes
    of codes differ; what has been counted is equal."""
    import jax

    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.uint8:
            if a.size and np.mean(a != b) > 1e-3:
                return False
        elif not np.issubdtype(a.dtype, np.floating):
            if a.tobytes() != b.tobytes():
                return False
        elif a.size and np.abs(a - b).max() > 2.0**-20 * max(1.0, np.abs(b).max()):
            return False
    return True


def engines_on_meshes_give_the_answers_of_one_device():
    import jax

    from tests.sharding.engines import replicated, served

    replicas, (request, *_), _ = replicated()
    eight, answer = served(8)
    assert answer == request.generated and len(answer) == 4
    ours, theirs = eight.runner.cache, replicas.engines[0].runner.cache
    assert same_but_for_rounding(ours, theirs)
    other = dataclasses.replace(theirs, base=theirs.base[:, ::-1])
    assert not same_but_for_rounding(ours, other)
    assert not same_but_for_rounding(ours, dataclasses.replace(theirs, raw=theirs.raw * 1.001))
    assert np.asarray(ours.base).any() and np.asarray(ours.heat).any()
    weights = eight.runner.model.params.layers.query
    assert weights.addressable_shards[0].data.shape == weights.shape

    split, same = served(8, split_weights=True)
    assert same == answer
    weights = split.runner.model.params.layers.down
    assert weights.addressable_shards[0].data.shape[-1] * 8 == weights.shape[-1]
    # Keys of fewer columns a device may be rounded otherwise, and no more than that.
    near, raw = np.asarray(split.runner.cache.raw), np.asarray(ours.raw)
    assert np.abs(near - raw).max() < 1e-4
    assert np.abs(near - np.roll(raw, 1, axis=3)).max() > 1  # the heads of a neighbour
    assert jax.device_count() == DEVICES


def replicas_share_the_work():
    from tests.sharding.engines import NEW, OTHER, replicated

    replicas, requests, placed = replicated()
    # The second prompt goes where less is to do; the third, long as it is, to its like.
    assert placed == [[True, False, True], [False, True, False]]
    assert requests[0].generated != requests[1].generated
    devices = {next(iter(e.runner.cache.raw.devices())) for e in replicas.engines}
    assert len(devices) == 2
    stats = replicas.get_compression_stats()
    parts = [e.runner.manager.get_compression_stats() for e in replicas.engines]
    assert stats["seals"] == sum(p["seals"] for p in parts) > 0
    assert stats["pool_bytes"] == 2 * parts[0]["pool_bytes"] and stats["devices"] == 2
    assert stats["device_pool_bytes"] == parts[0]["device_pool_bytes"]
    for part in parts:
        assert part["sequences"] == 0
    late = replicas.submit(OTHER, max_new_tokens=NEW)  # remembered by the second
    assert late in replicas.engines[1].waiting
    replicas.cancel(late)
    assert replicas.idle and late.finish_reason == "cancelled"


def what_cannot_be_split_is_refused():
    from tests.sharding.scene import CONFIG, SIZES, sharding_of

    layout = CONFIG.layout(layers=1, kv_heads=6, head_dim=32)
    expect(
        "mesh: expected kv_heads (6) to be a multiple of the 4 devices along 'heads'",
        lambda: sharding_of(4).init(layout, SIZES),
    )
    from kvcompress_jax.models.runner import make_runner
    from kvcompress_jax.paged.sharding import HeadSharding

    mesh = sharding_of(4).mesh
    expect("axis: expected one of ('heads',), got 'tp'", lambda: HeadSharding(mesh, axis="tp"))
    from kvcompress_jax.models.replicas import make_replicas

    options = {"tokens": 64, "max_sequences": 1}
    expect(
        "mesh: expected num_kv_heads (2) to be a multiple of the 4 devices along 'heads'",
        lambda: make_runner(
            tiny_model(CONFIGS["llama"]), CONFIG, sharding=sharding_of(4), **options
        ),
    )
    expect(
        "replicas: expected 3 replicas of 4 devices to be at least 1 and at most the 8",
        lambda: make_replicas(
            tiny_model(CONFIGS["llama"]), CONFIG, replicas=3, shards=4, **options
        ),
    )


def expect(text, call):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


CHECKS = {
    check.__name__: check
    for check in (
        all_pools_are_equal_to_the_bit,
        calibrated_codes_are_split,
        attention_is_that_of_float64,
        nan_on_one_head_keeps_the_page_on_all_devices,
        what_all_devices_have_is_the_same_on_all,
        bytes_are_exact_on_every_device,
        what_cannot_be_split_is_refused,
        engines_on_meshes_give_the_answers_of_one_device,
        replicas_share_the_work,
    )
}


def main(path):
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    warnings.simplefilter("error")
    assert jax.device_count() == DEVICES, jax.devices()
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    with open(path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
