"""Blocks to pages in host memory and back, without vLLM."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

from kvcompress_jax.interop.vllm.offload.options import OffloadOptions, read_options
from kvcompress_jax.interop.vllm.offload.pages import BlockPages
from kvcompress_jax.interop.vllm.offload.slots import Plane, Slots
from kvcompress_jax.interop.vllm.verify import verify
from tests.interop.vllm.test_layer import BOUNDS, CONFIGS, FLOORS, PAGE, Engine


@pytest.mark.parametrize("name", ["raw", "balanced", "compact"])
def test_what_comes_back_is_attended_to_as_what_left(name, tmp_path):
    one, other = Engine(CONFIGS[name]), Engine(CONFIGS[name])
    sequence = one.sequence()
    one.step([(sequence, 5 * PAGE + 3)])
    one.step([(sequence, 1)])
    pages, back = (BlockPages(e.states, e.executor) for e in (one, other))
    assert pages.planes == back.planes and pages.code == back.code
    slots = Slots.create(
        tmp_path / "slots", budget_bytes=1 << 20, planes=pages.planes, about="some"
    )
    blocks = sequence["blocks"][:5]
    for slot, block in enumerate(blocks):
        page = pages.take_out(block)
        assert slots.write(slot, page) == sum(x.nbytes for x in page.values())
    read = Slots.open(tmp_path / "slots")
    assert not (tmp_path / "slots").exists() and read.about == "some"
    copy = other.sequence() | {n: sequence[n][: 5 * PAGE] for n in "kv"}
    copy["blocks"] = [other.free.pop() for _ in blocks]
    for place, block in enumerate(copy["blocks"]):
        back.put_in(block, place, read.read(place))
        verify(other.states)
    # All of its pages are coded now, also those that were recent.
    bound = BOUNDS.get(name, 0.3)
    assert max(other.step([(copy, 1)]), other.step([(copy, 20)])) < bound
    assert other.states.counters.without_sink == 0
    # The judge can say no: the second page in the place of the first.
    wrong = other.sequence() | {n: sequence[n][: 5 * PAGE] for n in "kv"}
    wrong["blocks"] = [other.free.pop() for _ in blocks]
    for place, block in enumerate(wrong["blocks"]):
        back.put_in(block, place, read.read(max(place, 1)))
    assert other.step([(wrong, 1)]) > 2 * bound


def test_pages_with_floor_layers_come_back_layer_by_layer(tmp_path):
    one, other = Engine(FLOORS["compact"]), Engine(FLOORS["compact"])
    sequence = one.sequence()
    one.step([(sequence, 5 * PAGE + 3)])
    one.step([(sequence, 1)])
    pages, back = (BlockPages(e.states, e.executor) for e in (one, other))
    assert pages.code == back.code and pages.code.endswith("-floors-2")
    slots = Slots.create(tmp_path / "slots", budget_bytes=1 << 20, planes=pages.planes, about="")
    copy = other.sequence() | {n: sequence[n][: 5 * PAGE] for n in "kv"}
    copy["blocks"] = [other.free.pop() for _ in range(5)]
    for place, block in enumerate(copy["blocks"]):
        left = pages.take_out(sequence["blocks"][place])  # the last ones are raw until now
        assert len(left["base"]) == 2 and len(left["floor_fine"]) == 1 and "fine" not in left
        slots.write(place, left)
        back.put_in(block, place, slots.read(place))
        verify(other.states)
        again = back.take_out(block)
        assert all(np.array_equal(left[n], again[n]) for n in left)
    coarse, fine = other.step([(copy, 1)])
    assert fine < BOUNDS["safe"] < coarse
    # The judge can say no: the floor layer's planes of other pages.
    for place, block in enumerate(copy["blocks"][:5]):
        other.layers[1].put("fine", block, slots.read(4 - place)["floor_fine"][0])
    assert other.step([(copy, 1)])[1] > BOUNDS["safe"]


def test_a_page_at_level_1_has_fine_planes_of_both_kinds_of_layers():
    config = dataclasses.replace(FLOORS["balanced"], host_bytes=1 << 20)
    engine = Engine(config)
    sequence = engine.sequence()
    engine.step([(sequence, 3 * PAGE)])
    pages = BlockPages(engine.states, engine.executor)
    assert [p.name for p in pages.planes][6:] == ["fine", "floor_fine", "sinks", "heat"]
    page = pages.take_out(sequence["blocks"][0])
    assert len(page["fine"]) == len(page["floor_fine"]) == 1
    taken = engine.states.chunks.take(engine.states.chunks.free)
    pages.put_in(7, 0, page)  # there is no chunk for it, but in the floor layer
    assert engine.states.chunk_of[7] == -1 and 7 in engine.states.kept
    again = pages.take_out(7)
    assert all(np.array_equal(page[n], again[n]) for n in page)
    engine.states.chunks.give_back(taken)
    verify(engine.states)


def two_engines(config):
    return Engine(config), Engine(config)


def test_a_floor_layer_s_first_page_without_a_slot_is_coded_again_at_level_1():
    coarse, fine = error_without_a_slot(*two_engines(FLOORS["compact"]))
    assert fine < coarse / 4


def test_a_sealed_page_is_the_same_when_it_comes_back():
    engine = Engine(CONFIGS["balanced"])
    sequence = engine.sequence()
    engine.step([(sequence, 5 * PAGE)])
    pages = BlockPages(engine.states, engine.executor)
    before = pages.take_out(sequence["blocks"][0])
    assert {"fine", "sinks"} <= set(before)
    block = engine.free.pop()
    pages.put_in(block, 0, before)
    after = pages.take_out(block)
    assert all(np.array_equal(before[n], after[n]) for n in before)


def test_a_recent_page_leaves_as_it_would_be_sealed():
    engine = Engine(CONFIGS["balanced"])
    sequence = engine.sequence()
    engine.step([(sequence, 2 * PAGE)])
    block = sequence["blocks"][1]
    pages = BlockPages(engine.states, engine.executor)
    early = pages.take_out(block)
    raw = engine.states.raw_page(block)
    engine.step([(sequence, 2 * PAGE)])
    assert engine.states.sealed[block] and engine.states.raw_page(block) == raw
    during = pages.take_out(block)  # the step that seals it may not be over
    engine.step([(sequence, 1)])
    sealed = pages.take_out(block)
    assert engine.states.raw_page(block) == -1
    for name in set(sealed) - {"heat"}:
        assert np.array_equal(during[name], sealed[name]), name
    assert np.array_equal(early["key_step"], sealed["key_step"])


def error_without_a_slot(one, other):
    """Of attention to pages that came to an engine without a slot for the exact first tokens."""
    sequence = one.sequence()
    one.step([(sequence, 3 * PAGE)])
    pages, back = (BlockPages(e.states, e.executor) for e in (one, other))
    taken = other.states.sinks.take(other.states.sinks.free)
    copy = other.sequence() | {n: sequence[n][: 2 * PAGE] for n in "kv"}
    copy["blocks"] = [other.free.pop() for _ in range(2)]
    for place, block in enumerate(copy["blocks"]):
        back.put_in(block, place, pages.take_out(sequence["blocks"][place]))
    other.states.sinks.give_back(taken)
    assert back.without_sink == other.states.counters.without_sink == 1
    return other.step([(copy, 1)])


def test_a_first_page_without_a_slot_for_its_exact_tokens():
    """It is coded again, exact tokens among the others."""
    assert error_without_a_slot(*two_engines(CONFIGS["balanced"])) < 0.3


def test_without_a_chunk_the_fine_plane_stays_on_the_host():
    config = dataclasses.replace(CONFIGS["balanced"], host_bytes=1 << 20)
    one, other = Engine(config), Engine(config)
    sequence = one.sequence()
    one.step([(sequence, 3 * PAGE)])
    pages, back = (BlockPages(e.states, e.executor) for e in (one, other))
    taken = other.states.chunks.take(other.states.chunks.free)
    page = pages.take_out(sequence["blocks"][0])
    back.put_in(7, 0, page)
    assert other.states.chunk_of[7] == -1 and 7 in other.states.kept
    assert np.array_equal(back.take_out(7)["fine"], page["fine"])
    other.states.chunks.give_back(taken)
    verify(other.states)


def test_blocks_that_are_not_full_do_not_leave():
    engine = Engine(CONFIGS["balanced"])
    sequence = engine.sequence()
    engine.step([(sequence, PAGE + 3)])
    pages = BlockPages(engine.states, engine.executor)
    with pytest.raises(RuntimeError, match=f"block {sequence['blocks'][1]}: expected a full one"):
        pages.take_out(sequence["blocks"][1])


def test_slots_say_what_is_wrong(tmp_path):
    planes = [Plane(name="base", dtype="uint8", shape=(2, 3))]
    with pytest.raises(ValueError, match="host memory: expected at least 128 bytes, got 100"):
        Slots.create(tmp_path / "a", budget_bytes=100, planes=planes, about="")
    slots = Slots.create(tmp_path / "a", budget_bytes=300, planes=planes, about="")
    assert slots.count == 2
    with pytest.raises(FileExistsError):
        Slots.create(tmp_path / "a", budget_bytes=300, planes=planes, about="")
    slots.write(1, {"base": np.ones((2, 3), np.uint8)})
    with pytest.raises(ValueError, match=r"base: expected uint8\[2, 3\], got int8\[2, 3\]"):
        slots.write(1, {"base": np.ones((2, 3), np.int8)})
    assert slots.read(1) == {} and slots.read(0) == {}
    with pytest.raises(ValueError, match="expected planes \\['base'\\], got fine"):
        slots.write(0, {"fine": np.ones((2, 3), np.uint8)})
    with pytest.raises(ValueError, match="slot: expected 0 to 1, got 2"):
        slots.read(2)


def test_options():
    assert read_options({"spec_name": "x", "cpu_bytes_to_use": "5"}) == OffloadOptions(
        cpu_bytes_to_use=5
    )
    lru = read_options({"cpu_bytes_to_use": 5, "eviction_policy": "lru"})
    assert lru.cache_policy_module_path is None
    for wrong, message in (
        ({}, "cpu_bytes_to_use: expected bytes of host memory, got 0"),
        ({"cpu_bytes_to_use": "much"}, "cpu_bytes_to_use: expected bytes, got 'much'"),
        ({"cpu_bytes_to_use": 5, "disk_path": "x"}, "expected both or none, got x and 0"),
        ({"cpu_bytes_to_use": 5, "blocks_per_chunk": 2}, "got blocks_per_chunk"),
    ):
        with pytest.raises(ValueError, match=message):
            read_options(wrong)
