"""Workloads of kernels, checked against their references and then timed."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from kvcompress_jax.kernels.case import Case
from kvcompress_jax.lab.agreement import disagreement
from kvcompress_jax.lab.kernel_timing import Program, Repeated, compile_together

CALLS = 20  # of a kernel in a program that is timed
REPEATS = 7  # runs of it, of which the median is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of a case.

    Attributes:
      wrong: how its result differs from the reference's, or why there is none; None: it is right.
      seconds: of a call; None: it is wrong, or was not to be timed.
      reference_seconds: likewise, of the reference.
    """

    case: Case
    wrong: str | None
    seconds: float | None = None
    reference_seconds: float | None = None


def measure_cases(
    cases: Sequence[Case], *, timed: bool = True, references: bool = False
) -> Iterator[Measured]:
    """Checks cases, and times those that are right, in their order.

    Programs are compiled side by side before any is run. Cases of the same name are taken to have
    the same reference, which is compiled once.

    Args:
      cases: with an example and a reference.
      timed: time them as well.
      references: time the references as well.

    Raises:
      ValueError: a case without an example or a reference.
    """
    for case in cases:
        if case.example is None or case.reference is None:
            raise ValueError(f"{case.name}: expected an example and a reference, got none")
    built = [case.build() for case in cases]
    checks = [Program(function, *shapes) for function, shapes in built]
    wanted: dict[str, Program] = {}
    loops: list[Repeated | None] = [None] * len(cases)
    reference_loops: list[Repeated | None] = [None] * len(cases)
    for i, (case, (function, shapes), check) in enumerate(zip(cases, built, checks, strict=True)):
        if case.name not in wanted:
            wanted[case.name] = Program(case.reference, *shapes)
        if timed and check.error is None:
            loops[i] = _loop(case, function, shapes)
            if references:
                reference_loops[i] = _loop(case, case.reference, shapes)
    loop_programs = [x.program for x in (*loops, *reference_loops) if x is not None]
    compile_together([*checks, *wanted.values(), *loop_programs])
    for case, check, loop, reference_loop in zip(
        cases, checks, loops, reference_loops, strict=True
    ):
        arguments = case.example()
        try:
            got = jax.block_until_ready(check(*arguments))
            want = wanted[case.name](*arguments)
            wrong = disagreement(got, want, relative_from=case.relative_from)
            del got, want
            times = [
                None if wrong or x is None else x.seconds(arguments, repeats=REPEATS)
                for x in (loop, reference_loop)
            ]
        except Exception as e:  # drivers raise what they like, and the next case may be right
            wrong, times = " ".join(str(e).split())[:300], [None, None]
        yield Measured(case=case, wrong=wrong, seconds=times[0], reference_seconds=times[1])


def _loop(case: Case, function: Callable[..., Any], shapes: tuple[Any, ...]) -> Repeated:
    return Repeated(function, shapes, donate=case.donate, calls=CALLS)
