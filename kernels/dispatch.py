"""Which implementation of an op runs: the only place that chooses."""

import collections
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

_log = logging.getLogger(__name__)

# How often each (op, implementation) was passed over on the device that it is for. Counted when a
# program is traced, not each time that it runs.
FALLBACKS: collections.Counter[tuple[str, str]] = collections.Counter()


DEVICES = {"triton": "CUDA", "mosaic_gpu": "CUDA", "cpu": "CPU"}  # "xla" runs on any


class UnsuitedError(NotImplementedError):
    """What an implementation leaves to the next one because that is better at it: no fallback."""


def on_gpu() -> bool:
    """Whether JAX computes where the kernels for GPUs run."""
    return jax.default_backend() in ("gpu", "cuda")


def _device() -> str:
    return "CUDA" if on_gpu() else jax.default_backend().upper()


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    chosen: str | None,
    *args: Any,
    **settings: Any,
) -> Any:
    """Runs the implementation that was named, or the first that can do what is asked.

    A name never falls back to another implementation. Without one, an implementation that refuses
    on the device that it is for is logged, on a GPU as a warning, and counted in `FALLBACKS`.

    Raises:
      ValueError: `chosen` names none.
      NotImplementedError: none can do it; says why for each. `UnsuitedError`: the one that was
        named leaves it to another.
    """
    if chosen is not None and chosen not in implementations:
        raise ValueError(
            f"implementation: expected one of {sorted(implementations)}, got {chosen!r}"
        )
    refusals = []
    for name in [chosen] if chosen else implementations:
        if DEVICES.get(name, _device()) != _device():
            refusals.append(
                f"{name}: expected a {DEVICES[name]} device, got {jax.default_backend()}"
            )
            continue
        try:
            return implementations[name](*args, **settings)
        except NotImplementedError as e:
            left = isinstance(e, UnsuitedError)
            if chosen is not None:  # an operation around this one may choose another
                kind = UnsuitedError if left else NotImplementedError
                raise kind(f"{op}: {name}: {e}") from e
            refusals.append(f"{name}: {e}")
            if not left:
                FALLBACKS[op, name] += 1
                # A GPU that goes without its kernel; that a CPU can compile none is said elsewhere.
                _log.log(logging.WARNING if on_gpu() else logging.INFO, "%s: %s", op, refusals[-1])
    raise NotImplementedError(f"{op}: {'; '.join(refusals)}")
