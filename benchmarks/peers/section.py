"""What was measured of one workload."""

import dataclasses

from .contract import Shape
from .harness import Refused, Timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Contenders of one shape and number of bits."""

    shape: Shape
    timed: list[Timed]
    refused: list[Refused]
