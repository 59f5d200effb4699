"""What is to be sealed."""

import dataclasses

import jax

from kvcompress_jax.paged.host_arrays import HostArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sealing:
    """Pages to seal; the first `count` entries are real, the rest is padding."""

    raw: HostArray  # i32[n] raw page, full
    page: HostArray  # i32[n] sealed page to write
    chunks: HostArray  # i32[n, layers] fine chunk of each layer, -1: that layer goes to level 2
    first: HostArray  # i32[n] position of the page's first token
    sink: HostArray  # i32[n] slot for the exact first tokens, -1: not the first page of a sequence
    count: HostArray  # i32[]
    shadow: HostArray | None = None  # i32[n] where telemetry keeps the raw page, -1: nowhere
