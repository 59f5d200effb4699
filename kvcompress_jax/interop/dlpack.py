"""The one crossing between PyTorch tensors and JAX arrays: no copy, or an error that says why.

JAX's own import copies in silence where it cannot alias (a misaligned pointer) or where it has no
such type (int64 becomes int32, float64 becomes float32). A cache of gigabytes must not be copied,
and a position must not lose its upper half, so everything is checked here first.

An alias sees what torch writes later. That is what it is for (one alias of a buffer serves every
step), and the hazard of it: JAX computes behind the caller's back. `to_torch` and `write_back`
therefore wait for their array; when it is there, the computation that made it has read its inputs,
and torch may write to them again. On a GPU the two frameworks have a stream each: `fence` makes
torch's writes visible to JAX.
"""

import jax
import jax.numpy as jnp
import torch

# XLA's own buffers on CPUs are aligned to this, and its code counts on it. On GPUs it asks less of
# arguments, and PyTorch aligns to 512.
ALIGNMENT_BYTES = {"cpu": 64, "cuda": 16}

# Types that cross as they are.
DTYPES: dict[torch.dtype, jnp.dtype] = {
    torch.float32: jnp.dtype(jnp.float32),
    torch.float16: jnp.dtype(jnp.float16),
    torch.bfloat16: jnp.dtype(jnp.bfloat16),
    torch.float8_e4m3fn: jnp.dtype(jnp.float8_e4m3fn),
    torch.float8_e5m2: jnp.dtype(jnp.float8_e5m2),
    torch.int8: jnp.dtype(jnp.int8),
    torch.uint8: jnp.dtype(jnp.uint8),
    torch.int16: jnp.dtype(jnp.int16),
    torch.int32: jnp.dtype(jnp.int32),
    torch.uint32: jnp.dtype(jnp.uint32),
    torch.bool: jnp.dtype(jnp.bool),
}


class BridgeError(ValueError):
    """A tensor cannot cross without a copy; the message names it, what was expected, what came."""


def to_jax(tensor: torch.Tensor, name: str) -> jax.Array:
    """An alias of a tensor's memory as a JAX array; it keeps the memory alive.

    Args:
      tensor: contiguous, aligned, of one of `DTYPES`, on the CPU or on a CUDA device.
      name: of the tensor, for errors.

    Raises:
      BridgeError: the tensor could only cross as a copy, or not at all.
    """
    if tensor.requires_grad:
        raise BridgeError(f"{name}: expected no requires_grad, got a tensor with it: detach it")
    if tensor.dtype not in DTYPES:
        raise BridgeError(f"{name}: expected one of {_names(DTYPES)}, got {_name(tensor.dtype)}")
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise BridgeError(f"{name}: expected a plain strided tensor, got {tensor.layout} (or lazy)")
    if not tensor.is_contiguous():
        raise BridgeError(
            f"{name}: expected a contiguous tensor, got shape {list(tensor.shape)} with strides"
            f" {list(tensor.stride())}"
        )
    kind = tensor.device.type
    if kind not in ALIGNMENT_BYTES:
        raise BridgeError(f"{name}: expected a tensor on cpu or cuda, got {tensor.device}")
    if tensor.numel() == 0:  # has no memory to share
        return jnp.zeros(tuple(tensor.shape), DTYPES[tensor.dtype])
    off = tensor.data_ptr() % ALIGNMENT_BYTES[kind]
    if off:
        raise BridgeError(
            f"{name}: expected memory aligned to {ALIGNMENT_BYTES[kind]} bytes, got an address"
            f" {off} past it"
        )
    try:
        array = jax.dlpack.from_dlpack(tensor, copy=False)
    except Exception as e:  # JAX and its runtime raise half a dozen kinds
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise BridgeError(f"{name}: expected a tensor that JAX can alias, got: {reason}") from e
    if array.unsafe_buffer_pointer() != tensor.data_ptr() or array.dtype != DTYPES[tensor.dtype]:
        raise BridgeError(
            f"{name}: expected an alias as {DTYPES[tensor.dtype]}, got a copy as {array.dtype}"
        )
    return array


def to_torch(array: jax.Array, name: str) -> torch.Tensor:
    """A tensor on an array's memory, once the array has been computed. Not to be written to: JAX
    takes its arrays to be immutable.

    Args:
      array: on one device, of one of `DTYPES`.
      name: of the array, for errors.

    Raises:
      BridgeError: the array could only cross as a copy, or not at all.
    """
    if isinstance(array, jax.core.Tracer):
        raise BridgeError(f"{name}: expected an array, got a tracer: to_torch does not run in jit")
    if array.dtype not in DTYPES.values():
        raise BridgeError(f"{name}: expected one of {_names(DTYPES)}, got {array.dtype}")
    if len(array.devices()) != 1:
        raise BridgeError(f"{name}: expected an array on one device, got {len(array.devices())}")
    array.block_until_ready()
    tensor = torch.from_dlpack(array)
    if tensor.numel() and tensor.data_ptr() != array.unsafe_buffer_pointer():
        raise BridgeError(f"{name}: expected a view of JAX's memory, got a copy")
    return tensor


def write_back(
    target: torch.Tensor, array: jax.Array, name: str, *, rows: torch.Tensor | None = None
) -> None:
    """Copies an array into memory that torch owns: the way of a result into a buffer that JAX only
    has an alias of.

    Args:
      target: tensor to write to.
      array: of target's dtype and shape; with `rows`, of as many rows as there are.
      name: of the target, for errors.
      rows: i64[n]: which row of target each row of the array goes to, -1 for nowhere; None: all of
        the array is written to all of target.

    Raises:
      BridgeError: dtype, device or shape differ; nothing was written.
    """
    source = to_torch(array, name)
    expected = tuple(target.shape) if rows is None else (rows.shape[0], *target.shape[1:])
    if (source.dtype, source.device, tuple(source.shape)) != (
        target.dtype,
        target.device,
        expected,
    ):
        raise BridgeError(
            f"{name}: expected {_name(target.dtype)}{list(expected)} on {target.device}, got"
            f" {_name(source.dtype)}{list(source.shape)} on {source.device}"
        )
    if rows is None:
        target.copy_(source)
    else:
        written = rows >= 0
        target.index_copy_(0, rows[written], source[written])
    # The source belongs to JAX, which may free it as soon as this returns.
    fence(target.device)


def fence(device: torch.device) -> None:
    """Waits for what torch has queued on a device, so that JAX, on its own stream, sees it. Nothing
    to do on a CPU, where torch computes as it is called."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: dict[torch.dtype, jnp.dtype]) -> str:
    return ", ".join(_name(dtype) for dtype in dtypes)
