"""Page files that were damaged at random or made up with care, fed to the reader.

    python -m tests.storage.fuzz --files 200000 --seed 1

`damaged` changes the bytes of a file: the reader must refuse every one. `forged` makes up files
whose checksums are right: the reader must refuse them or return arrays that are what the header
says, in bounded time and memory.
"""

import argparse
import json
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import xxhash
import zstandard

from kvcompress_jax.storage.errors import PageFileError
from kvcompress_jax.storage.header import DTYPES, MAX_EXPANSION
from kvcompress_jax.storage.page_file import (
    _FIXED,
    MAGIC,
    PREFIX_BYTES,
    VERSION,
    PageRecord,
    decode_page,
    encode_page,
)
from tests.storage.pages import record

SLOWEST_SECONDS = 2.0  # of the processor: a busy machine is no reason
SLACK_BYTES = 1 << 20  # of the interpreter and zstandard, whatever the file
WEIRD = (
    -1,
    0,
    1,
    2**31,
    2**40,
    2**63,
    10**30,
    1.5,
    True,
    None,
    "",
    "0",
    "ff",
    "raw",
    "zstd",
    [],
    {},
)


def originals() -> list[bytes]:
    """Files that are right: with and without compression, and one with hardly anything in it."""
    empty = record(9, tokens_hash=b"", planes={"nothing": np.zeros((0, 3), np.float16)})
    zeros = record(8, planes={"zeros": np.zeros(3000, np.uint8), "bits": np.ones(9, bool)})
    pages = [(record(i), c) for i in range(3) for c in (None, 1)] + [(empty, 3), (zeros, 3)]
    return [b"".join(encode_page(page, compression=c)) for page, c in pages]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with some of its bytes changed, lost, added, moved; never the same bytes."""
    out = bytearray(data)
    while bytes(out) == data:
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            _change(out, data, rng)
    return bytes(out)


def _change(out: bytearray, data: bytes, rng: random.Random) -> None:
    size = len(out)
    if size == 0:
        out += rng.randbytes(rng.randrange(64))
        return
    # Half of the changes hit what steers the reader.
    i = rng.randrange(min(size, PREFIX_BYTES if rng.random() < 0.5 else size))
    n = rng.choice((1, 2, 4, 8, rng.randrange(1, size + 1)))
    kind = rng.randrange(10)
    if kind == 0:
        out[i] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out[i] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 2:
        del out[i:]
    elif kind == 3:
        out += rng.randbytes(n)
    elif kind == 4:
        del out[i : i + n]
    elif kind == 5:
        out[i:i] = rng.randbytes(n)
    elif kind == 6:
        out[i : i + n] = bytes(len(out[i : i + n]))
    elif kind == 7:
        j = rng.randrange(size)
        out[i : i + n] = out[j : j + n]
    elif kind == 8:
        out[i : i + 8] = rng.choice((2**64 - 1, 2**63, 2**32 - 1, 2**31)).to_bytes(8, "little")
    else:
        out[:] = rng.choice((MAGIC, data[:24], data[:PREFIX_BYTES], b"")) + rng.randbytes(n)


def forged(data: bytes, rng: random.Random) -> bytes:
    """A file made up of a right one; its checksums and sizes are those of its bytes."""
    _, _, _, header_bytes, _ = _FIXED.unpack_from(data)
    header = json.loads(data[PREFIX_BYTES : PREFIX_BYTES + header_bytes])
    payload, parts = data[PREFIX_BYTES + header_bytes :], []
    for plane in header["planes"]:
        parts.append(payload[: plane["stored_bytes"]])
        payload = payload[plane["stored_bytes"] :]
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(len(parts)) if parts else 0
        described = isinstance(header["planes"], list) and i < len(header["planes"])
        kind = rng.randrange(8)
        if kind == 0:
            header[rng.choice(list(header))] = rng.choice(WEIRD)
        elif kind == 1 and described:
            plane = header["planes"][i]
            plane[rng.choice(list(plane))] = rng.choice((*WEIRD, *DTYPES))
        elif kind == 2 and described:
            header["planes"][i]["shape"] = [rng.choice(WEIRD[:7]) for _ in range(rng.randrange(5))]
        elif kind == 3 and parts:
            parts[i] = damaged(parts[i], rng)
        elif kind == 4 and parts:  # a frame that grows
            size = rng.choice((10**3, 10**6, 3 * 10**6))
            parts[i] = zstandard.compress(bytes(size), 3)
            if described and isinstance(header["planes"][i], dict):
                header["planes"][i] |= {"encoding": "zstd", "dtype": "uint8", "shape": [size]}
        elif kind == 5 and parts and parts[i][4:12]:  # a frame that says that it grows
            frame = bytearray(zstandard.compress(bytes(300), 1))
            frame[4] |= 0xC0  # eight bytes of content size
            frame[5:5] = (2 ** rng.randrange(20, 63)).to_bytes(8, "little")
            parts[i] = bytes(frame)
        elif kind == 6:
            header["extra" if rng.random() < 0.5 else "key"] = "0" * rng.choice((2, 128, 10**4))
        elif described:
            header["planes"][i]["encoding"] = rng.choice(("raw", "zstd"))
    if isinstance(header.get("planes"), list):
        for plane, part in zip(header["planes"], parts, strict=False):
            if rng.random() < 0.9:
                plane |= {"stored_bytes": len(part), "digest": xxhash.xxh3_128_hexdigest(part)}
    text = json.dumps(header, separators=(",", ":")).encode()
    if rng.random() < 0.02:
        text = rng.choice((b"[" * 60000, b'{"a":' * 10000, b"9" * 60000, b"\xff" * 9, b"", b"NaN"))
    total = PREFIX_BYTES + len(text) + sum(map(len, parts))
    fixed = _FIXED.pack(MAGIC, VERSION, 0, len(text), total)
    return b"".join([fixed, xxhash.xxh3_128_digest(fixed + text), text, *parts])


Reader = Callable[[bytes], PageRecord]


def outcome(data: bytes, read: Reader) -> str:
    """What became of a file: the fault it was refused for, or "accepted".

    Raises:
      AssertionError: it was accepted and is not what its header says.
      Exception: any, which the reader must not let through.
    """
    try:
        page = read(data)
    except PageFileError as e:
        return e.fault
    assert isinstance(page, PageRecord)
    for plane in page.planes.values():
        assert plane.dtype in DTYPES.values() and not plane.flags.writeable
        plane.tobytes()  # every byte is there
    return "accepted"


def run(files: int, seed: int, read: Reader = decode_page) -> Counter[str]:
    """Feeds `files` files, nine damaged ones to each forged one; counts what became of them.

    Raises:
      AssertionError: a damaged file was accepted, or one took too long or too much memory.
    """
    rng = random.Random(seed)
    right = originals()
    outcomes: Counter[str] = Counter()
    for data in right:
        assert outcome(data, read) == "accepted"
    for n in range(files):
        original = rng.choice(right)
        is_forged = n % 10 == 0
        data = (forged if is_forged else damaged)(original, rng)
        if is_forged:
            tracemalloc.start()
        which = f"file {n} of seed {seed}"
        start = time.thread_time()
        result = outcome(data, read)
        seconds = time.thread_time() - start
        assert seconds < SLOWEST_SECONDS, f"{which}: took {seconds:.1f} s"
        if is_forged:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak <= MAX_EXPANSION * len(data) + SLACK_BYTES, f"{which}: took {peak} bytes"
        else:
            assert result != "accepted", f"{which}: accepted"
        outcomes[f"{'forged' if is_forged else 'damaged'}: {result}"] += 1
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    for what, count in sorted(run(args.files, args.seed).items()):
        print(f"{count:>9,} {what}")
    print(f"{args.files:,} files in {time.monotonic() - began:.1f} s, none got through")
