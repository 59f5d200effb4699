"""Sequences spread over replicas of a model: data parallelism, in one process and one thread."""

import dataclasses
import logging
from collections.abc import Sequence

import jax
import numpy as np

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.manager import OutOfPagesError
from kvcompress_jax.manager.stats import CompressionStats, merge_stats
from kvcompress_jax.models.engine import Engine
from kvcompress_jax.models.load import Model
from kvcompress_jax.models.request import Request
from kvcompress_jax.models.runner import Runner, make_runner
from kvcompress_jax.paged.sharding import HeadSharding

logger = logging.getLogger(__name__)


class Replicas:
    """Engines with a cache each. A request goes where it is done with the least work: the tokens
    that an engine has to do, and those of the prompt that it does not have the prefix of.

    A request's answer does not depend on the engine that gives it.
    """

    def __init__(self, runners: Sequence[Runner]) -> None:
        """
        Args:
          runners: of one model and configuration, with devices of their own (`make_replicas`).

        Raises:
          ValueError: there are none.
        """
        if not runners:
            raise ValueError("runners: expected at least one, got none")
        self.engines = [Engine(runner) for runner in runners]
        self._engine_of: dict[Request, Engine] = {}  # of requests that are not finished

    def submit(
        self,
        prompt: list[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        tenant: str = "",
    ) -> Request:
        """Queues a request with the engine that has the least to do for it; see `Engine.submit`.
        Its id is one of that engine."""
        engine = min(self.engines, key=lambda e: tokens_to_do(e) - shared_tokens(e, prompt, tenant))
        request = engine.submit(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            tenant=tenant,
        )
        self._engine_of[request] = engine
        return request

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return all(engine.idle for engine in self.engines)

    def cancel(self, request: Request) -> None:
        """See `Engine.cancel`."""
        if (engine := self._engine_of.pop(request, None)) is not None:
            engine.cancel(request)

    def step(self) -> list[Request]:
        """One step of every engine that has something to do, all on their devices at once.

        Returns:
          Requests that finished in it.

        Raises:
          OutOfPagesError: as `Engine.step`, when all engines have finished the step.
          JaxRuntimeError: as `Engine.step`, when all engines have finished the step.
        """
        errors: list[Exception] = []
        started = []
        for engine in self.engines:
            if not engine.idle:
                try:
                    engine.start_step()
                    started.append(engine)
                except (OutOfPagesError, jax.errors.JaxRuntimeError) as e:
                    errors.append(e)
        finished = []
        for engine in started:
            try:
                finished += engine.finish_step()
            except jax.errors.JaxRuntimeError as e:
                errors.append(e)
        for request in [r for r in self._engine_of if r.finish_reason is not None]:
            del self._engine_of[request]
        for error in errors[1:]:
            logger.error("one of several failures in a step: %s", error)
        if errors:
            raise errors[0]
        return finished

    def run(self) -> None:
        """Steps until idle."""
        while not self.idle:
            self.step()

    def get_compression_stats(self) -> CompressionStats:
        """Figures of all caches together."""
        return merge_stats([e.runner.manager.get_compression_stats() for e in self.engines])


def tokens_to_do(engine: Engine) -> int:
    """Tokens to feed and to generate until an engine is idle, if no request ends early."""
    requests = [*engine.waiting, *engine.running, *engine.preempted]
    return sum(len(r.feed) - r.fed + r.max_new_tokens - len(r.generated) for r in requests)


def shared_tokens(engine: Engine, prompt: list[int], tenant: str) -> int:
    """Tokens at the beginning of a prompt that an engine need not be fed: it remembers them, or
    will, as another prompt of the tenant that is there begins with them. 0 without a prefix cache.
    """
    runner = engine.runner
    if runner.config.prefix_cache_bytes is None:
        return 0
    found = runner.manager.prefixes.find(tenant, prompt, runner.chunk_tokens)
    best = 0 if found is None else found.length
    for request in (*engine.waiting, *engine.running, *engine.preempted):
        if request.tenant == tenant:
            best = max(best, _common(request.prompt, prompt))
    # Prefixes are remembered in whole chunks, and the last token is always fed.
    return min(best, len(prompt) - 1) // runner.chunk_tokens * runner.chunk_tokens


def _common(a: list[int], b: list[int]) -> int:
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ[0]) if len(differ) else size


def make_replicas(
    model: Model,
    config: CompressionConfig,
    *,
    tokens: int,
    max_sequences: int,
    replicas: int,
    shards: int = 1,
    split_weights: bool = False,
    devices: Sequence[jax.Device] | None = None,
    chunk_tokens: int = 256,
    kv_dtype: str = "bfloat16",
) -> Replicas:
    """Replicas on devices of their own.

    Args:
      model: weights and their configuration; every replica has a copy.
      config: of the compression; budgets are those of one replica. Their disk tiers are folders
        `replica-0`, ... in `disk_path`.
      tokens: that the pools of one replica hold.
      max_sequences: of one replica.
      replicas: how many.
      shards: devices of each, that its KV heads are split over.
      split_weights: see `HeadSharding`.
      devices: to take them from, in order; None: all of the default backend.
      chunk_tokens: most tokens of a prompt in a step.
      kv_dtype: of level 0.

    Raises:
      ValueError: too few devices, or heads that cannot be split.
    """
    found = jax.devices() if devices is None else list(devices)
    if replicas < 1 or shards < 1 or replicas * shards > len(found):
        raise ValueError(
            f"replicas: expected {replicas} replicas of {shards} devices to be at least 1 and at"
            f" most the {len(found)} that there are"
        )
    runners = []
    for i in range(replicas):
        part = np.array(found[i * shards : (i + 1) * shards])
        own = config
        if config.disk_path is not None:
            own = dataclasses.replace(config, disk_path=f"{config.disk_path}/replica-{i}")
        sharding = HeadSharding(jax.sharding.Mesh(part, ("heads",)), split_weights=split_weights)
        runners.append(
            make_runner(
                model,
                own,
                tokens=tokens,
                max_sequences=max_sequences,
                chunk_tokens=chunk_tokens,
                kv_dtype=kv_dtype,
                sharding=sharding,
            )
        )
    return Replicas(runners)
