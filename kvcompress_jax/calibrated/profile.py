"""The file that holds a calibrated code: one small safetensors file per model and bit rate."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvcompress_jax.calibrated.code import CalibratedCode
from kvcompress_jax.calibrated.row import RowLayout
from kvcompress_jax.config import ConfigError
from kvcompress_jax.models.config import DecoderConfig

FORMAT = "kvcompress-profile-1"


class ProfileError(ConfigError):
    """A profile that cannot be used; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What calibration found for one model; arrays as NumPy.

    Attributes:
      rows: sizes of a token's code.
      fingerprint: of the model (`kvcompress_jax.models.load.Model.fingerprint`).
      mean: f32[layers, heads, dim], of keys before RoPE.
      decode: f32[layers, heads, components, dim], the basis.
      scale: f32[layers, heads, components], typical size.
      step: f32[layers, heads, components], for tokens of scale 1; 0 without bits.
      widths: u8[layers, heads, components], bits.
      value_unit: f32[layers, heads], a typical step of values.
      about: what it was made from: model, texts, tokens, bits.
    """

    rows: RowLayout
    fingerprint: str
    mean: np.ndarray
    decode: np.ndarray
    scale: np.ndarray
    step: np.ndarray
    widths: np.ndarray
    value_unit: np.ndarray
    about: dict[str, str]

    def code(self, frequencies: jax.Array) -> CalibratedCode:
        """The code on the device.

        Args:
          frequencies: f32[layers, dim/2], of the model's RoPE (`layer_frequencies`).
        """
        component, shift = _bit_tables(self.widths, 8 * self.rows.key_bytes)
        return CalibratedCode(
            frequencies=frequencies,
            mean=jnp.asarray(self.mean, jnp.float32),
            encode=jnp.asarray(np.linalg.inv(self.decode.astype(np.float64)), jnp.float32),
            decode=jnp.asarray(self.decode, jnp.float32),
            step=jnp.asarray(self.step, jnp.float32),
            scale=jnp.asarray(self.scale, jnp.float32),
            levels=jnp.asarray(2.0**self.widths, jnp.float32),
            bit_component=jnp.asarray(component),
            bit_shift=jnp.asarray(shift),
            value_unit=jnp.asarray(self.value_unit, jnp.float32),
        )


_ARRAYS = ("mean", "decode", "scale", "step", "widths", "value_unit")


def save_profile(path: str | Path, profile: Profile) -> None:
    """Writes a profile: all of it, or nothing.

    Raises:
      ProfileError: the file cannot be written.
    """
    path = Path(path)
    about = dict(profile.about)
    about |= {
        "format": FORMAT,
        "fingerprint": profile.fingerprint,
        "rows": json.dumps(dataclasses.asdict(profile.rows)),
    }
    arrays = {name: np.ascontiguousarray(getattr(profile, name)) for name in _ARRAYS}
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        os.close(handle)
        try:
            save_file(arrays, temporary, metadata=about)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, SafetensorError) as e:
        raise ProfileError(f"{path}: not writable ({e})") from None


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a profile was made for: the model's fingerprint, the bits that were asked for, and the
    sizes of the rows that came of it."""

    fingerprint: str
    bits: float
    rows: RowLayout


def read_origin(path: str | Path) -> Origin:
    """Reads the head of a profile.

    Raises:
      ProfileError: the file is missing, or no profile.
    """
    about = _read(path, ())[0]
    try:
        rows = RowLayout(**json.loads(about["rows"]))
        return Origin(about["fingerprint"], bits=float(about["bits"]), rows=rows)
    except (KeyError, TypeError, ValueError) as e:
        raise ProfileError(f"{path}: expected a profile of `kvcompress calibrate`: {e}") from None


def _read(path: str | Path, names: Sequence[str]) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata, and the arrays named."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ProfileError(f"{path}: expected {FORMAT}, got {about.get('format')}")
            return about, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as e:
        raise ProfileError(f"{path}: expected a profile of `kvcompress calibrate`: {e}") from None


def load_profile(path: str | Path, config: DecoderConfig, fingerprint: str) -> Profile:
    """Reads a profile and checks that it was made for this model.

    Args:
      path: of the file.
      config: of the model's decoder.
      fingerprint: of the model.

    Raises:
      ProfileError: the file is missing, damaged, or of another model.
    """
    about, arrays = _read(path, _ARRAYS)
    try:
        rows = RowLayout(**json.loads(about.pop("rows")))
        made_for = about.pop("fingerprint")
    except (KeyError, TypeError, ValueError) as e:
        raise ProfileError(f"{path}: expected a profile of `kvcompress calibrate`: {e}") from None
    if made_for != fingerprint:
        raise ProfileError(
            f"{path}: expected a profile of this model ({fingerprint[:12]}), got one of"
            f" {about.get('model', 'another')} ({made_for[:12]})"
        )
    heads = (config.num_layers, config.num_kv_heads)
    per_channel = (*heads, config.head_dim)
    expected: dict[str, tuple[int, ...]] = {
        name: per_channel for name in ("mean", "scale", "step", "widths")
    }
    expected |= {"decode": (*per_channel, config.head_dim), "value_unit": heads}
    for name, shape in expected.items():
        if arrays[name].shape != shape or not np.all(np.isfinite(arrays[name])):
            raise ProfileError(
                f"{path}: {name}: expected finite {list(shape)}, got {list(arrays[name].shape)}"
            )
    if np.any(arrays["widths"].sum(-1, dtype=int) > 8 * rows.key_bytes):
        raise ProfileError(f"{path}: widths: expected at most {8 * rows.key_bytes} bits a token")
    return Profile(rows=rows, fingerprint=made_for, about=about, **arrays)


def _bit_tables(widths: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """i32[layers, heads, bits]: component and shift of every bit of a row; padding shifts by 31."""
    component = np.zeros((*widths.shape[:2], bits), np.int32)
    shift = np.full_like(component, 31)
    for at in np.ndindex(*widths.shape[:2]):
        width = widths[at].astype(int)
        total = int(width.sum())
        component[at][:total] = np.repeat(np.arange(len(width)), width)
        shift[at][:total] = np.concatenate([np.arange(w) for w in width])
    return component, shift
