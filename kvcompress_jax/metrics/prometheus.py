"""Names, units and types of the figures in Prometheus's format."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import kvcompress_jax
from kvcompress_jax.metrics.board import STEP_SECONDS, Board, Snapshot
from kvcompress_jax.metrics.fields import (
    COUNTERS,
    ENGINE_COUNTERS,
    ENGINE_GAUGES,
    FAMILIES,
    GAUGES,
)

PREFIX = "kvcompress_"


class BoardCollector(Collector):
    """The last snapshot of a board as metrics; none before the first."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def describe(self) -> list[Metric]:
        """Nothing: what there is depends on the snapshot."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All metrics of the moment."""
        info = GaugeMetricFamily(f"{PREFIX}build_info", "Constant 1.", labels=["version"])
        info.add_metric([kvcompress_jax.__version__], 1)
        yield info
        last, age = self._board.last(), self._board.age_s()
        if last is None or age is None:
            return
        yield _gauge("snapshot_age_seconds", "Age of all other figures.", age)
        yield from _manager_metrics(last.stats)
        yield from _engine_metrics(last)


def _manager_metrics(stats: Mapping[str, object]) -> Iterator[Metric]:
    used: set[str] = set()
    for name, (help_text, label, fields) in FAMILIES.items():
        family = GaugeMetricFamily(PREFIX + name, help_text, labels=[label])
        for field, at in fields.items():
            used.add(field)
            number = _number(stats.get(field))
            if number is not None:
                family.add_metric([at], number)
        yield family
    for field, value in stats.items():
        number = _number(value)
        if field in used or number is None:
            continue
        if field in COUNTERS:
            yield _counter(field, COUNTERS[field], number)
        else:
            name, help_text, factor = GAUGES.get(field, (field, _words(field), 1.0))
            yield _gauge(name, help_text, number * factor)


def _engine_metrics(last: Snapshot) -> Iterator[Metric]:
    for field, help_text in ENGINE_GAUGES.items():
        if (number := _number(last.engine.get(field))) is not None:
            yield _gauge(f"engine_{field}", help_text, number)
    for field, help_text in ENGINE_COUNTERS.items():
        if (number := _number(last.engine.get(field))) is not None:
            yield _counter(f"engine_{field}", help_text, number)
    finished = last.engine.get("finished")
    if isinstance(finished, Mapping):
        name = f"{PREFIX}engine_requests_finished"
        family = CounterMetricFamily(name, "Requests that ended.", labels=["reason"])
        for reason, count in finished.items():
            family.add_metric([str(reason)], count)
        yield family
    if last.steps_at_most[-1]:
        bounds = [str(b) for b in STEP_SECONDS] + ["+Inf"]
        histogram = HistogramMetricFamily(
            f"{PREFIX}engine_step_seconds", "Wall time of the engine's steps."
        )
        counts = [float(n) for n in last.steps_at_most]
        histogram.add_metric([], list(zip(bounds, counts, strict=True)), last.step_seconds)
        yield histogram


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, help_text, value=value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, help_text, value=value)  # adds _total


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _words(field: str) -> str:
    return f"{field.replace('_', ' ').capitalize()}."
