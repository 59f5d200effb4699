"""Kernels for GPUs and CPUs, installed as `kvcompress_jax.kernels`; they import nothing else of the
package."""

if __name__ == "kernels":
    raise ImportError(
        "kernels: expected to be imported as kvcompress_jax.kernels, got the top-level name, which"
        " belongs to another package; run from outside the checkout or install kvcompress-jax"
    )
