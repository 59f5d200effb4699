"""Continuous batching: requests come and go, every step serves all that are running."""

import collections
import logging
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kvcompress_jax.manager import OutOfPagesError
from kvcompress_jax.metrics.board import Board
from kvcompress_jax.models.errors import one_line
from kvcompress_jax.models.flight import Flight, launch
from kvcompress_jax.models.prefixes import HeldPrefixes
from kvcompress_jax.models.recovery import recover, start_over
from kvcompress_jax.models.request import NO_SEQUENCE, Request
from kvcompress_jax.models.runner import Runner
from kvcompress_jax.models.sampling import NOT_FINITE

logger = logging.getLogger(__name__)


class Engine:
    """Schedules requests on a `Runner`.

    First come, first served, each tenant for itself. Prompts are fed in chunks, one request at a
    time, while all others decode. When pages run out, the request that came last moves to host
    memory and comes back, bit for bit, once there is room. With `prefix_cache_bytes`, a prompt
    is fed from where it differs from earlier ones of its tenant.

    When a step fails on the device, the requests in it are started over with the tokens that they
    have (`kvcompress_jax.models.recovery`).
    """

    def __init__(self, runner: Runner, *, board: Board | None = None) -> None:
        """
        Args:
          runner: of the model.
          board: where figures are published (`kvcompress_jax.metrics`).
        """
        self.runner = runner
        self.board = board
        self.finished: collections.Counter[str] = collections.Counter()  # requests by reason
        self.prompt_tokens = 0  # that were fed
        self.generated_tokens = 0
        self.failed_steps = 0
        self.recomputed_requests = 0
        self.prefixes = HeldPrefixes(runner)
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []  # by arrival
        self.preempted: list[Request] = []  # by arrival
        self._planning = False  # what the host decided may not be on the device yet
        self._next_id = 0
        self._flight: Flight | None = None  # of the step that was started
        self._ended: list[Request] = []  # in it
        self._started = 0.0

    def hold_prefix(self, tokens: list[int], tenant: str = "") -> int:
        """Reads tokens into a sequence that requests can continue; they share its pages. Let go of
        it with `release_prefix`."""
        try:
            return self.prefixes.hold(tokens, tenant)
        except jax.errors.JaxRuntimeError:
            start_over(self, keep_cache=False)
            raise

    def release_prefix(self, prefix: int) -> None:
        """Ends a prefix of `hold_prefix`; requests that continue it and were started keep its
        pages.

        Raises:
          ValueError: there is none.
        """
        self.prefixes.release(prefix)

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
        if prefix is not None and self.prefixes.tenant_of(prefix) != tenant:
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
        """Ends a request now, whatever it is doing; its pages are freed and its tokens so far stay
        in it."""
        if request.finish_reason is None:
            self.finish(request, "cancelled")

    def step(self) -> list[Request]:
        """One step for all running requests.

        Returns:
          Requests that finished in it.

        Raises:
          OutOfPagesError: a request alone does not fit into the cache; it is ended as
            "out_of_pages", and the others go on with the next step.
          JaxRuntimeError: the device failed, and not in a step of any request.
        """
        self.start_step()
        return self.finish_step()

    def start_step(self) -> None:
        """The first half of a step: puts it on the device and does not wait for its tokens, so that
        other devices can be given theirs. `finish_step` comes next.

        Raises:
          as `step`.
        """
        if self._flight is not None:
            raise RuntimeError("start_step: expected the last step to be finished")
        self._started = time.monotonic()
        try:
            self._flight = self._launch()
        except jax.errors.JaxRuntimeError as e:
            self._ended += recover(self, e, keep_cache=not self._planning)

    def finish_step(self) -> list[Request]:
        """The second half: waits for the tokens; see `step`."""
        flight, self._flight = self._flight, None
        try:
            if flight is not None:
                self._take_tokens(flight)
        except jax.errors.JaxRuntimeError as e:
            self._ended += recover(self, e, keep_cache=True)
        if self.board is not None:
            self.board.step(time.monotonic() - self._started, self.figures)
        finished, self._ended = self._ended, []
        return finished

    def figures(self) -> tuple[Mapping[str, object], Mapping[str, object]]:
        """`get_compression_stats()` and the engine's own figures, for a `Board`."""
        return self.runner.manager.get_compression_stats(), {
            "requests_running": len(self.running),
            "requests_waiting": len(self.waiting),
            "requests_preempted": len(self.preempted),
            "finished": dict(self.finished),
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "failed_steps": self.failed_steps,
            "recomputed_requests": self.recomputed_requests,
        }

    def _launch(self) -> Flight | None:
        self._planning = True
        self.prefixes.restore()
        self._resume()
        self._admit()
        self.runner.advance()
        self._remember()
        self._planning = False
        while self.running:
            decoding = [r for r in self.running if r.decoding]
            feeding = next((r for r in self.running if not r.decoding), None)
            chunk = None
            if feeding is not None:
                part = feeding.feed[feeding.fed : feeding.fed + self.runner.chunk_tokens]
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
                self.prompt_tokens += len(part)
                if feeding.decoding:
                    decoding.append(feeding)
                    decoded = jnp.concatenate([decoded, fed])
            flight = None
            if decoding:
                flight = launch(decoding, decoded, rows=self.runner.max_sequences)
            self._planning = True
            self.runner.look_ahead()
            self._planning = False
            return flight
        return None

    def run(self) -> None:
        """Steps until idle."""
        while not self.idle:
            self.step()

    def _admit(self) -> None:
        runner = self.runner
        # Who waits for room lets nobody of its own past it.
        blocked = {self._group(r) for r in self.preempted}
        for request in list(self.waiting):
            if any(r.suspect for r in self.running):
                return  # it is tried before anybody else comes
            group = self._group(request)
            if group in blocked:
                continue
            try:
                if request.prefix is None:
                    request.sequence = runner.begin(request.feed, request.tenant)
                    request.fed = runner.manager.length(request.sequence)
                else:
                    request.sequence = runner.manager.fork(
                        self.prefixes.sequence_of(request.prefix)
                    )
            except OutOfPagesError:
                blocked.add(group)
                continue
            except ValueError as e:  # the prefix was freed, or lost and is nobody's
                self.finish(request, "error", f"request {request.id}: prefix: {e}")
                continue
            self.waiting.remove(request)
            self.running.append(request)

    def _remember(self) -> None:
        """What the prompt that is being fed has in the cache, later ones may begin with."""
        feeding = next((r for r in self.running if not r.decoding), None)
        if feeding is not None and feeding.fed and feeding.prefix is None:
            runner = self.runner
            runner.manager.remember(feeding.sequence, feeding.feed[: feeding.fed], runner.cache)

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
            reason = f"request {youngest.id} does not fit into the cache: {error}"
            self.finish(youngest, "out_of_pages", reason)
            raise OutOfPagesError(reason, error.tenant)
        logger.info("request %d preempted: %s", youngest.id, error)
        self._planning = True
        try:
            runner.manager.preempt(youngest.sequence, runner.cache)
        except MemoryError as e:
            reason = f"request {youngest.id}: no host memory to preempt it: {one_line(e)}"
            self.finish(youngest, "error", reason)
            self._planning = False
            return
        self._planning = False
        self.running.remove(youngest)
        self.preempted.append(youngest)
        self.preempted.sort(key=lambda r: r.id)

    def _take_tokens(self, flight: Flight) -> None:
        for request, token in zip(flight.requests, flight.wait(), strict=True):
            if request.finish_reason is not None:
                continue  # cancelled since
            if token == NOT_FINITE:
                reason = f"request {request.id}: its logits are not finite"
                self.finish(request, "error", reason)
                self._ended.append(request)
                continue
            request.generated.append(token)
            request.suspect = False
            self.generated_tokens += 1
            if token in self.runner.model.config.eos_token_ids:
                self.finish(request, "stop")
            elif len(request.generated) == request.max_new_tokens:
                self.finish(request, "length")
            if request.finish_reason is not None:
                self._ended.append(request)

    def finish(self, request: Request, reason: str, error: str | None = None) -> None:
        """Ends a request and frees its pages."""
        if error is not None:
            logger.warning("%s", error)
        request.finish_reason, request.error = reason, error
        self.finished[reason] += 1
        for queue in (self.waiting, self.running, self.preempted):
            if request in queue:
                queue.remove(request)
        if request.sequence != NO_SEQUENCE:
            self.runner.manager.free(request.sequence)
            request.sequence = NO_SEQUENCE
