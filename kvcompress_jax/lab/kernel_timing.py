"""Time of a function of device arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from kvcompress_jax.lab.timing import median_seconds


def function_seconds(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    donate: Sequence[int] = (),
    calls: int,
    repeats: int,
) -> float:
    """Median time of a call, of `calls` that follow each other without a look at the clock.

    Args:
      function: of the arguments.
      arguments: pytrees of arrays; they survive.
      donate: number of the argument that is updated in place, if one is; the function's first
        result takes its place in the next call.
      calls: between two looks.
      repeats: looks, of which the median is taken.
    """
    run = jax.jit(function, donate_argnums=tuple(donate))
    current = list(arguments)
    for i in donate:
        current[i] = jax.tree.map(lambda x: x.copy(), current[i])

    def work() -> None:
        out = None
        for _ in range(calls):
            out = run(*current)
            for i in donate:
                current[i] = out[0]
        jax.block_until_ready(out)

    return median_seconds(work, repeats) / calls
