"""The harness that times us beside our peers refuses what is wrong, and tells the truth."""

import dataclasses
import json
import re

import numpy as np
import pytest

from benchmarks.peers.contract import NotAvailableError, Shape, Workload
from benchmarks.peers.growth import exponent, growth
from benchmarks.peers.harness import (
    ENOUGH_SECONDS,
    FEWEST_ROUNDS,
    Timed,
    check,
    compare,
    round_trip_bound,
)
from benchmarks.peers.kivi_torch import Kivi
from benchmarks.peers.ours import Ours
from benchmarks.peers.report import Report, machine
from benchmarks.peers.run import Options, run
from benchmarks.peers.section import Section

SHAPE = Shape(layers=2, kv_heads=2, heads=4, head_dim=64, tokens=128, batch=2)
WORK = Workload.random(SHAPE)
TINY = Options(
    bits=(4,),
    layers=1,
    tokens=128,
    repeats=1,
    threads=1,
    scaling=False,
    json=None,
    markdown=None,
    command="",
)


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
        shape = self.work.shape
        group = shape.heads // shape.kv_heads
        keys, values = (np.repeat(x, group, axis=2) for x in (keys, values))
        logits = np.einsum("lbhd,lbhtd->lbht", self.work.queries, keys) * shape.head_dim**-0.5
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


@pytest.mark.parametrize("bits", [4, 8])
def test_kivi_in_torch_passes(bits):
    pytest.importorskip("torch", reason="a peer, no dependency")
    kivi = Kivi(bits)
    kivi.load(WORK)
    checked = check(kivi, WORK)
    assert checked.error <= checked.bound
    assert checked.bits_stored == pytest.approx(bits + 32 / 64)


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
        for name, s in (("a", [1.0, 10.0, 2.0, 5.0]), ("b", [2.0, 30.0, 4.0]))
    )
    assert two.ratio("compress", one) == (2.0, 2.0, 2.5)
    assert two.milliseconds("compress", 2.0) == pytest.approx(2000.0)
    assert two.spread("compress", 2.0) == pytest.approx((1500.0, 8500.0))


def test_slow_contenders_have_few_rounds(monkeypatch):
    clock = iter(np.arange(10_000.0))  # a second passes between two looks
    monkeypatch.setattr("benchmarks.peers.harness.time.perf_counter", lambda: next(clock))
    timed, _ = compare([MinMax(4)], WORK, repeats=9)
    enough = -(-ENOUGH_SECONDS // 3)  # three operations a round
    assert timed[0].rounds == max(FEWEST_ROUNDS, enough + 1) < 9


def test_growth_finds_the_exponent():
    assert exponent([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    sections = []
    for tokens in (128, 256, 512):
        times = {o: [2e-3 * tokens**1.5] for o in ("compress", "decompress", "attend")}
        shape = Shape(layers=2, kv_heads=2, heads=4, tokens=tokens)
        timed = Timed("a", 4, check(_loaded(MinMax(4)), WORK), times)
        sections.append(Section(shape=shape, timed=[timed], refused=[]))
    (_, _, rows), (_, columns, fitted) = growth(sections)
    assert [row[0] for row in rows] == ["128 x 2 x 1 x 2", "256 x 2 x 1 x 2", "512 x 2 x 1 x 2"]
    assert columns[1:] == ["a: compress", "a: decompress", "a: attend"]
    assert fitted == [["tokens, 128 to 512", "1.50", "1.50", "1.50"]]


def test_report_has_everything():
    contenders = [Ours(4), MinMax(4), MinMax(4, broken="crash")]
    timed, refused = compare(contenders, WORK, repeats=2)
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
    best = re.search(r"\| attend, 4 bits \| plain \| (\d+\.\d\d) \(", text)
    assert best and float(best[1]) == pytest.approx(timed[1].ratio("attend", timed[0])[0], abs=0.01)
    stored = json.loads(report.json())
    assert len(stored["sections"][0]["timed"][0]["seconds"]["compress"]) == 2


def test_a_run_writes_both_files(monkeypatch, tmp_path):
    """All of `make peers` but the peers and the sizes."""

    def two(bits):
        return [Ours(bits), MinMax(bits)]

    tiny = [
        Shape(layers=1, tokens=tokens, kv_heads=2, heads=4, head_dim=64) for tokens in (128, 256)
    ]
    monkeypatch.setattr("benchmarks.peers.run.contenders", two)
    monkeypatch.setattr("benchmarks.peers.run.grown_contenders", two)
    monkeypatch.setattr("benchmarks.peers.run.growing", lambda shape: tiny)
    files = {"json": str(tmp_path / "peers.json"), "markdown": str(tmp_path / "peers.md")}
    run(dataclasses.replace(TINY, bits=(8, 4), repeats=2, scaling=True, command="this", **files))
    text = (tmp_path / "peers.md").read_text()
    for part in ("# Beside", "attend, 8 bits | plain", "4 bits: the exponent", "Again: this"):
        assert part in text
    stored = json.loads((tmp_path / "peers.json").read_text())
    assert [len(s["timed"]) for s in stored["sections"]] == [2, 2]
    assert [s["shape"]["tokens"] for s in stored["scaling"]] == [128, 256, 128, 256]


def test_a_run_in_which_we_are_wrong_fails(monkeypatch):
    monkeypatch.setattr("benchmarks.peers.run.contenders", lambda bits: [MinMax(bits)])
    with pytest.raises(SystemExit, match="our own results were refused"):
        run(TINY)


@pytest.mark.parametrize("change", [{"tokens": 100}, {"heads": 3}, {"layers": 0}])
def test_shape_errors(change):
    sizes = {"kv_heads": 2, "heads": 4} | change
    with pytest.raises(ValueError, match="shape: expected sizes of at least 1"):
        Shape(**sizes)


def _loaded(contender):
    contender.load(WORK)
    return contender
