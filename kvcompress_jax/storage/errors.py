"""What can be wrong with files of pages."""

from typing import Literal

Fault = Literal["foreign", "version", "truncated", "corrupted", "misnamed", "unreadable"]


class PageFileError(ValueError):
    """Bytes that are not a page that this version reads.

    Attributes:
      fault: "foreign": no page file, or one of another model or code; "version": of another version
        of the format; "truncated": its end is missing; "corrupted": anything else that is wrong
        with its bytes; "misnamed": a page under the name of another one; "unreadable": the system
        does not give its bytes.
    """

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault: Fault = fault


class DiskTierError(RuntimeError):
    """A folder that a disk tier cannot use."""
