"""What a configuration does to a model, measured on the paged cache, for the quality gate."""

import dataclasses
from collections.abc import Callable, Mapping

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.lab.evaluate import Evaluator
from kvcompress_jax.lab.texts import load_text
from kvcompress_jax.models.load import Model
from kvcompress_jax.quality import Measured, admit, settings_digest, unmeasured

BUILT_IN = "language reference"
CONTEXT_TOKENS, CONTINUATION_TOKENS = 1024, 256  # of a measurement that nobody asked for

Progress = Callable[[str, float], None]


class Judge:
    """Measures configurations on one model; the uncompressed model runs once for all of them."""

    def __init__(
        self,
        model: Model,
        texts: Mapping[str, str],
        *,
        context_tokens: int = CONTEXT_TOKENS,
        continuation_tokens: int = CONTINUATION_TOKENS,
        kv_dtype: str = "bfloat16",
    ) -> None:
        """Runs the uncompressed model; arguments and errors are those of `Evaluator`."""
        self.model = model
        self.context_tokens = context_tokens
        self.evaluators = {
            name: Evaluator(
                model,
                text,
                context_tokens=context_tokens,
                continuation_tokens=continuation_tokens,
                facts=0,
                kv_dtype=kv_dtype,
            )
            for name, text in texts.items()
        }

    def measure(self, config: CompressionConfig) -> Measured:
        """The worst of the texts, whatever the configuration's bound says."""
        plain = dataclasses.replace(config, bound=None, measured=None)
        found = [evaluator.fidelity(plain) for evaluator in self.evaluators.values()]
        return Measured(
            fingerprint=self.model.fingerprint,
            model=self.model.name,
            settings=settings_digest(config),
            kl=max(float(seen.kl.mean()) for seen, _ in found),
            top1=min(float(seen.agree.mean()) for seen, _ in found),
            bits=max(bits for _, bits in found),
            context_tokens=self.context_tokens,
            texts=", ".join(self.evaluators),
        )


def with_measurement(
    config: CompressionConfig,
    model: Model,
    *,
    kv_dtype: str = "bfloat16",
    progress: Progress = lambda stage, share: None,
) -> CompressionConfig:
    """The configuration as the gate lets it through. Where it has a bound that was not measured on
    this model, it is measured, on the language reference that comes with CPython.

    Raises:
      QualityError: the bound is not kept.
      TextError: the model has no tokenizer.
    """
    if config.force or unmeasured(config, model.fingerprint) is None:
        admit(config, model.fingerprint)
        return config
    progress("quality gate", 0.0)
    room = model.config.max_positions
    context = min(CONTEXT_TOKENS, room * 4 // 5)
    judge = Judge(
        model,
        {BUILT_IN: load_text()},
        context_tokens=context,
        continuation_tokens=min(CONTINUATION_TOKENS, room - context),
        kv_dtype=kv_dtype,
    )
    progress("quality gate", 0.5)
    measured = judge.measure(config)
    progress("quality gate", 1.0)
    config = dataclasses.replace(config, measured=measured)
    admit(config, model.fingerprint)
    return config
