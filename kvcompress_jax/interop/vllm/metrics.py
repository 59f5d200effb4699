"""The figures in Prometheus: vLLM's workers write them to a file, its front end reads them when
`/metrics` is asked for.

vLLM has no way for a worker's own figures to the front end, which is another process. Both are on
one machine, or the workers' figures are missing. A file per worker, replaced whole, needs no lock.
"""

import atexit
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The front end sets it before it starts the others, which inherit it.
DIRECTORY_VARIABLE = "VLLM_KV_COMPRESSION_STATS_DIR"
PUBLISH_SECONDS = 0.5
PREFIX = "vllm:kv_compression_"

_COUNTERS = frozenset(
    "seals early_seals unrefined demotions promotions refusals without_sink reused abandoned"
    " damaged offload_stores offload_loads".split()
)
_published = 0.0


def collect_from_workers() -> None:
    """Makes the directory of this engine's figures, in the environment of the processes to come,
    and gives its collector to Prometheus. Once: in the front end, which starts the others."""
    if DIRECTORY_VARIABLE in os.environ:
        return
    from prometheus_client import REGISTRY

    directory = tempfile.mkdtemp(prefix="kvcompress-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ[DIRECTORY_VARIABLE] = directory
    REGISTRY.register(Collector(Path(directory)))


def publish(figures: Callable[[], Any]) -> None:
    """Writes this worker's figures, at most every `PUBLISH_SECONDS`."""
    global _published
    directory = os.environ.get(DIRECTORY_VARIABLE)
    now = time.monotonic()
    if directory is None or now - _published < PUBLISH_SECONDS:
        return
    _published = now
    target = Path(directory) / f"{os.getpid()}.json"
    partial = target.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(figures()))
        partial.replace(target)
    except OSError:  # the front end is gone and its directory with it
        return


class Collector:
    """A collector for `prometheus_client`; one time series per worker and figure."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def collect(self) -> Iterator[Any]:
        """What the workers wrote last."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        workers = [
            (file.stem, json.loads(file.read_text())) for file in self.directory.glob("*.json")
        ]
        for name in workers[0][1] if workers else ():
            family: Any
            text = f"KV compression: {name.replace('_', ' ')}"
            if name in _COUNTERS:
                family = CounterMetricFamily(PREFIX + name, text, labels=["worker"])
            else:
                family = GaugeMetricFamily(PREFIX + name, text, labels=["worker"])
            for worker, figures in workers:
                if figures.get(name) is not None:
                    family.add_metric([worker], figures[name])
            yield family
