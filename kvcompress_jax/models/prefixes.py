"""Tokens that are kept in the cache for requests to continue."""

import dataclasses

from kvcompress_jax.models.request import NO_SEQUENCE
from kvcompress_jax.models.runner import Runner


@dataclasses.dataclass
class _Held:
    tokens: list[int]
    tenant: str
    sequence: int  # that holds them; NO_SEQUENCE: it was lost


class HeldPrefixes:
    """Prefixes by the id that their holder knows, which stays the same when the cache is lost."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._held: dict[int, _Held] = {}

    def hold(self, tokens: list[int], tenant: str) -> int:
        """Reads tokens into the cache; returns the id of the prefix."""
        sequence = self._read(tokens, tenant)
        self._held[sequence] = _Held(list(tokens), tenant, sequence)
        return sequence

    def release(self, prefix: int) -> None:
        """Ends a prefix; ValueError if there is none."""
        if prefix not in self._held:
            raise ValueError(f"prefix: expected one of hold_prefix, got {prefix}")
        sequence = self._held.pop(prefix).sequence
        if sequence in self._runner.manager.sequences:
            self._runner.manager.free(sequence)

    def sequence_of(self, prefix: int) -> int:
        """The sequence that a prefix is now; one that is not held here is a sequence itself."""
        return self._held[prefix].sequence if prefix in self._held else prefix

    def tenant_of(self, prefix: int) -> str:
        """Whose a prefix is; ValueError if there is none."""
        if prefix in self._held:
            return self._held[prefix].tenant
        if prefix not in self._runner.manager.sequences:
            raise ValueError(f"prefix: expected a live sequence, got {prefix}")
        return self._runner.manager.sequences[prefix].tenant

    def lose(self) -> None:
        """The cache was lost; those that were freed behind our back are gone for good."""
        live = {NO_SEQUENCE, *self._runner.manager.sequences}
        self._held = {p: h for p, h in self._held.items() if h.sequence in live}
        for held in self._held.values():
            held.sequence = NO_SEQUENCE

    def restore(self) -> None:
        """Reads what was lost."""
        for held in self._held.values():
            if held.sequence == NO_SEQUENCE:
                held.sequence = self._read(held.tokens, held.tenant)

    def _read(self, tokens: list[int], tenant: str) -> int:
        sequence = self._runner.manager.add(tenant)
        try:
            self._runner.extend(sequence, tokens)
            self._runner.advance()
        except BaseException:
            self._runner.manager.free(sequence)
            raise
        return sequence
