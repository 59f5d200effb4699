"""KV-cache compression for JAX serving stacks: paged, embedded codes, attended to as they are."""

__version__ = "0.1.0"
