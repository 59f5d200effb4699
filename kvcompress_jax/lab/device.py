"""Whether this machine has the device that a command needs."""

import jax


class DeviceError(Exception):
    """The command needs a device that this machine does not have."""


def require_gpu(what: str) -> str:
    """The kind of the GPU at hand, as JAX names it.

    Args:
      what: needs it, for the message.

    Raises:
      DeviceError: there is none.
    """
    if jax.default_backend() not in ("gpu", "cuda"):
        raise DeviceError(f"{what} needs a GPU, and JAX has only {jax.default_backend()} here")
    return jax.devices()[0].device_kind
