"""Whether this machine has the device that a command needs."""

import jax

from kvcompress_jax.kernels.dispatch import on_gpu


class DeviceError(Exception):
    """The command needs a device that this machine does not have."""


def require_gpu(what: str) -> str:
    """The kind of the GPU at hand, as JAX names it.

    Args:
      what: needs it, for the message.

    Raises:
      DeviceError: there is none.
    """
    if not on_gpu():
        raise DeviceError(f"{what} needs a GPU, and JAX has only {jax.default_backend()} here")
    return jax.devices()[0].device_kind
