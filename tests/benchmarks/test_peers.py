"""The harness that times us beside our peers refuses what is wrong, and tells the truth."""

import json
import re

import numpy as np
import pytest

from benchmarks.peers.contract import NotAvailableError, Shape, Workload
from benchmarks.peers.harness import Timed, check, compare, round_trip_bound
from benchmarks.peers.ours import Ours
from benchmarks.peers.report import Report, Section, machine

SHAPE = Shape(layers=2, kv_heads=2, heads=4, head_dim=64, tokens=128, batch=2)
WORK = Workload.random(SHAPE)


class MinMax:
    """A plain min-max code per vector in NumPy, with ways to be wrong."""

    name = "plain"

    def __init__(self, bits, *, broken=None):
        self.bits, self.broken = bits, broken

    def load(self, work):
        if self.broken == "absent":
            raise NotAvailableError("no wheel for this machine")
        self.work = work

    def compress(self):
        if self.broken == "crash":
            raise RuntimeError("no such kernel")
        return [self._code(x) for x in (self.work.keys, self.work.values)]

    def _code(self, x):
        levels = 2 ** (self.bits - 1 if self.broken == "one bit less" else self.bits) - 1
        low, step = x.min(-1, keepdims=True), np.ptp(x, axis=-1)[..., None] / levels
        return np.rint((x - low) / step), step, low

    def decompress(self, code):
        keys, values = (codes * step + low for codes, step, low in code)
        return (values, keys) if self.broken == "swapped" else (keys, values)

    def attend(self, code):
        keys, values = self.decompress(code)
        if self.broken == "attention of other keys":
            keys = keys[..., ::-1, :]
        group = SHAPE.heads // SHAPE.kv_heads
        keys, values = (np.repeat(x, group, axis=2) for x in (keys, values))
        logits = np.einsum("lbhd,lbhtd->lbht", self.work.queries, keys) * SHAPE.head_dim**-0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("lbht,lbhtd->lbhd", weights, values)

    def opened(self, result):
        if self.broken == "nan":
            return result[0] * np.nan, result[1]
        return result

    def attended(self, result):
        return result

    def code_bytes(self, code):
        return sum(codes.size * self.bits // 8 + step.size * 8 for codes, step, low in code)


@pytest.mark.parametrize("bits", [4, 8])
def test_right_results_pass(bits):
    peer = MinMax(bits)
    peer.load(WORK)
    checked = check(peer, WORK)
    assert checked.error <= checked.bound
    assert checked.bits_stored == pytest.approx(bits + 64 / 64)


@pytest.mark.parametrize("bits", [4, 8])
def test_ours_pass(bits):
    ours = Ours(bits)
    ours.load(WORK)
    checked = check(ours, WORK)
    assert checked.error <= checked.bound
    # 4 or 8 bits, 32 of the scales per channel and page or per token, order and tables.
    assert bits + 0.5 < checked.bits_stored < bits + 0.6


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("one bit less", "wrong result: round trip is off by .*, 4 bits allow"),
        ("swapped", "wrong result: round trip is off by"),
        ("nan", "wrong result: round trip is off by nan"),
        ("attention of other keys", "wrong result: attention is off by"),
        ("crash", "failed: RuntimeError: no such kernel"),
        ("absent", "not available: no wheel for this machine"),
    ],
)
def test_wrong_contenders_are_refused_and_not_timed(broken, reason):
    timed, refused = compare([MinMax(4), MinMax(4, broken=broken)], WORK, repeats=2)
    assert [len(t.seconds["attend"]) for t in timed] == [2]
    assert len(refused) == 1
    assert re.match(reason, refused[0].reason), refused[0].reason


def test_bound_follows_the_bits():
    assert round_trip_bound(WORK, 4) == pytest.approx(round_trip_bound(WORK, 8) * 255 / 15)


def test_numbers_are_exact_in_bfloat16():
    for x in (WORK.keys, WORK.values, WORK.queries):
        assert not (x.view(np.uint32) & 0xFFFF).any()


def test_ratio_is_taken_round_by_round():
    checked = check(_loaded(MinMax(4)), WORK)
    one, two = (
        Timed(name, 4, checked, {"compress": s})
        for name, s in (("a", [1.0, 10.0, 2.0]), ("b", [2.0, 30.0, 4.0]))
    )
    assert two.ratio("compress", one) == (2.0, 2.0, 3.0)
    assert two.milliseconds("compress", 2.0) == pytest.approx(2000.0)


def test_report_has_everything():
    timed, refused = compare([Ours(4), MinMax(4, broken="crash")], WORK, repeats=2)
    report = Report(
        machine=machine(3),
        command="python benchmarks/peers.py --bits 4",
        repeats=2,
        sections=[Section(shape=SHAPE, timed=timed, refused=refused)],
        scaling=[Section(shape=SHAPE, timed=timed, refused=[])],
    )
    text = report.markdown()
    for part in ("kvcompress_jax", "failed: RuntimeError", "3 threads", "Again: python", "jax "):
        assert part in text
    stored = json.loads(report.json())
    assert len(stored["sections"][0]["timed"][0]["seconds"]["compress"]) == 2


@pytest.mark.parametrize("change", [{"tokens": 100}, {"heads": 3}, {"layers": 0}])
def test_shape_errors(change):
    sizes = {"kv_heads": 2, "heads": 4} | change
    with pytest.raises(ValueError, match="shape: expected sizes of at least 1"):
        Shape(**sizes)


def _loaded(contender):
    contender.load(WORK)
    return contender
