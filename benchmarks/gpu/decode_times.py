"""Decode attention on the GPU at hand: every implementation, level and size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console

from benchmarks.gpu.roofline import (
    EVEN,
    FINE_ROWS,
    LEVELS,
    PAGE_SIZE,
    SHAPES,
    Shape,
    page_bytes,
)
from kvcompress_jax.lab.agreement import disagreement
from kvcompress_jax.lab.attention_timing import attention_step, random_cache, random_queries
from kvcompress_jax.lab.case_timing import REPEATS
from kvcompress_jax.lab.kernel_timing import Program, compile_together
from kvcompress_jax.lab.timing import median_seconds
from kvcompress_jax.paged import CacheLayout, attend
from kvcompress_jax.paged.attention import IMPLEMENTATIONS

LAYERS = 4  # of the cache: more than the second-level cache of a GPU holds
ROUNDS = 8  # over all of them in a program, so that starting it hardly counts
BATCHES = ((1, 32768), (8, 32768), (32, 8192))
# What JAX has for an uncompressed cache that lies in one piece.
CONTIGUOUS = "contiguous, cuDNN"
TIMED = (*LEVELS, EVEN)
RELATIVE_FROM = 0.5  # a mean of values errs by a share of the greatest of them


def check_attention(console: Console) -> bool:
    """Compares every implementation of attention with XLA's; returns whether any is wrong."""
    wrong = False
    for shape in SHAPES:
        for level in TIMED:
            layout, number = level_layout(shape, level, layers=1)
            cache, table = random_cache(layout, level=number, sequences=2, tokens=512)
            q = random_queries(layout, sequences=2, heads=shape.heads)
            outputs = {}
            for name in IMPLEMENTATIONS:
                step = jax.jit(functools.partial(attend, layer=0, implementation=name))
                try:
                    outputs[name] = step(q, cache, table=table)[:2]
                except NotImplementedError as e:
                    console.print(f"refused attend/{name} {shape.name} {level}: {e}")
            for name, output in outputs.items():
                difference = disagreement(output, outputs["xla"], relative_from=RELATIVE_FROM)
                wrong = wrong or difference is not None
                verdict = "WRONG" if difference else "right"
                console.print(f"{verdict} attend/{name} {shape.name} {level} {difference or ''}")
    return wrong


def time_attention(console: Console, copied: float, *, quick: bool) -> list[dict[str, Any]]:
    """One layer of a decode step, as a row for each shape, batch, level and implementation.

    Args:
      console: is told what could not be timed.
      copied: bytes per second that a copy reads and writes.
      quick: one shape and batch.
    """
    rows = []
    for shape in SHAPES[:1] if quick else SHAPES:
        batches = BATCHES[1:2] if quick else BATCHES
        programs = {
            (batch, level, name): _program(shape, batch, level, name)
            for batch in batches
            for level in TIMED
            for name in IMPLEMENTATIONS
        }
        programs |= {(batch, "raw", CONTIGUOUS): _contiguous(shape, batch) for batch in batches}
        compile_together(list(programs.values()))
        for (batch, level, name), program in programs.items():
            # What refuses, `check_attention` has said.
            if program.error is not None and not program.error.startswith("NotImplementedError"):
                console.print(f"not timed: {shape.name} {batch} {level} {name}: {program.error}")
        for batch in batches:
            seconds = {}
            for level in TIMED:
                mine = {
                    name: program
                    for (other, at, name), program in programs.items()
                    if (other, at) == (batch, level) and program.error is None
                }
                for name, took in _measure(console, shape, batch, level, mine).items():
                    seconds[level, name] = took
            for (level, name), took in seconds.items():
                raw, xla = (seconds.get(x, float("nan")) for x in (("raw", name), (level, "xla")))
                size = batch[0] * (batch[1] // PAGE_SIZE) * page_bytes(shape, level)
                rows.append(
                    {
                        "shape": shape.name,
                        "sequences": batch[0],
                        "tokens": batch[1],
                        "level": level,
                        "implementation": name,
                        "seconds": took,
                        "share": size / took / copied,
                        "raw_over_this": raw / took,
                        "xla_over_this": xla / took,
                    }
                )
    return rows


def level_layout(shape: Shape, level: str, *, layers: int) -> tuple[CacheLayout, int]:
    """A layout of so many layers, and the level of its pages."""
    layout = CacheLayout(
        layers=layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        page_size=PAGE_SIZE,
        fine_rows=FINE_ROWS.get(level, 0),
        fine_bits=2 if level == EVEN else 4,
        sink_tokens=0,
    )
    return layout, 0 if level == "raw" else (1 if layout.fine_rows else 2)


def _arguments(shape: Shape, batch: tuple[int, int], level: str) -> tuple[Any, ...]:
    layout, number = level_layout(shape, level, layers=LAYERS)
    sequences, tokens = batch
    q = random_queries(layout, sequences=sequences, heads=shape.heads)
    return q, *random_cache(layout, level=number, sequences=sequences, tokens=tokens)


def _program(shape: Shape, batch: tuple[int, int], level: str, implementation: str) -> Program:
    shapes = jax.eval_shape(functools.partial(_arguments, shape, batch, level))
    return Program(attention_step(implementation, rounds=ROUNDS), *shapes)


def _measure(
    console: Console, shape: Shape, batch: tuple[int, int], level: str, programs: dict[str, Program]
) -> dict[str, float]:
    """Seconds of a layer, by implementation."""
    paged = _arguments(shape, batch, level)
    found = {}
    for name, program in programs.items():
        arguments = paged
        if name == CONTIGUOUS:
            arguments = _contiguous_arguments(shape, batch)
        run = functools.partial(program, *arguments)
        try:
            took = median_seconds(lambda run=run: jax.block_until_ready(run()), REPEATS)  # type: ignore[misc]
        except jax.errors.JaxRuntimeError as e:  # out of memory, most likely
            console.print(f"not timed: {shape.name} {batch} {level} {name}: {str(e)[:200]}")
            continue
        found[name] = took / (ROUNDS * LAYERS)
    return found


def _contiguous_arguments(shape: Shape, batch: tuple[int, int]) -> tuple[jax.Array, ...]:
    sequences, tokens = batch
    sizes = (LAYERS, sequences, tokens, shape.kv_heads, shape.dim)
    keys = iter(jax.random.split(jax.random.key(0), 3))
    q = jax.random.normal(next(keys), (sequences, 1, shape.heads, shape.dim), jnp.bfloat16)
    return q, *(jax.random.normal(next(keys), sizes, jnp.bfloat16) for _ in range(2))


def _contiguous(shape: Shape, batch: tuple[int, int]) -> Program:
    def step(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        def body(q: jax.Array, kv: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return q + jax.nn.dot_product_attention(q, *kv, implementation="cudnn"), None

        for _ in range(ROUNDS):
            q, _ = lax.scan(body, q, (keys, values))
        return q

    return Program(step, *jax.eval_shape(functools.partial(_contiguous_arguments, shape, batch)))
