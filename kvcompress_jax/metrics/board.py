"""The last figures of a running engine, for other threads.

Whoever runs the engine publishes; whoever serves figures reads the last ones and never touches the
engine, the manager or the device. Reading figures costs the engine time, so that it is done rarely.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping

COST_SHARE = 0.01  # of the engine's time that reading figures may take
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Figures of one moment.

    Attributes:
      stats: `get_compression_stats()`.
      engine: figures of the engine; empty without one.
      steps_at_most: engine steps that took at most `STEP_SECONDS[i]`, and at last all of them.
      step_seconds: of all steps together.
      time: of the monotonic clock.
    """

    stats: Mapping[str, object]
    engine: Mapping[str, object]
    steps_at_most: tuple[int, ...]
    step_seconds: float
    time: float


class Board:
    """Holds the last snapshot. `publish` and `step` are for one thread, the rest for any."""

    def __init__(
        self,
        *,
        interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          interval_s: between snapshots at least; longer where reading figures takes more than a
            hundredth of it.
          clock: monotonic, in seconds.
        """
        self._interval_s = interval_s
        self._clock = clock
        self._start = clock()
        self._due = self._start
        self._lock = threading.Lock()
        self._last: Snapshot | None = None
        self._steps = [0] * (len(STEP_SECONDS) + 1)
        self._step_seconds = 0.0

    def step(
        self,
        seconds: float,
        read: Callable[[], tuple[Mapping[str, object], Mapping[str, object]]],
    ) -> None:
        """Counts a step of the engine, and publishes if it is time to.

        Args:
          seconds: that the step took.
          read: returns the figures of manager and engine.
        """
        for i, bound in enumerate(STEP_SECONDS):
            self._steps[i] += seconds <= bound
        self._steps[-1] += 1
        self._step_seconds += seconds
        start = self._clock()
        if start < self._due:
            return
        self.publish(*read())
        cost = self._clock() - start
        self._due = start + max(self._interval_s, cost / COST_SHARE)

    def publish(self, stats: Mapping[str, object], engine: Mapping[str, object]) -> None:
        """Puts figures up; neither is changed afterwards."""
        snapshot = Snapshot(
            stats=stats,
            engine=engine,
            steps_at_most=tuple(self._steps),
            step_seconds=self._step_seconds,
            time=self._clock(),
        )
        with self._lock:
            self._last = snapshot

    def last(self) -> Snapshot | None:
        """The last snapshot, None before the first."""
        with self._lock:
            return self._last

    def age_s(self) -> float | None:
        """Seconds since the last snapshot."""
        last = self.last()
        return None if last is None else self._clock() - last.time

    def uptime_s(self) -> float:
        """Seconds since the board was made."""
        return self._clock() - self._start
