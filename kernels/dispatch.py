"""Which implementation of an op runs: the only place that chooses."""

import collections
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

_log = logging.getLogger(__name__)

# How often each (op, implementation) was passed over on a GPU, where it is what one wants. Counted
# when a program is traced, not each time that it runs.
FALLBACKS: collections.Counter[tuple[str, str]] = collections.Counter()


def on_gpu() -> bool:
    """Whether JAX computes where the kernels run."""
    return jax.default_backend() in ("gpu", "cuda")


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    chosen: str | None,
    *args: Any,
    **settings: Any,
) -> Any:
    """Runs the implementation that was named, or the first that can do what is asked.

    A name never falls back to another implementation. Without one, an implementation that refuses
    on a GPU is logged as a warning and counted in `FALLBACKS`; on other devices only "xla" runs.

    Raises:
      ValueError: `chosen` names none.
      NotImplementedError: none can do it; says why for each.
    """
    if chosen is not None and chosen not in implementations:
        raise ValueError(
            f"implementation: expected one of {sorted(implementations)}, got {chosen!r}"
        )
    refusals = []
    for name in [chosen] if chosen else implementations:
        if name != "xla" and not on_gpu():
            refusals.append(f"{name}: expected a CUDA device, got {jax.default_backend()}")
            continue
        try:
            return implementations[name](*args, **settings)
        except NotImplementedError as e:
            refusals.append(f"{name}: {e}")
            if chosen is None:
                FALLBACKS[op, name] += 1
                _log.warning("%s: %s", op, refusals[-1])  # a GPU that goes without its kernel
    raise NotImplementedError(f"{op}: {'; '.join(refusals)}")
