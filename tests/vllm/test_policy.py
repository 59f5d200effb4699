"""The eviction policy in vLLM's slot for one; no engine."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from vllm.v1.kv_offload.base import ReqContext
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory


def policy(*attention):
    """With a page for each; `i` is its key."""
    new = CachePolicyFactory.get_cache_policy_cls(
        "ImportancePolicy", "kvcompress_jax.interop.vllm.offload.policy"
    )(cache_capacity=len(attention))
    for i, heat in enumerate(attention):
        chunk = ChunkStatus(i)
        chunk.ref_cnt = 0
        new.insert(bytes([i]), chunk)
        new.weigh(bytes([i]), heat)
    return new


def evicted(policy, n, protected=()):
    return [key[0] for key, _ in policy.evict(n, {bytes([i]) for i in protected})]


def test_the_least_important_goes_first():
    assert evicted(policy(3.0, 1.0, 2.0), 2) == [1, 2]
    assert evicted(policy(3.0, 1.0, 2.0), 2, protected=[1]) == [2, 0]


def test_what_is_pinned_stays_and_nothing_changes():
    pages = policy(3.0, 1.0)
    pages.get(bytes([1])).ref_cnt = 1
    assert pages.evict(2, set()) is None and pages.get(bytes([0])) is not None
    assert evicted(pages, 1) == [0]


def test_a_page_is_not_worth_less_than_those_behind_it():
    pages = policy(0.1, 5.0, 1.0)
    keys = [bytes([i]) for i in (0, 1, 2)]
    pages.on_request_finished([keys], set(keys), set(), ReqContext(req_id="a"))
    assert evicted(pages, 3) == [2, 1, 0]


def test_what_was_important_once_goes_in_the_end():
    pages = policy(50.0, *([1.0] * 4))
    gone = []
    for i in range(5, 60):
        gone += evicted(pages, 1)
        chunk = ChunkStatus(i)
        chunk.ref_cnt = 0
        pages.insert(bytes([i]), chunk)
        pages.weigh(bytes([i]), 1.0)
    assert 0 in gone and gone.index(0) > 5


def test_empty_again():
    pages = policy(1.0, 2.0)
    pages.clear()
    assert pages.get(bytes([0])) is None and pages.evict(1, set()) is None
