"""The quality gate at the start of vLLM, which loads its models itself."""

import functools
import logging
from pathlib import Path

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.models.errors import ModelError
from kvcompress_jax.models.load import model_fingerprint
from kvcompress_jax.quality import QualityError, admit

logger = logging.getLogger(__name__)


def check(config: CompressionConfig, model: str, *, revision: str | None = None) -> None:
    """Refuses a configuration whose bound the model does not keep, or was never seen to keep.

    The model's files are read once, to tell whether it is the one that was measured.

    Args:
      config: with or without a bound; without one nothing is read.
      model: folder or file, or a name in the local Hugging Face cache.
      revision: of a name.

    Raises:
      QualityError: see above, or the model's files cannot be read, or what was measured was
        measured with keys that are not rounded as here. With `config.force` that is a warning in
        the log instead.
    """
    if config.bound is None or not config.compresses:
        return
    if config.feeds_errors_back:
        reason = (
            "measured with error feedback, which keys inside vLLM do not have;"
            " `kvcompress tune --for-vllm` measures without"
        )
    else:
        try:
            return admit(config, fingerprint(model, revision))
        except ModelError as e:
            reason = f"{model}: nobody can tell whether it is the model that was measured: {e}"
    if not config.force:
        raise QualityError(f"quality gate: {reason}")
    logger.warning("quality gate, forced: %s", reason)


@functools.lru_cache(maxsize=4)
def fingerprint(model: str, revision: str | None) -> str:
    """The fingerprint of a model that vLLM loads; raises ModelError when its files cannot tell."""
    path = Path(model)
    if not path.exists():
        # vLLM has it; it is not needed where models are local.
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(model, revision=revision, local_files_only=True))
        except (OSError, ValueError) as e:
            raise ModelError(" ".join(str(e).split())) from None
    return model_fingerprint(path)
