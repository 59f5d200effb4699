"""Checks contenders, then times them side by side."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .contract import Contender, NotAvailableError, Workload

OPERATIONS = ("compress", "decompress", "attend")
# On what an ideal min-max code has: scales are rounded, groups differ, codebooks are made for one
# distribution. A code of one bit less is off by a factor of 2.
SLACK = 1.6
ATTENTION_TOLERANCE = 2.0**-5  # of the root mean square: keys, weights and values in bfloat16
RUNS = 5  # of an operation in a turn, whose median counts,
SETTLING_SECONDS = 0.03  # after so long of runs that are not timed
SLOW_SECONDS = 0.2  # what takes longer is run once a turn
ENOUGH_SECONDS = 6.0  # whose rounds have taken so long in all is timed no more,
FEWEST_ROUNDS = 3  # after so many of them


class WrongResultError(Exception):
    """A contender whose results are not what its bits allow; the message has the numbers."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found of a contender before it was timed."""

    error: float  # root mean square of the round trip, keys and values together
    bound: float  # what its bits allow
    bits_stored: float  # per key or value, all overheads counted


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of one contender, one entry a round, and what was checked before.

    A slow one has fewer rounds: the first of them all.
    """

    name: str
    bits: int
    checked: Checked
    seconds: dict[str, list[float]]

    def milliseconds(self, operation: str, thousands: float) -> float:
        """Median for 1,024 tokens, all layers of the shape."""
        return statistics.median(self.seconds[operation]) * 1e3 / thousands

    @property
    def rounds(self) -> int:
        """How often it was timed."""
        return len(self.seconds["compress"])

    def spread(self, operation: str, thousands: float) -> tuple[float, float]:
        """Quartiles of the milliseconds for 1,024 tokens, all layers of the shape."""
        return _quartiles([s * 1e3 / thousands for s in self.seconds[operation]])

    def ratio(self, operation: str, to: "Timed") -> tuple[float, float, float]:
        """Median and quartiles of the ratios to another contender's time in the same rounds."""
        pairs = zip(self.seconds[operation], to.seconds[operation], strict=False)
        ratios = [a / b for a, b in pairs]
        return statistics.median(ratios), *_quartiles(ratios)


@dataclasses.dataclass(frozen=True)
class Refused:
    """A contender that was not timed, and why."""

    name: str
    bits: int
    reason: str


def round_trip_bound(work: Workload, bits: int) -> float:
    """Root mean square error of an ideal min-max code of whole vectors, with some slack.

    A value is off by at most half a step, evenly: half a step / sqrt(3) in the mean. The step is
    the vector's extent / (2 ** bits - 1).
    """
    extents = np.stack([np.ptp(x, axis=-1) for x in (work.keys, work.values)]).astype(np.float64)
    step = np.sqrt(np.mean(extents**2)) / (2**bits - 1)
    return SLACK * float(step) / 2 / 3**0.5


def check(contender: Contender, work: Workload) -> Checked:
    """Round trip and attention of one contender against float64.

    Raises:
      WrongResultError: an error beyond what its bits allow, or attention that is not that of its
        own keys and values.
    """
    code = contender.compress()
    opened = contender.opened(contender.decompress(code))
    wanted = (work.keys, work.values)
    bound = round_trip_bound(work, contender.bits)
    difference = [np.subtract(a, b, dtype=np.float64) for a, b in zip(opened, wanted, strict=True)]
    error = _rms(np.stack(difference))
    if not error <= bound:  # NaN is no success
        raise WrongResultError(
            f"round trip is off by {error:.4g}, {contender.bits} bits allow {bound:.4g}"
        )
    got = contender.attended(contender.attend(code)).astype(np.float64)
    right = _attention(work.queries, *opened)
    off = _rms(got - right) / _rms(right)
    if not off <= ATTENTION_TOLERANCE:
        raise WrongResultError(
            f"attention is off by {off:.4g} of its size, at most"
            f" {ATTENTION_TOLERANCE:.4g} was expected"
        )
    stored = 8 * contender.code_bytes(code) / work.shape.values
    return Checked(error=error, bound=bound, bits_stored=stored)


def compare(
    contenders: Sequence[Contender],
    work: Workload,
    *,
    repeats: int,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[list[Timed], list[Refused]]:
    """Checks all contenders and times those that pass, in turns: what disturbs the machine
    disturbs all of them alike.

    Args:
      contenders: at their bits; loaded here.
      work: the same for all.
      repeats: rounds.
      note: told what is being done.
    """
    timed, refused = [], []
    ready: list[tuple[Contender, Timed]] = []
    for contender in contenders:
        note(f"checking {contender.name}, {contender.bits} bits")
        try:
            contender.load(work)
            checked = check(contender, work)
        except NotAvailableError as e:
            refused.append(Refused(contender.name, contender.bits, f"not available: {e}"))
        except WrongResultError as e:
            refused.append(Refused(contender.name, contender.bits, f"wrong result: {e}"))
        except Exception as e:  # a peer's own failure, whatever it is, is no end of the run
            reason = f"failed: {type(e).__name__}: {' '.join(str(e).split())}"
            refused.append(Refused(contender.name, contender.bits, reason))
        else:
            result = Timed(contender.name, contender.bits, checked, {o: [] for o in OPERATIONS})
            timed.append(result)
            ready.append((contender, result))
    for i in range(repeats):
        for contender, result in ready:
            spent = sum(sum(seconds) for seconds in result.seconds.values())
            if result.rounds >= FEWEST_ROUNDS and spent > ENOUGH_SECONDS:
                continue
            note(f"round {i + 1} of {repeats}: {contender.name}, {contender.bits} bits")
            _one_round(contender, result.seconds)
    return timed, refused


def _one_round(contender: Contender, seconds: dict[str, list[float]]) -> None:
    def clocked(operation: str, work: Callable[[], Any]) -> Any:
        slow = bool(seconds[operation]) and seconds[operation][-1] > SLOW_SECONDS
        # Others ran in between: caches and clocks settle, and their threads stop to spin.
        settled = time.perf_counter() + SETTLING_SECONDS
        while not slow and time.perf_counter() < settled:
            work()
        found = []
        for _ in range(1 if slow else RUNS):
            start = time.perf_counter()
            result = work()
            found.append(time.perf_counter() - start)
        seconds[operation].append(statistics.median(found))
        return result

    code = clocked("compress", contender.compress)
    clocked("decompress", lambda: contender.decompress(code))
    clocked("attend", lambda: contender.attend(code))


def _quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(numbers, (0.25, 0.75))
    return float(low), float(high)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64 attention of one query per head to all tokens; shapes as in `Workload`."""
    layers, batch, heads, dim = queries.shape
    out = np.empty(queries.shape)
    group = heads // keys.shape[2]
    for i in np.ndindex(layers, batch):
        q = queries[i].reshape(-1, group, dim).astype(np.float64)
        logits = q @ keys[i].astype(np.float64).swapaxes(-1, -2) * dim**-0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[i] = (weights @ values[i].astype(np.float64)).reshape(heads, dim)
    return out
