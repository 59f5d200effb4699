"""Keys and values of a page to rows of bytes and back, in a basis fitted to the model.

A key is taken back to where it was before RoPE, its mean is removed, and it is expressed in the
calibrated basis, in which an error of the same size has the same effect on the attention output
whatever its direction. Every component has its own number of bits and its own step; what differs
from token to token is one scale. A value is rotated by a Hadamard matrix and coded with one step
and zero point per token. A few tokens of each page get 8 bits per component on top, for what the
others left over: those that gain most, by attention times the error that it takes away.

The decoder is linear in the bits: `key = scale * (bits @ M + offset) + mean`, so it needs no
unpacking into codes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from kvcompress_jax.calibrated.row import RowLayout
from kvcompress_jax.codec.bits import pack_bits, unpack_bits
from kvcompress_jax.codec.hadamard import hadamard_matrix

PER_OCTAVE = 8  # codes of a scale per factor of 2: 9 % from one to the next, 16 octaves each way
ZERO_PER_STEP = 8  # codes of a value's zero point per step
MAX_ZERO = 15.875  # steps from zero to the middle of a token's range: 127 codes
LARGEST = 2.0**80  # sums of squares of larger values overflow float32 on the way
SMALLEST = 2.0**-100  # keeps logarithms of zeros finite
# A narrow code is better off when its ends are clipped: measured on keys' and values' KL.
VALUE_CLIP = {2: 0.85, 3: 0.95}
ATTENTION_POWER = 0.5  # of a token's attention in the choice of what to refine (measured)
ATTENTION_FLOOR = 1e-6  # tokens without any attention are told apart by their error

_einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CalibratedCode:
    """What was fitted to a model; all layers along the first axis, or one layer without it.

    Invariants: `encode` and `decode` are inverse to each other; `step` is 0 for components without
    bits; bit b of a row is bit `bit_shift[b]` of component `bit_component[b]`, and is 0 for shifts
    of 31 (padding).
    """

    frequencies: jax.Array  # f32[layers, dim/2] of RoPE, angle per position
    mean: jax.Array  # f32[layers, heads, dim] of keys before RoPE
    encode: jax.Array  # f32[layers, heads, dim, components]
    decode: jax.Array  # f32[layers, heads, components, dim]
    step: jax.Array  # f32[layers, heads, components], for tokens of scale 1
    scale: jax.Array  # f32[layers, heads, components], typical size, more than 0
    levels: jax.Array  # f32[layers, heads, components], 2 ** bits
    bit_component: jax.Array  # i32[layers, heads, 8 * key_bytes]
    bit_shift: jax.Array  # i32[layers, heads, 8 * key_bytes]
    value_unit: jax.Array  # f32[layers, heads], a typical step of values

    def at(self, layer: jax.Array | int) -> "CalibratedCode":
        """The code of one layer."""
        return jax.tree.map(lambda x: x[layer], self)

    @property
    def nbytes(self) -> int:
        """Device bytes: once per model, whatever the size of the cache."""
        return sum(x.nbytes for x in jax.tree.leaves(self))


def encode_rows(
    keys: jax.Array,
    values: jax.Array,
    attention: jax.Array,
    exact: jax.Array,
    first_position: jax.Array,
    code: CalibratedCode,
    rows: RowLayout,
) -> tuple[jax.Array, jax.Array]:
    """Codes a full page of one layer.

    Args:
      keys: floating [heads, page_size, dim], after RoPE, at most LARGEST in size.
      values: like keys.
      attention: f32[heads, page_size], mean attention that each token received.
      exact: bool[page_size]: tokens that are kept exactly elsewhere; they are not refined.
      first_position: i32[], of the page's first token.
      code: of this layer.
      rows: sizes.

    Returns:
      u8[heads, page_size, row_bytes], and u8[heads, refined_tokens, 2, refined_bytes].
    """
    dim, page_size = keys.shape[-1], keys.shape[-2]
    z, turned = _components(keys, values, first_position, code)
    key_bits, key_scale, key_left = _encode_keys(z, code)
    value_bits, value_scale, value_left = _encode_values(turned, code, rows)
    weight = jnp.maximum(attention, ATTENTION_FLOOR) ** ATTENTION_POWER
    count = rows.refined_tokens(page_size)

    def refine(x: jax.Array) -> jax.Array:
        record, error = _refined(x)
        gain = weight * (jnp.linalg.norm(x, axis=-1) - error)
        gain = jnp.where(exact[None, :], -jnp.inf, gain)
        _, token = lax.top_k(gain, count)  # [heads, count]
        chosen = jnp.take_along_axis(record, token[..., None], axis=1)
        return jnp.concatenate([token[..., None].astype(jnp.uint8), chosen], axis=-1)

    refined = jnp.stack([refine(key_left), refine(value_left)], axis=-2)
    padding = 8 * rows.value_bytes(dim) - value_bits.shape[-1]
    value_bits = jnp.pad(value_bits, ((0, 0), (0, 0), (0, padding)))
    row = jnp.concatenate([pack_bits(key_bits), pack_bits(value_bits), key_scale, value_scale], -1)
    return row, refined


def decode_rows(
    row: jax.Array,
    refined: jax.Array,
    first_position: jax.Array,
    code: CalibratedCode,
    rows: RowLayout,
) -> tuple[jax.Array, jax.Array]:
    """Keys, after RoPE, and values of a page of one layer; `jax.vmap` it for several.

    Args:
      row: u8[heads, page_size, row_bytes].
      refined: u8[heads, refined_tokens, 2, refined_bytes].
      first_position: i32[], of the page's first token.
      code: of this layer.
      rows: sizes.

    Returns:
      keys and values, f32[heads, page_size, dim].
    """
    dim, page_size = code.mean.shape[-1], row.shape[-2]
    ends = [rows.key_bytes, rows.key_bytes + rows.value_bytes(dim)]
    key_part, value_part, scales = jnp.split(row, ends, axis=-1)
    scales = scales.astype(jnp.float32)

    key_matrix = code.decode * code.step[..., None]  # [heads, components, dim]
    of_bit = jnp.take_along_axis(key_matrix, code.bit_component[..., None], axis=-2)
    place = jnp.where(code.bit_shift < 31, 2.0 ** code.bit_shift.astype(jnp.float32), 0.0)
    of_bit = of_bit * place[..., None]
    offset = -_einsum("hc,hcd->hd", (code.levels - 1) / 2, key_matrix)
    keys = _einsum("htb,hbd->htd", unpack_bits(key_part).astype(jnp.float32), of_bit)
    keys = (keys + offset[:, None]) * _scale(scales[..., 0])[..., None]

    bits = unpack_bits(value_part)[..., : dim * rows.value_bits].astype(jnp.float32)
    back = jnp.asarray(hadamard_matrix(dim).T, jnp.float32)
    of_bit = jnp.repeat(back, rows.value_bits, axis=0)
    place = jnp.tile(2.0 ** jnp.arange(rows.value_bits, dtype=jnp.float32), dim)
    values = _einsum("htb,bd->htd", bits, of_bit * place[:, None])
    step = _scale(scales[..., 1]) * code.value_unit[:, None]
    middle = (scales[..., 2] - 128) / ZERO_PER_STEP - (2**rows.value_bits - 1) / 2
    values = (values + middle[..., None] * jnp.sum(back, axis=0).reshape(1, 1, -1)) * step[
        ..., None
    ]

    key_token, more_keys = _unrefine(refined[..., 0, :])
    more_keys = _einsum("hnc,hcd->hnd", more_keys, code.decode)
    keys = _add(keys, key_token, more_keys) + code.mean[:, None]
    value_token, more_values = _unrefine(refined[..., 1, :])
    more_values = _einsum("hnc,cd->hnd", more_values, back)
    values = _add(values, value_token, more_values)

    position = first_position + jnp.arange(page_size, dtype=jnp.int32)
    return turn(keys, position, code.frequencies), values


def turn(x: jax.Array, position: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotates [heads, tokens, dim] by RoPE at positions i32[tokens]; back, with negative ones."""
    angle = position.astype(jnp.float32)[None, :, None] * frequencies[None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def before_rope(keys: jax.Array, position: jax.Array, code: CalibratedCode) -> jax.Array:
    """Keys f32[heads, tokens, dim] of positions i32[tokens], taken back to where they were."""
    return turn(keys, -position, code.frequencies)


def _components(
    keys: jax.Array, values: jax.Array, first_position: jax.Array, code: CalibratedCode
) -> tuple[jax.Array, jax.Array]:
    """f32[heads, page_size, components] of keys, and rotated values."""
    position = first_position + jnp.arange(keys.shape[-2], dtype=jnp.int32)
    before = before_rope(keys.astype(jnp.float32), position, code)
    z = _einsum("htd,hdc->htc", before - code.mean[:, None], code.encode)
    turn = jnp.asarray(hadamard_matrix(values.shape[-1]), jnp.float32)
    return z, _einsum("htd,dc->htc", values.astype(jnp.float32), turn)


def _encode_keys(z: jax.Array, code: CalibratedCode) -> tuple[jax.Array, jax.Array, jax.Array]:
    """u8 bits [heads, tokens, 8 * key_bytes], u8 scale [heads, tokens, 1], and what they leave over
    of every component, f32."""
    scale_code = _key_scale_codes(z, code)
    step = code.step[:, None] * _scale(scale_code.astype(jnp.float32))[..., None]
    levels = code.levels[:, None]
    position = jnp.floor(z / jnp.where(step > 0, step, 1.0) + levels / 2)
    position = jnp.clip(position, 0.0, levels - 1)
    left = z - (position - (levels - 1) / 2) * step
    codes = jnp.take_along_axis(position.astype(jnp.int32), code.bit_component[:, None], axis=-1)
    bits = (codes >> code.bit_shift[:, None]) & 1
    return bits.astype(jnp.uint8), scale_code[..., None], left


def _key_scale_codes(z: jax.Array, code: CalibratedCode) -> jax.Array:
    """u8[heads, tokens], of components f32[heads, tokens, components]."""
    coded = code.step > 0
    count = jnp.maximum(jnp.sum(coded, axis=-1), 1).astype(jnp.float32)
    # In units of the scale before squaring, and of the largest of them: no overflow.
    relative = jnp.abs(z * jnp.where(coded, 1 / code.scale, 0.0)[:, None])
    largest = jnp.maximum(jnp.max(relative, axis=-1, keepdims=True), SMALLEST)
    mean = jnp.sum((relative / largest) ** 2, axis=-1) / count[:, None]
    return _scale_code(jnp.sqrt(mean) * largest[..., 0])


def key_scales(z: jax.Array, code: CalibratedCode) -> jax.Array:
    """f32[heads, tokens]: the scales of keys, as a byte says them."""
    return _scale(_key_scale_codes(z, code).astype(jnp.float32))


def _encode_values(
    turned: jax.Array, code: CalibratedCode, rows: RowLayout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """u8 bits [heads, tokens, dim * value_bits], u8 step and zero [heads, tokens, 2], and what they
    leave over of every component, f32."""
    top = 2**rows.value_bits - 1
    lo, hi = jnp.min(turned, axis=-1), jnp.max(turned, axis=-1)
    middle = hi / 2 + lo / 2
    extent = (hi / 2 - lo / 2) * VALUE_CLIP.get(rows.value_bits, 1.0)
    wanted = jnp.maximum(2 * (extent / top), jnp.abs(middle) / MAX_ZERO)
    unit = code.value_unit[:, None]
    step_code = _scale_code(wanted / unit)
    step = _scale(step_code.astype(jnp.float32)) * unit
    zero = jnp.clip(jnp.round(middle / step * ZERO_PER_STEP), -128, 127)
    position = turned / step[..., None] - (zero / ZERO_PER_STEP - top / 2)[..., None]
    position = jnp.clip(jnp.round(position), 0, top)
    decoded = (position + (zero / ZERO_PER_STEP - top / 2)[..., None]) * step[..., None]
    left = turned - decoded
    shifts = jnp.arange(rows.value_bits, dtype=jnp.int32)
    bits = (position.astype(jnp.int32)[..., None] >> shifts.reshape(1, 1, 1, -1)) & 1
    bits = bits.reshape(*turned.shape[:-1], -1).astype(jnp.uint8)
    zero_code = (zero + 128).astype(jnp.uint8)
    return bits, jnp.stack([step_code, zero_code], axis=-1), left


def _scale_code(scale: jax.Array) -> jax.Array:
    """u8: the nearest of the scales that a byte can say."""
    octaves = jnp.log2(jnp.maximum(scale, SMALLEST))
    return jnp.clip(jnp.round(octaves * PER_OCTAVE) + 128, 0, 255).astype(jnp.uint8)


def _scale(code: jax.Array) -> jax.Array:
    return jnp.exp2((code - 128) / PER_OCTAVE)


def _refined(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u8[heads, tokens, 2 + components], a step and 8 bits per component of every token; and the
    error that they leave, f32[heads, tokens]."""
    step = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / 127, 2.0**-126)
    bits = lax.bitcast_convert_type(step, jnp.uint32) + jnp.uint32(0xFFFF)  # rounded up
    high = (bits >> jnp.uint32(16)).astype(jnp.uint16)
    step = lax.bitcast_convert_type(high, jnp.bfloat16).astype(jnp.float32)[..., None]
    codes = jnp.clip(jnp.round(x / step), -127, 127)
    left = jnp.linalg.norm(x - codes * step, axis=-1)
    step_bytes = jnp.stack([high & jnp.uint16(255), high >> jnp.uint16(8)], axis=-1)
    code_bytes = lax.bitcast_convert_type(codes.astype(jnp.int8), jnp.uint8)
    return jnp.concatenate([step_bytes.astype(jnp.uint8), code_bytes], axis=-1), left


def _unrefine(refined: jax.Array) -> tuple[jax.Array, jax.Array]:
    """i32[heads, count] tokens, and their f32[heads, count, dim]."""
    low, high = (refined[..., i].astype(jnp.uint16) for i in (1, 2))
    step = lax.bitcast_convert_type(low | (high << jnp.uint16(8)), jnp.bfloat16)
    codes = lax.bitcast_convert_type(refined[..., 3:], jnp.int8).astype(jnp.float32)
    return refined[..., 0].astype(jnp.int32), codes * step.astype(jnp.float32)[..., None]


def _add(x: jax.Array, token: jax.Array, more: jax.Array) -> jax.Array:
    """x [heads, page_size, dim] and `more` [heads, count, dim] of the tokens [heads, count]."""
    place = token[..., None] == jnp.arange(x.shape[1], dtype=jnp.int32)[None, None, :]
    return x + _einsum("hnt,hnd->htd", place.astype(jnp.float32), more)
