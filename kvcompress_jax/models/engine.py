"""Continuous batching: requests come and go, every step serves all that are running."""

import collections
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np

from kvcompress_jax.manager import OutOfPagesError
from kvcompress_jax.models.runner import Runner

NO_SEQUENCE = -1

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what became of it."""

    id: int
    prompt: list[int]
    max_new_tokens: int
    temperature: float
    seed: int
    prefix: int | None  # a sequence that the prompt continues
    tenant: str
    generated: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length" once finished
    sequence: int = NO_SEQUENCE
    fed: int = 0  # tokens of the prompt that are in the cache

    @property
    def decoding(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.fed == len(self.prompt)


class Engine:
    """Schedules requests on a `Runner`.

    First come, first served, each tenant for itself. Prompts are fed in chunks, one request at a
    time, while all others decode. When pages run out, the request that came last moves to host
    memory and comes back, bit for bit, once there is room. With `prefix_cache_bytes`, a prompt
    is fed from where it differs from earlier ones of its tenant.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []  # by arrival
        self.preempted: list[Request] = []  # by arrival
        self._next_id = 0

    def hold_prefix(self, tokens: list[int], tenant: str = "") -> int:
        """Reads tokens into a sequence that requests can continue; they share its pages. Free it
        with `runner.manager.free`."""
        sequence = self.runner.manager.add(tenant)
        self.runner.extend(sequence, tokens)
        self.runner.advance()
        return sequence

    def submit(
        self,
        prompt: list[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        prefix: int | None = None,
        tenant: str = "",
    ) -> Request:
        """Queues a request.

        Args:
          prompt: token ids.
          max_new_tokens: to generate at most.
          temperature: 0 is greedy.
          seed: of the sampling; a request's tokens depend on it and not on who runs beside.
          prefix: of `hold_prefix`; the prompt continues it.
          tenant: whose request it is; tenants share no pages.

        Raises:
          ValueError: an empty prompt, no tokens to generate, a negative temperature, or a prefix
            of another tenant.
        """
        if not prompt:
            raise ValueError("prompt: expected at least one token, got none")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        if not temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        if prefix is not None and self.runner.manager.sequences[prefix].tenant != tenant:
            raise ValueError(f"prefix: expected one of tenant {tenant!r}, got that of another")
        request = Request(
            self._next_id, list(prompt), max_new_tokens, temperature, seed, prefix, tenant
        )
        self._next_id += 1
        self.waiting.append(request)
        return request

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.waiting or self.running or self.preempted)

    def cancel(self, request: Request) -> None:
        """Ends a request now; its pages are freed and its tokens so far stay in it."""
        if request.finish_reason is None:
            self._finish(request, "cancelled")

    def step(self) -> list[Request]:
        """One step for all running requests.

        Returns:
          Requests that finished in it.

        Raises:
          OutOfPagesError: a request alone does not fit into the cache; it is ended as
            "out_of_pages", and the others go on with the next step.
        """
        self._resume()
        self._admit()
        self.runner.advance()
        self._remember()
        while self.running:
            decoding = [r for r in self.running if r.decoding]
            feeding = next((r for r in self.running if not r.decoding), None)
            chunk = None
            if feeding is not None:
                part = feeding.prompt[feeding.fed : feeding.fed + self.runner.chunk_tokens]
                chunk = (feeding.sequence, part)
            try:
                decoded, fed = self.runner.forward(
                    [(r.sequence, r.generated[-1]) for r in decoding], chunk
                )
            except OutOfPagesError as e:
                self._make_room(e)
                continue
            if feeding is not None:
                feeding.fed += len(part)
                if feeding.decoding:
                    decoding.append(feeding)
                    decoded = jnp.concatenate([decoded, fed])
            return self._take_tokens(decoding, decoded)
        return []

    def run(self) -> None:
        """Steps until idle."""
        while not self.idle:
            self.step()

    def _admit(self) -> None:
        runner = self.runner
        # Who waits for room lets nobody of its own past it.
        blocked = {self._group(r) for r in self.preempted}
        for request in list(self.waiting):
            group = self._group(request)
            if group in blocked:
                continue
            try:
                if request.prefix is None:
                    request.sequence = runner.begin(request.prompt, request.tenant)
                    request.fed = runner.manager.length(request.sequence)
                else:
                    request.sequence = runner.manager.fork(request.prefix)
            except OutOfPagesError:
                blocked.add(group)
                continue
            self.waiting.remove(request)
            self.running.append(request)

    def _remember(self) -> None:
        """What the prompt that is being fed has in the cache, later ones may begin with."""
        feeding = next((r for r in self.running if not r.decoding), None)
        if feeding is not None and feeding.fed and feeding.prefix is None:
            runner = self.runner
            runner.manager.remember(feeding.sequence, feeding.prompt[: feeding.fed], runner.cache)

    def _group(self, request: Request) -> str | None:
        """Who competes with a request for room: its tenant, if that has a share, or all others."""
        return request.tenant if request.tenant in self.runner.manager.store.shares else None

    def _resume(self) -> None:
        runner = self.runner
        blocked = set()
        for request in list(self.preempted):
            group = self._group(request)
            beside = sum(self._group(r) == group for r in self.running)
            # Room to grow as well, or it would be preempted again at once.
            if group in blocked or (beside and runner.manager.raw.room(request.tenant) <= beside):
                blocked.add(group)
                continue
            try:
                runner.cache = runner.manager.resume(request.sequence, runner.cache)
            except OutOfPagesError:
                blocked.add(group)
                continue
            self.preempted.remove(request)
            self.running.append(request)
            self.running.sort(key=lambda r: r.id)

    def _make_room(self, error: OutOfPagesError) -> None:
        runner, shares = self.runner, self.runner.manager.store.shares
        group = error.tenant if error.tenant in shares else None
        rivals = [r for r in self.running if self._group(r) == group]
        youngest = rivals[-1]
        if len(rivals) == 1:
            self._finish(youngest, "out_of_pages")
            raise OutOfPagesError(
                f"request {youngest.id} does not fit into the cache: {error}", error.tenant
            )
        logger.info("request %d preempted: %s", youngest.id, error)
        runner.manager.preempt(youngest.sequence, runner.cache)
        self.running.remove(youngest)
        self.preempted.append(youngest)
        self.preempted.sort(key=lambda r: r.id)

    def _take_tokens(self, requests: list[Request], logits: jax.Array) -> list[Request]:
        if not requests:
            return []
        size = self.runner.max_sequences
        padded = jnp.pad(logits, ((0, size - len(requests)), (0, 0)))
        temperature, seed, index = (np.zeros(size, d) for d in (np.float32, np.uint32, np.int32))
        for i, request in enumerate(requests):
            temperature[i], seed[i] = request.temperature, request.seed
            index[i] = len(request.generated)
        tokens = np.asarray(_sample(padded, temperature, seed, index))[: len(requests)]
        finished = []
        for request, token in zip(requests, tokens.tolist(), strict=True):
            request.generated.append(token)
            if token in self.runner.model.config.eos_token_ids:
                self._finish(request, "stop")
            elif len(request.generated) == request.max_new_tokens:
                self._finish(request, "length")
            if request.finish_reason is not None:
                finished.append(request)
        return finished

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        for queue in (self.waiting, self.running, self.preempted):
            if request in queue:
                queue.remove(request)
        if request.sequence != NO_SEQUENCE:
            self.runner.manager.free(request.sequence)
            request.sequence = NO_SEQUENCE


@jax.jit
def _sample(
    logits: jax.Array, temperature: jax.Array, seed: jax.Array, index: jax.Array
) -> jax.Array:
    """i32[n]: greedy where temperature is 0, else a draw that seed and index fix."""

    def one(logits: jax.Array, t: jax.Array, seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        drawn = jax.random.categorical(key, logits / jnp.where(t > 0, t, 1.0))
        return jnp.where(t > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)

    return jax.vmap(one)(logits, temperature, seed, index)
