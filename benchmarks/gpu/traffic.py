"""Bytes that a kernel touches, by address: its programs are run by hand, one operation at a time.

XLA sees a kernel from outside: whole arrays go in and come out. Whether each stored byte is read
once is decided inside, by what a program indexes. Here every load and store of a program is carried
out with real tables on the host, and the addresses are collected. What one program touches twice
counts once: it is a few kilobytes, and comes from a cache the second time.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PROGRAMS = 6  # that are run, spread evenly over the grid; the others are taken to be alike


@dataclasses.dataclass
class _Ref:
    """An array of a kernel: the places of its block in it, and what was touched."""

    data: np.ndarray  # flat
    places: np.ndarray
    read: set[int] = dataclasses.field(default_factory=set)
    written: set[int] = dataclasses.field(default_factory=set)

    @property
    def touched_bytes(self) -> int:
        return (len(self.read) + len(self.written)) * self.data.itemsize


def touched_bytes(
    function: Callable[..., Any], arguments: Sequence[Any], *, programs: int = PROGRAMS
) -> int:
    """That the kernels of a function read and write, all programs.

    Args:
      function: of `arguments`, with calls of Pallas kernels in it.
      arguments: pytrees of real arrays.
      programs: to run of each kernel.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    run = _Run(programs=programs)
    run.evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(tuple(arguments)))
    return run.total


@dataclasses.dataclass
class _Run:
    """Evaluates jaxprs; `ids` are the numbers of the program that runs, if one does."""

    programs: int
    total: int = 0
    ids: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(zip(jaxpr.invars, inputs, strict=True))

        def value(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            operands = [value(x) for x in equation.invars]
            outputs = self.step(equation, operands)
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return [value(x) for x in jaxpr.outvars]

    def closed(self, closed: Any, inputs: Sequence[Any]) -> list[Any]:
        return self.evaluate(closed.jaxpr, closed.consts, inputs)

    def step(self, equation: Any, operands: list[Any]) -> list[Any]:
        """Carries out one operation."""
        name, params = equation.primitive.name, equation.params
        special = getattr(self, f"_{name}", None)
        if special is not None:
            return special(equation, operands)
        if name in ("jit", "pjit", "closed_call"):
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            return self.closed(inner, operands)
        if name == "elementwise_inline_asm":  # unpacks codes: no addresses depend on it
            return [jnp.zeros(x.aval.shape, x.aval.dtype) for x in equation.outvars]
        if any(isinstance(x, _Ref) for x in operands):
            raise NotImplementedError(
                f"{name}: expected a load or a store, got another use of a ref"
            )
        out = equation.primitive.bind(*operands, **params)
        return list(out) if equation.primitive.multiple_results else [out]

    def _pallas_call(self, equation: Any, operands: list[Any]) -> list[Any]:
        params = equation.params
        mapping, jaxpr = params["grid_mapping"], params["jaxpr"]
        aliases = {out: into for into, out in params["input_output_aliases"]}
        shapes = [x.aval for x in equation.outvars]
        arrays = [np.asarray(x) for x in operands]
        arrays += [
            arrays[aliases[i]] if i in aliases else np.zeros(x.shape, x.dtype)
            for i, x in enumerate(shapes)
        ]
        self.grid = tuple(mapping.grid)
        count = math.prod(self.grid)
        chosen = np.unique(np.linspace(0, count - 1, self.programs).astype(int))
        touched = 0
        for number in chosen:
            self.ids = tuple(int(i) for i in np.unravel_index(number, self.grid))
            refs = [
                self._block(array, block)
                for array, block in zip(arrays, mapping.block_mappings, strict=True)
            ]
            self.evaluate(jaxpr, (), refs)
            touched += sum(ref.touched_bytes for ref in refs)
        self.ids = ()
        self.total += touched * count // len(chosen)
        return [jnp.zeros(x.shape, x.dtype) for x in shapes]

    def _block(self, array: np.ndarray, block: Any) -> _Ref:
        """The part of an array that the program that runs is given."""
        places = np.arange(array.size, dtype=np.int32).reshape(array.shape)
        index = self.closed(block.index_map_jaxpr, [jnp.int32(i) for i in self.ids])
        for axis, (size, at) in reversed(
            list(enumerate(zip(block.block_shape, index, strict=True)))
        ):
            length = getattr(size, "block_size", size)
            if type(size).__name__ == "Squeezed" or length is None:
                places = places.take(int(at), axis=axis)
            else:
                start = int(at) * int(length)
                places = places.take(np.arange(start, start + int(length)), axis=axis)
        return _Ref(array.reshape(-1), places)

    def _program_id(self, equation: Any, operands: list[Any]) -> list[Any]:
        return [jnp.int32(self.ids[equation.params["axis"]])]

    def _num_programs(self, equation: Any, operands: list[Any]) -> list[Any]:
        return [jnp.int32(self.grid[equation.params["axis"]])]

    def _get(self, equation: Any, operands: list[Any]) -> list[Any]:
        ref, *flat = operands
        return [_load(ref, jax.tree.unflatten(equation.params["tree"], flat), None, None)]

    def _masked_load(self, equation: Any, operands: list[Any]) -> list[Any]:
        return [_load(*jax.tree.unflatten(equation.params["args_tree"], operands))]

    def _swap(self, equation: Any, operands: list[Any]) -> list[Any]:
        ref, value, *flat = operands
        return [_store(ref, jax.tree.unflatten(equation.params["tree"], flat), value, None)]

    def _masked_swap(self, equation: Any, operands: list[Any]) -> list[Any]:
        return [_store(*jax.tree.unflatten(equation.params["args_tree"], operands))]

    def _cond(self, equation: Any, operands: list[Any]) -> list[Any]:
        number, *rest = operands
        branches = equation.params["branches"]
        return self.closed(branches[min(max(int(number), 0), len(branches) - 1)], rest)

    def _while(self, equation: Any, operands: list[Any]) -> list[Any]:
        params = equation.params
        tests, consts = params["cond_nconsts"], params["body_nconsts"]
        for_test, for_body = operands[:tests], operands[tests : tests + consts]
        state = operands[tests + consts :]
        while bool(self.closed(params["cond_jaxpr"], [*for_test, *state])[0]):
            state = self.closed(params["body_jaxpr"], [*for_body, *state])
        return state

    def _scan(self, equation: Any, operands: list[Any]) -> list[Any]:
        params = equation.params
        if "ft_in" in params:  # JAX 0.12
            consts, carried, _ = (len(group) for group in params["ft_in"].unpack())
        else:
            consts, carried = params["num_consts"], params["num_carry"]
        if len(operands) > consts + carried:
            raise NotImplementedError("scan: expected a loop without arrays to go through")
        state = operands[consts:]
        for _ in range(params["length"]):
            state = self.closed(params["jaxpr"], [*operands[:consts], *state])
        return state


def _places(ref: _Ref, indexers: Sequence[Any]) -> np.ndarray:
    """Of what an indexer names: whole numbers and arrays of them come first, then slices."""
    if not indexers:
        return ref.places
    (indexer,) = indexers
    slices = [i for i in indexer.indices if hasattr(i, "size") and hasattr(i, "stride")]
    lead = np.broadcast_shapes(
        *(np.shape(i) for i in indexer.indices if not any(i is s for s in slices))
    )
    index, seen = [], 0
    for i in indexer.indices:
        if any(i is s for s in slices):
            seen += 1
            along = int(i.start) + int(i.stride) * np.arange(i.size)
            index.append(along.reshape(along.shape + (1,) * (len(slices) - seen)))
        else:
            index.append(np.asarray(i).reshape(np.shape(i) + (1,) * len(slices)))
    shape = (*lead, *(s.size for s in slices))
    return np.broadcast_to(ref.places[tuple(index)], shape)


def _load(ref: _Ref, indexers: Sequence[Any], mask: Any, other: Any) -> jax.Array:
    places = _places(ref, indexers)
    if mask is None:
        ref.read.update(places.reshape(-1).tolist())
        return jnp.asarray(ref.data[places])
    mask = np.broadcast_to(np.asarray(mask), places.shape)
    ref.read.update(places[mask].tolist())
    rest = np.zeros((), ref.data.dtype) if other is None else np.asarray(other)
    return jnp.asarray(np.where(mask, ref.data[np.where(mask, places, 0)], rest))


def _store(ref: _Ref, indexers: Sequence[Any], value: Any, mask: Any) -> jax.Array:
    places = _places(ref, indexers)
    touched = places if mask is None else places[np.broadcast_to(np.asarray(mask), places.shape)]
    ref.written.update(touched.reshape(-1).tolist())
    return jnp.asarray(np.zeros(places.shape, ref.data.dtype))
