"""`kvcompress train-importance`."""

import dataclasses
from pathlib import Path

from rich.console import Console

from kvcompress_jax.config import CompressionConfig
from kvcompress_jax.importance.learned import save_learned
from kvcompress_jax.lab.output import check_writable, replacing, write_json
from kvcompress_jax.lab.progress import stages
from kvcompress_jax.lab.texts import TextError, load_text
from kvcompress_jax.lab.train_importance import train_importance
from kvcompress_jax.models.load import load_model


def train(
    source: str,
    files: list[Path | None],
    config: CompressionConfig,
    *,
    out: Path,
    tokens: int,
    steps: int,
    json: Path | None,
) -> None:
    """Trains a learned importance, writes it, and says how it went.

    Args:
      source: of the model, as `load_model` takes it.
      files: texts; None is the text that comes with CPython.
      config: what the score will be used with.
      out: safetensors file to write.
      tokens: to train on.
      steps: of the optimiser.
      json: file for the figures, or None.
    """
    texts = [load_text(file) for file in files]
    for path in (out, json):
        if path is not None:
            check_writable(path)
    console = Console()
    with stages(console) as progress:
        progress("loading the model", 0.0)
        model = load_model(source)
        progress("loading the model", 1.0)
        if model.tokenizer is None:
            raise TextError(f"{model.name}: expected a model with a tokenizer")
        training = train_importance(
            model,
            [model.tokenizer.encode(text, add_special=True) for text in texts],
            config,
            tokens=tokens,
            steps=steps,
            progress=progress,
        )
    with replacing(out) as temporary:
        save_learned(temporary, training.learned, fingerprint=model.fingerprint)
    console.print(
        f"trained on {training.pages} pages in {training.seconds:.0f} s. Damage that is left when"
        f" half the tokens of each page are refined, on these pages: {training.damage_left:.1%},"
        f" without the learned score {training.damage_left_without:.1%}"
    )
    console.print(f"learned importance: {out}")
    if json is not None:
        figures = {f.name: getattr(training, f.name) for f in dataclasses.fields(training)}
        del figures["learned"]
        write_json(json, figures | {"model": model.name, "fingerprint": model.fingerprint})
        console.print(f"json: {json}")
