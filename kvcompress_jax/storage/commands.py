"""`kvcompress inspect` and `kvcompress scrub`: what they take and what they print."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

BAD = 1  # exit code


def add_commands(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds both commands.

    Args:
      add_parser: of the command line's commands.
    """
    inspect = add_parser("inspect", help="say what a page file holds, and whether it is right")
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.set_defaults(run=run_inspect)
    scrub = add_parser("scrub", help="check every page file of a disk tier's folder")
    scrub.add_argument("folder", type=Path, metavar="DIR")
    scrub.add_argument(
        "--delete",
        action="store_true",
        help="remove pages that nothing can read any more, and unfinished files; the folder must"
        " not be in use",
    )
    scrub.set_defaults(run=run_scrub)
    for each in (inspect, scrub):
        each.add_argument("--json", action="store_true", help="print JSON")
        each.epilog = f"Exit code: 0 when all is right, {BAD} when something is not."


def run_inspect(args: argparse.Namespace) -> int:
    """Prints header and planes of a file; 1 when it is not right."""
    from kvcompress_jax.storage.errors import PageFileError
    from kvcompress_jax.storage.files import Files
    from kvcompress_jax.storage.header import MAX_HEADER_BYTES, PageHeader
    from kvcompress_jax.storage.page_file import PREFIX_BYTES, VERSION, decode_page, read_header

    header: PageHeader | None = None
    size, fault, reason = 0, None, None
    try:
        data, size = Files().read(args.file)
        header = read_header(data[: PREFIX_BYTES + MAX_HEADER_BYTES], file_bytes=size)
        decode_page(data)
    except PageFileError as e:
        fault, reason = e.fault, str(e)
    except OSError as e:
        fault, reason = "unreadable", str(e.strerror)
    found: dict[str, Any] = {"file": str(args.file), "file_bytes": size}
    if header is not None:
        found |= {"version": VERSION, **dataclasses.asdict(header)}
        found |= {n: found[n].hex() for n in ("key", "tokens_hash", "session")}
        found |= {"plane_bytes": header.nbytes}
        for plane, info in zip(found["planes"], header.planes, strict=True):
            plane["bytes"] = info.nbytes
    found |= {"fault": fault, "reason": reason}
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print_page(found)
    return BAD if fault else 0


def _print_page(found: dict[str, Any]) -> None:
    print(f"{found['file']}: {found['file_bytes']:,} bytes")
    if "planes" in found:
        for name in ("version", "model", "codec", "level", "key", "tokens_hash", "session"):
            print(f"  {name + ':':<13}{found[name] if found[name] != '' else '-'}")
        print(f"  planes:      {len(found['planes'])}, {found['plane_bytes']:,} bytes in memory")
        for plane in found["planes"]:
            shape = ", ".join(str(n) for n in plane["shape"])
            stored = f"{plane['stored_bytes']:,} of {plane['bytes']:,} bytes, {plane['encoding']}"
            print(f"    {plane['name']:<18} {plane['dtype']}[{shape}]  {stored}")
    print(f"  {found['fault']}: {found['reason']}" if found["fault"] else "  every byte is right")


def run_scrub(args: argparse.Namespace) -> int:
    """Prints what a folder holds; 1 when a file in it is not right."""
    from kvcompress_jax.storage.scrub import scrub

    report = scrub(args.folder, delete=args.delete)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        print(f"{args.folder}: {report.pages:,} pages are right, {report.page_bytes:,} bytes")
        for origin, count in sorted(report.by_origin.items()):
            print(f"  {count:,} of model and code {origin}")
        for level, count in sorted(report.by_level.items()):
            print(f"  {count:,} at level {level}")
        if report.unfinished:
            print(f"  {report.unfinished:,} unfinished{', deleted' if args.delete else ''}")
        for bad in report.bad:
            print(f"{bad.path}: {bad.fault}{', deleted' if bad.deleted else ''}: {bad.reason}")
    return BAD if report.bad else 0
