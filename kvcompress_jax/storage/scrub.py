"""Reads every page of a folder to the last byte and says, or removes, what is not right."""

import contextlib
import dataclasses
import os
from pathlib import Path

from kvcompress_jax.storage.errors import DiskTierError, Fault, PageFileError
from kvcompress_jax.storage.files import Files
from kvcompress_jax.storage.folder import LOCK, SUFFIX, check_name, is_temporary, lock
from kvcompress_jax.storage.page_file import decode_page

# Of files with the suffix of a page: no version of the tier will ever use them. What has its right
# bytes under a wrong name, or is not given by the system, is somebody's business.
WORTHLESS: tuple[Fault, ...] = ("foreign", "version", "truncated", "corrupted")


@dataclasses.dataclass(frozen=True)
class BadFile:
    """A file that is not right."""

    path: str
    fault: Fault
    reason: str
    file_bytes: int
    deleted: bool


@dataclasses.dataclass
class ScrubReport:
    """What a folder holds.

    Attributes:
      pages: that are right to the last bit.
      page_bytes: of their files.
      by_origin: right pages by "model code".
      by_level: right pages by level.
      unfinished: files of writes that never ended, or that go on right now.
      bad: files that are not right, the deleted ones included; what is no page at all by its name
        is listed and never deleted.
    """

    pages: int = 0
    page_bytes: int = 0
    by_origin: dict[str, int] = dataclasses.field(default_factory=dict)
    by_level: dict[int, int] = dataclasses.field(default_factory=dict)
    unfinished: int = 0
    bad: list[BadFile] = dataclasses.field(default_factory=list)


def scrub(folder: Path, *, delete: bool = False, files: Files | None = None) -> ScrubReport:
    """Checks all pages of a folder.

    Args:
      folder: of a disk tier.
      delete: remove the pages that are worth nothing, and unfinished files. The folder must not be
        in use then; without, it may be.
      files: system calls.

    Raises:
      DiskTierError: it is no folder that can be read, or it is in use.
    """
    files = files or Files()
    with contextlib.ExitStack() as stack:
        if delete:
            if not folder.is_dir():  # or the lock would be blamed
                raise DiskTierError(f"{folder}: expected a folder")
            stack.callback(os.close, lock(folder))
        try:
            names = sorted(os.listdir(folder))
        except OSError as e:
            raise DiskTierError(f"{folder}: expected a folder to read: {e.strerror}") from None
        report = ScrubReport()
        for name in names:
            if name != LOCK:
                _look_at(folder / name, report, delete=delete, files=files)
        return report


def _look_at(path: Path, report: ScrubReport, *, delete: bool, files: Files) -> None:
    if is_temporary(path.name):
        report.unfinished += 1
        if delete:
            _delete(path, files)
        return
    size = 0
    try:
        data, size = files.read(path)
        page = decode_page(data)
        check_name(path, page.key)
    except FileNotFoundError:
        return  # the tier that uses the folder deleted it meanwhile
    except (OSError, PageFileError) as e:
        fault: Fault = e.fault if isinstance(e, PageFileError) else "unreadable"
        gone = delete and path.suffix == SUFFIX and fault in WORTHLESS and _delete(path, files)
        reason = str(e) if isinstance(e, PageFileError) else str(e.strerror)
        report.bad.append(BadFile(str(path), fault, reason, size, gone))
    else:
        report.pages += 1
        report.page_bytes += size
        origin = f"{page.model} {page.codec}"
        report.by_origin[origin] = report.by_origin.get(origin, 0) + 1
        report.by_level[page.level] = report.by_level.get(page.level, 0) + 1


def _delete(path: Path, files: Files) -> bool:
    try:
        files.delete(path)
    except OSError:
        return False
    return True
