"""Measures launch settings of the GPU kernels on the device at hand, and stores the best."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvcompress_jax.kernels.case import Case
from kvcompress_jax.kernels.decode_attention import cases as decode_cases
from kvcompress_jax.kernels.hadamard import cases as hadamard_cases
from kvcompress_jax.kernels.open_page import cases as open_cases
from kvcompress_jax.kernels.prefill_attention import cases as prefill_cases
from kvcompress_jax.kernels.seal_page import cases as seal_cases
from kvcompress_jax.kernels.tuning import Tuning, device_file, find_tuning, read_tuning
from kvcompress_jax.lab.case_timing import Measured, measure_cases
from kvcompress_jax.lab.output import replacing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tunable:
    """An op at one shape: `case(settings)` for each of the candidates."""

    op: str
    shape: str
    case: Callable[[Tuning], Case]
    candidates: Sequence[Tuning]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was measured of an op at one shape; a candidate that failed has no time."""

    op: str
    shape: str
    best: Tuning
    default: Tuning
    best_seconds: float
    default_seconds: float | None
    failed: Sequence[str]


def tunables() -> list[Tunable]:
    """Of all ops, one per shape of their cases."""
    found: dict[tuple[str, str], Tunable] = {}
    for op, module in (("seal_page", seal_cases), ("open_page", open_cases)):
        for size in module.SIZES:
            page_size, dim = size[:2]
            if size[-1] is not False:  # pages whose tokens are ordered need the most
                found.setdefault(
                    (op, f"{page_size}x{dim}"),
                    Tunable(
                        op=op,
                        shape=f"{page_size}x{dim}",
                        case=functools.partial(_make, module.make_case, size),
                        candidates=module.candidates(page_size, dim),
                    ),
                )
    for size in hadamard_cases.SIZES:
        found.setdefault(
            ("hadamard", str(size[0])),
            Tunable(
                op="hadamard",
                shape=str(size[0]),
                case=functools.partial(_make, hadamard_cases.make_case, size),
                candidates=hadamard_cases.candidates(size[0]),
            ),
        )
    attention = {
        "decode_attention": decode_cases.make_case,
        "prefill_attention": functools.partial(
            decode_cases.make_case, queries=prefill_cases.QUERIES, op="prefill_attention"
        ),
    }
    for op, make_case in attention.items():
        sizes = decode_cases.SIZES if op == "decode_attention" else prefill_cases.SIZES
        for size in sizes:
            shape = f"{size[0]}x{size[1]}"
            found.setdefault(
                (op, shape),
                Tunable(
                    op=op,
                    shape=shape,
                    case=functools.partial(_make, make_case, size),
                    candidates=decode_cases.candidates(op, *size[:2]),
                ),
            )
    return list(found.values())


def _make(make_case: Callable[..., Case], size: Sequence[object], settings: Tuning) -> Case:
    return make_case(*size, tuning=settings)


def tune(
    tunable: Tunable,
    *,
    device: str,
    measure: Callable[[Sequence[Case]], Iterable[Measured]] = measure_cases,
) -> Tuned:
    """Measures the default settings and all candidates of an op at one shape.

    A candidate that does not compile, or gives wrong results, is left out and reported.

    Args:
      tunable: the op.
      device: its name, as JAX gives it.
      measure: checks and times cases.

    Raises:
      ValueError: no candidate works.
    """
    default = find_tuning(tunable.op, tunable.shape, device)
    candidates = [default, *(c for c in tunable.candidates if c != default)]
    times: list[tuple[float, Tuning]] = []
    failed, default_seconds = [], None
    measured = measure([tunable.case(settings) for settings in candidates])
    for settings, found in zip(candidates, measured, strict=True):
        if found.seconds is None:
            failed.append(f"{json.dumps(settings)}: {found.wrong}")
            continue
        times.append((found.seconds, settings))
        if settings is default:
            default_seconds = found.seconds
    if not times:
        raise ValueError(f"{tunable.op} {tunable.shape}: no settings work: {failed[0]}")
    best_seconds, best = min(times, key=lambda x: x[0])
    return Tuned(
        op=tunable.op,
        shape=tunable.shape,
        best=best,
        default=default,
        best_seconds=best_seconds,
        default_seconds=default_seconds,
        failed=failed,
    )


def store(results: Sequence[Tuned], *, device: str, folder: Path) -> list[Path]:
    """Writes the best settings to `<folder>/<op>/<device>.json`; shapes that were not measured keep
    what the file says of them."""
    written = []
    for op in dict.fromkeys(result.op for result in results):
        file = folder / op / device_file(device)
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = dict(read_tuning(file)) if file.exists() else {}
        settings |= {result.shape: result.best for result in results if result.op == op}
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
        written.append(file)
    return written
