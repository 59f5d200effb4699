"""What is remembered of the beginning of a prompt, and its name."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from kvcompress_jax.manager.page import Page


@dataclasses.dataclass(slots=True, eq=False)
class Prefix:
    """The state after `length` tokens: the pages of `parent`, `pages`, and raw ones in host memory.

    Invariants: all pages of a prefix are `kept`; a prefix with `children` or `users` stays.
    """

    key: bytes
    parent: Prefix | None
    tenant: str
    length: int
    pages: tuple[Page, ...]  # sealed ones that the parent does not have
    raw_pages: int  # of the window
    children: int = 0
    users: int = 0  # sequences whose longest prefix it is
    uses: int = 1
    value: float = 0.0
    gone: bool = False

    def chain(self) -> list[Prefix]:
        """From the shortest prefix to this one."""
        found: list[Prefix] = []
        link: Prefix | None = self
        while link is not None:
            found.append(link)
            link = link.parent
        return found[::-1]


def root_key(fingerprint: str, tenant: str) -> bytes:
    """32 bytes that stand for a model and a configuration, for one tenant and for no other."""
    salt = hashlib.blake2b(tenant.encode(), digest_size=32).digest()
    return hashlib.blake2b(fingerprint.encode(), key=salt, digest_size=32).digest()


def next_key(key: bytes, tokens: np.ndarray) -> bytes:
    """32 bytes that stand for what `key` stands for, and a step of tokens after it."""
    step = hashlib.blake2b(key, digest_size=32)
    step.update(len(tokens).to_bytes(8, "little"))
    step.update(tokens.tobytes())
    return step.digest()
