"""What an engine does when the device fails in the middle of a step.

A step serves many requests, and an error does not say whose fault it is. So everybody in the step
is a suspect and starts over: the prompt and what was generated so far are fed again. Only one
suspect is in a step at a time. The one that fails again is ended as "error"; who gets a token is
none any more. An error that does not come back ends nobody.

The cache was donated to the step, so that it is often lost with it. Then there is a new one, those
that waited in host memory start over as well, as they may have shared pages, and held prefixes are
read again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import jax

from kvcompress_jax.models.errors import one_line
from kvcompress_jax.models.request import Request

if TYPE_CHECKING:
    from kvcompress_jax.models.engine import Engine

logger = logging.getLogger(__name__)


def recover(
    engine: Engine, error: jax.errors.JaxRuntimeError, *, keep_cache: bool
) -> list[Request]:
    """Ends the request that is to blame, if that is known; the others start over.

    Args:
      engine: whose step failed.
      error: of the device.
      keep_cache: see `start_over`.

    Returns:
      Requests that finished: one or none.

    Raises:
      JaxRuntimeError: nobody was in the step.
    """
    engine.failed_steps += 1
    logger.warning("a step failed: %s", one_line(error))
    finished = [r for r in engine.running if r.suspect]
    for request in finished:
        reason = f"request {request.id}: the device failed: {one_line(error)}"
        engine.finish(request, "error", reason)
    for request in engine.running:
        request.suspect = not finished
    if not start_over(engine, keep_cache=keep_cache) and not finished:
        raise error
    return finished


def start_over(engine: Engine, *, keep_cache: bool) -> int:
    """Frees the pages of all that run and queues them again; makes a new cache if it is lost.

    Args:
      engine: of the requests.
      keep_cache: if it is there: what the host decided is what is on the device, but for the pages
        of those that run.

    Returns:
      How many requests start over.
    """
    runner = engine.runner
    affected = list(engine.running)
    if keep_cache and runner.intact():
        for request in affected:
            runner.manager.free(request.sequence)
    else:
        logger.warning("the cache is lost: a new one is made")
        affected += engine.preempted
        engine.preempted.clear()
        engine.prefixes.lose()
        runner.rebuild()
    engine.running.clear()
    for request in reversed(affected):
        request.start_over()
        engine.waiting.appendleft(request)
    engine.recomputed_requests += len(affected)
    return len(affected)
