"""The files of a model that vLLM loads, as our own loader reads them."""

import dataclasses
import functools
from pathlib import Path

from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.load import Outline, read_outline


@dataclasses.dataclass(frozen=True)
class Source:
    """What vLLM loaded, and which part of it this worker has.

    Attributes:
      model: folder, file or name.
      revision: of a name.
      rank: of the worker among `ranks`, which share the KV heads.
      ranks: workers of tensor parallelism.
    """

    model: str
    revision: str | None = None
    rank: int = 0
    ranks: int = 1

    def heads(self, all_heads: int, own: int) -> slice:
        """This worker's KV heads; several workers have the same one where there are too few."""
        first = self.rank * all_heads // self.ranks
        return slice(first, first + own)


def model_path(model: str, revision: str | None) -> Path:
    """Where the files of a model are.

    Args:
      model: folder or file, or a name in the local Hugging Face cache.
      revision: of a name.

    Raises:
      ModelError: they are not on this machine.
    """
    path = Path(model)
    if path.exists():
        return path
    # vLLM has it; it is not needed where models are local.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError) as e:
        raise ModelError(" ".join(str(e).split())) from None


def layer_index(name: str) -> int:
    """Which decoder layer vLLM's name of an attention layer is of: the only number in it, as for
    vLLM itself.

    Raises:
      ModelError: there is not one number.
    """
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise ModelError(f"layer {name}: expected one number in its name, got {numbers}")
    return numbers[0]


@functools.lru_cache(maxsize=4)
def outline(model: str, revision: str | None) -> Outline:
    """Decoder and fingerprint of a model; reads its files once, which tells it from others.

    Raises:
      ModelError: there is no such model, or none that our loader reads.
    """
    return read_outline(model_path(model, revision))
