"""How many bytes page files take on disk, with and without entropy coding, and how fast they are.

    .venv/bin/python benchmarks/page_files.py FILE...

Sealed pages of SmolLM2 on each text, half of the tokens of a page refined; a file for each page.
Every page is decoded and compared, bit for bit, before anything is timed. Times are of one thread
and in memory, medians over the pages: what the disk adds is the disk's business.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.lab.texts import load_text
from kvcompress_jax.models.load import Model, load_model
from kvcompress_jax.models.runner import make_runner
from kvcompress_jax.paged.transfer import PageIds, export_pages
from kvcompress_jax.storage.page_file import PageRecord, decode_page, encode_page, read_header

LEVELS: tuple[int | None, ...] = (None, 1, 3, 9)


def sealed_pages(model: Model, text: str, tokens: int) -> list[dict[str, np.ndarray]]:
    """The planes of all sealed pages of a text, page by page."""
    config = CompressionConfig()
    runner = make_runner(model, config, tokens=tokens, max_sequences=1)
    assert model.tokenizer is not None
    sequence = runner.manager.add()
    runner.extend(sequence, model.tokenizer.encode(text)[:tokens])
    runner.advance()
    pages = [p for p in runner.manager.pages.values() if p.level == 1]
    none = np.zeros(0, np.int32)
    ids = PageIds(
        raw=none,
        sealed=np.array([p.sealed for p in pages], np.int32),
        chunks=np.array([p.chunks for p in pages], np.int32),
        sink=np.array([p.sink for p in pages], np.int32),
    )
    _, image = jax.device_get(export_pages(runner.cache, ids))
    planes = {
        "base": image.base,
        "fine": image.fine,
        "order": image.order,
        "key_step": image.key_scale.step,
        "key_zero": image.key_scale.zero,
        "value_step": image.value_scale.step,
        "value_zero": image.value_scale.zero,
    }
    return [{name: x[i] for name, x in planes.items()} for i in range(len(pages))]


def measure(pages: list[dict[str, np.ndarray]], level: int | None) -> dict[str, float]:
    """Stored share of each plane and of all, and MB of planes per second, coding and decoding."""
    stored: dict[str, int] = {}
    encode, decode = [], []
    size = sum(x.nbytes for x in pages[0].values())
    for i, planes in enumerate(pages):
        page = PageRecord(key=b"%d" % i, model="m", codec="c", level=1, planes=planes)
        start = time.perf_counter()
        data = b"".join(encode_page(page, compression=level))
        encode.append(time.perf_counter() - start)
        start = time.perf_counter()
        back = decode_page(data)
        decode.append(time.perf_counter() - start)
        for name, x in planes.items():
            assert back.planes[name].tobytes() == x.tobytes(), name
        for info in read_header(data, file_bytes=len(data)).planes:
            stored[info.name] = stored.get(info.name, 0) + info.stored_bytes
        stored["all"] = stored.get("all", 0) + len(data)
    total = {name: sum(p[name].nbytes for p in pages) for name in pages[0]} | {
        "all": size * len(pages)
    }
    return {name: stored[name] / total[name] for name in total} | {
        "encode": size / statistics.median(encode) / 1e6,
        "decode": size / statistics.median(decode) / 1e6,
    }


def main() -> None:
    """Prints a table for each text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    model = load_model(args.model)
    for path in args.text:
        pages = sealed_pages(model, load_text(path), args.tokens)
        size = sum(x.nbytes for x in pages[0].values())
        table = Table(title=f"{path.name}: {len(pages)} pages of {size:,} bytes")
        table.add_column("zstandard")
        columns = [*pages[0], "all"]
        for column in (*columns, "coding", "decoding"):
            table.add_column(column, justify="right")
        for level in LEVELS:
            result = measure(pages, level)
            table.add_row(
                "none" if level is None else str(level),
                *(f"{result[c]:.1%}" for c in columns),
                *(f"{result[c]:,.0f} MB/s" for c in ("encode", "decode")),
            )
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
