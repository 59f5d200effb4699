"""The heat of pages, from the device to where decisions are made, without waiting for it."""

import jax
import numpy as np

from kvcompress_jax.manager.device import Device
from kvcompress_jax.manager.level_control import LevelControl
from kvcompress_jax.paged.cache import PagedCache

EVERY = 16  # steps from one look to the next


class HeatReader:
    """Copies heat off the device every some steps and hands it on at the next look: by then the
    copy ended long ago, and which step sees which heat does not depend on how fast it was."""

    def __init__(self, device: Device, control: LevelControl) -> None:
        self._device = device
        self._control = control
        self._steps = 0
        self._coming: jax.Array | np.ndarray | None = None

    def step(self, cache: PagedCache) -> None:
        """Call it once a step."""
        store, config = self._control.store, self._control.config
        if not config.tracks_attention or config.sealed_level == 3:
            return
        self._steps += 1
        if self._steps % EVERY:
            return
        if self._coming is not None:
            self._control.report_heat(np.asarray(self._coming), ~store.fresh)
        self._coming = self._device.heat(cache)
        store.fresh[:] = False
