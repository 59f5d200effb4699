"""The quality gate at the start of vLLM, which loads its models itself."""

import logging

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.interop.vllm.model_files import outline
from kvcompress_jax.models.errors import ModelError
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
        measured with keys that are not rounded as here: inside vLLM error feedback has to be asked
        for. With `config.force` that is a warning in the log instead.
    """
    if config.bound is None or not config.compresses:
        return
    if config.feeds_errors_back and not config.error_feedback:
        reason = (
            "measured with error feedback, which keys inside vLLM have with error_feedback = true"
            " alone; `kvcompress tune --for-vllm` measures without"
        )
    else:
        try:
            return admit(config, outline(model, revision).fingerprint)
        except ModelError as e:
            reason = f"{model}: nobody can tell whether it is the model that was measured: {e}"
    if not config.force:
        raise QualityError(f"quality gate: {reason}")
    logger.warning("quality gate, forced: %s", reason)
