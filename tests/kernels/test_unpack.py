"""The PTX that unpacks codes, in an emulator, over all byte values."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from kvcompress_jax.kernels.decode_attention.unpack import (
    FINE_HIGH_PTX,
    FINE_LOW_PTX,
    HIGH_PTX,
    LOW_PTX,
    unpack,
    unpack_fine,
)


def run_ptx(code, *inputs):
    """The f16 in $0 and $1 after the code ran with $2 and on set to u32[n] arrays."""
    registers = {f"${2 + i}": x.astype(np.uint64) for i, x in enumerate(inputs)}

    def value(name):
        return registers[name] if name in registers else np.uint64(int(name, 0))

    for line in re.sub(r"[{}\n]", " ", code).split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, rest = line.split(maxsplit=1)
        target, *names = (x.strip() for x in rest.split(","))
        a = [value(x) for x in names]
        match op:
            case "mov.b32":
                result = a[0]
            case "shl.b32":
                result = a[0] << a[1]
            case "shr.u32":
                result = a[0] >> a[1]
            case "prmt.b32":
                pool = [a[i // 4] >> np.uint64(8 * (i % 4)) & np.uint64(255) for i in range(8)]
                picks = [int(a[2]) >> (4 * i) & 15 for i in range(4)]
                assert max(picks) < 8  # no sign replication
                result = sum(pool[p] << np.uint64(8 * i) for i, p in enumerate(picks))
            case "lop3.b32":
                table, result = int(a[3]), np.uint64(0)
                for i in range(8):
                    bits = [x if i >> (2 - k) & 1 else ~x for k, x in enumerate(a[:3])]
                    if table >> i & 1:
                        result |= bits[0] & bits[1] & bits[2]
            case _:
                raise AssertionError(op)
        registers[target] = np.asarray(result) & np.uint64(0xFFFFFFFF)
    words = (np.broadcast_to(registers[f"${i}"], inputs[0].shape) for i in range(2))
    pairs = [w.astype(np.uint32).view(np.float16).reshape(-1, 2) for w in words]
    return np.concatenate(pairs, axis=1).ravel()


EVERY_PAIR = np.random.default_rng(0).permutation(256 * 256)  # neighbours differ
BASE, FINE = (EVERY_PAIR // 256).astype(np.uint8), (EVERY_PAIR % 256).astype(np.uint8)


def wanted(base, fine):
    if fine is None:
        return 1024.0 + (base & 15), 64.0 + (base >> 4)
    base, fine = base.astype(int), fine.astype(int)
    return 1024.0 + 16 * (base & 15) + (fine & 15), 1024.0 + 16 * (base >> 4) + (fine >> 4)


@pytest.mark.parametrize("refined", [False, True])
def test_every_byte(refined):
    planes = (BASE, FINE) if refined else (BASE,)
    codes = (FINE_LOW_PTX, FINE_HIGH_PTX) if refined else (LOW_PTX, HIGH_PTX)
    want = wanted(BASE, FINE if refined else None)
    words = [x.view(np.uint32) for x in planes]
    assert np.array_equal([run_ptx(code, *words) for code in codes], want)
    portable = unpack_fine if refined else unpack
    assert np.array_equal(portable(*(jnp.asarray(x) for x in planes), interpret=True), want)
    for code, right in zip(codes, want, strict=True):  # another byte order or mask shows
        for old, new in (("0x4140", "0x4041"), ("0F", "0E"), ("F0", "E0")):
            broken = run_ptx(code.replace(old, new), *words)
            assert (old in code) == (not np.array_equal(broken, right))
