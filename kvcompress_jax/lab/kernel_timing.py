"""Time of a function of device arrays: compiled first, many side by side, then measured alone."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.lab.timing import median_seconds

Arguments = tuple[Any, ...]


class Program:
    """A function, traced for its arguments' shapes, to be compiled and run.

    Attributes:
      error: why it could not be traced or compiled; None: it could, or nobody tried.
    """

    def __init__(
        self, function: Callable[..., Any], *shapes: Any, donate: Sequence[int] = ()
    ) -> None:
        """Traces.

        Args:
          function: of pytrees of arrays.
          shapes: of its arguments, pytrees of `jax.ShapeDtypeStruct`.
          donate: numbers of the arguments that are updated in place.
        """
        self.error: str | None = None
        self._lowered: Any = None
        self._compiled: Any = None
        try:
            self._lowered = jax.jit(function, donate_argnums=tuple(donate)).lower(*shapes)
        except Exception as e:  # compilers raise what they like; the reason is reported
            self.error = _reason(e)

    def compile(self) -> None:
        """Compiles what was traced."""
        if self._lowered is None:
            return
        try:
            self._compiled = self._lowered.compile()
        except Exception as e:
            self.error = _reason(e)

    def __call__(self, *arguments: Any) -> Any:
        """Runs it.

        Raises:
          RuntimeError: it is not compiled.
        """
        if self._compiled is None:
            raise RuntimeError(self.error or "expected a compiled program, got one that is not")
        return self._compiled(*arguments)


def compile_together(programs: Sequence[Program]) -> None:
    """Compiles programs side by side: most of it is done outside of Python."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as threads:
        list(threads.map(Program.compile, programs))


class Repeated:
    """A function that is called many times in one program: of a kernel of ten microseconds one
    would else measure the fifty that Python needs to start it."""

    def __init__(
        self,
        function: Callable[..., Any],
        shapes: Arguments,
        *,
        donate: Sequence[int] = (),
        calls: int,
    ) -> None:
        """Traces.

        Args:
          function: of pytrees of arrays.
          shapes: of its arguments, pytrees of `jax.ShapeDtypeStruct`.
          donate: number of the argument that is updated in place, if one is; the function's first
            result takes its place in the next call.
          calls: in the program.

        Raises:
          ValueError: more than one argument to donate.
        """
        if len(donate) > 1:
            raise ValueError(f"donate: expected at most one argument, got {len(donate)}")
        self._donate, self._calls = tuple(donate), calls

        def split(out: Any) -> tuple[Any, Any]:
            return (out[0], out[1:]) if donate else ((), out)

        def repeated(fixed: list[Any], updated: Any, last: Any) -> tuple[Any, Any]:
            def body(_: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
                # Otherwise a call whose arguments do not change would leave the loop.
                given, updated, _ = lax.optimization_barrier((fixed, *state))
                given = [updated if i in donate else x for i, x in enumerate(given)]
                return split(function(*given))

            return lax.fori_loop(0, calls, body, (updated, last))

        fixed, updated = self._parts(shapes)
        self._last = split(jax.eval_shape(function, *shapes))[1]
        self.program = Program(repeated, fixed, updated, self._last, donate=(1, 2))

    def _parts(self, arguments: Arguments) -> tuple[list[Any], Any]:
        fixed = [() if i in self._donate else x for i, x in enumerate(arguments)]
        return fixed, arguments[self._donate[0]] if self._donate else ()

    def seconds(self, arguments: Arguments, *, repeats: int) -> float:
        """Median time of a call.

        Args:
          arguments: pytrees of arrays; they survive.
          repeats: runs of the program, of which the median is taken.
        """
        fixed, updated = self._parts(arguments)
        state = (
            jax.tree.map(lambda x: x.copy(), updated),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._last),
        )

        def work() -> None:
            nonlocal state
            state = jax.block_until_ready(self.program(fixed, *state))

        return median_seconds(work, repeats) / self._calls


def _reason(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
