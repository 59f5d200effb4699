"""Whether gradients make a calibrated code better than the closed form does.

    .venv/bin/python benchmarks/gradient_code.py FILE... [--bits 3.5] [--learn step mean]

The closed form (`kvcompress_jax.calibrated.fit`) makes the error of the attention output small to
first order, layer by layer. Here basis, steps and means of the keys are moved so that the
predictions themselves change less: the divergence is differentiated through the code. Rounding has
no gradient of use and is passed straight through (Bengio, Leonard and Courville, 2013); steps learn
from what rounding leaves (Esser et al., "Learned step size quantization", 2020). How many bits a
component has stays as it was fitted. SmolLM2, trained on samples of CPython's language reference,
judged on two others of it and on two excerpts of each FILE.
"""

import argparse
import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console
from rich.table import Table

from kvcompress_jax.calibrated.calibrate import calibrate, gather
from kvcompress_jax.calibrated.code import (
    CalibratedCode,
    before_rope,
    encode_rows,
    key_scales,
    turn,
)
from kvcompress_jax.calibrated.divide import predicted_divergence, read_on, trial
from kvcompress_jax.calibrated.pages import by_page, received_attention, there_and_back
from kvcompress_jax.calibrated.row import RowLayout
from kvcompress_jax.lab.progress import stages
from kvcompress_jax.lab.texts import load_text, take_apart
from kvcompress_jax.models.config import DecoderConfig
from kvcompress_jax.models.dense import AttentionInputs, capture_forward
from kvcompress_jax.models.load import load_model
from kvcompress_jax.models.params import DecoderParams
from kvcompress_jax.models.rope import layer_frequencies

TOKENS = 1024  # of a sample
EXCERPTS = (0, 6000)  # where the judged ones of a text begin
PARTS = ("mix", "step", "mean")
PAST_SHARE = 3 / 4  # of a sample, which is coded; the rest is predicted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Change:
    """What is learned, relative to a code; zeros change nothing.

    The new basis is `(1 + mix) @ decode`, where a mix of 1 adds as much of another component as it
    usually is large; steps are multiplied by exp(step); means move by so many typical sizes of the
    components.
    """

    mix: jax.Array  # f32[layers, heads, components, components]
    step: jax.Array  # f32[layers, heads, components]
    mean: jax.Array  # f32[layers, heads, components]

    def of(self, code: CalibratedCode) -> CalibratedCode:
        """The changed code, of all layers or one."""
        relative = code.scale[..., None, :] / code.scale[..., :, None]
        same = jnp.broadcast_to(jnp.eye(code.scale.shape[-1]), relative.shape)
        mixed = same + self.mix * relative
        moved = jnp.einsum("...c,...cd->...d", self.mean * code.scale, code.decode)
        return dataclasses.replace(
            code,
            mean=code.mean + moved,
            encode=code.encode @ jnp.linalg.inv(mixed),
            decode=mixed @ code.decode,
            step=code.step * jnp.exp(self.step),
        )


def no_change(code: CalibratedCode) -> Change:
    """Of a code of all layers."""
    components = code.scale.shape[-1]
    return Change(
        mix=jnp.zeros((*code.scale.shape, components)),
        step=jnp.zeros_like(code.scale),
        mean=jnp.zeros_like(code.scale),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    """A text, and what does not depend on what is learned."""

    tokens: jax.Array  # i32[tokens]
    keys: jax.Array  # f32[layers, past, heads, dim], after RoPE
    values: jax.Array  # f32[layers, past, heads, dim], exact
    coded_values: jax.Array  # likewise, through the code
    exact: jax.Array  # bool[layers, past, heads]: keys that are kept with 8 bits, or as they are


@dataclasses.dataclass(frozen=True)
class Setting:
    """What functions are compiled for."""

    rows: RowLayout
    config: DecoderConfig
    page_size: int
    sink_tokens: int


@functools.partial(jax.jit, static_argnames="setting")
def prepare(
    tokens: jax.Array, seen: AttentionInputs, code: CalibratedCode, setting: Setting
) -> Sample:
    """A sample of i32[tokens], of which the attention got `seen` (batch of 1)."""
    size = setting.page_size
    past = int(tokens.shape[0] * PAST_SHARE) // size * size
    sinks = jnp.arange(past, dtype=jnp.int32) < setting.sink_tokens

    def one_layer(layer: jax.Array) -> tuple[jax.Array, ...]:
        q, k, v = (x[layer, 0, :past].astype(jnp.float32) for x in (seen.q, seen.k, seen.v))
        received = received_attention(q, k, setting.config, layer)
        mine = code.at(layer)
        _, values = there_and_back(k, v, received, mine, setting.rows, size, setting.sink_tokens)

        def chosen(k, v, received, exact, first):  # type: ignore[no-untyped-def]
            _, refined = encode_rows(k, v, received, exact, first, mine, setting.rows)
            token = refined[:, :, 0, 0].astype(jnp.int32)  # [heads, count]
            slot = jnp.arange(size, dtype=jnp.int32)[None, None, :]
            return jnp.any(token[..., None] == slot, axis=1)

        first = jnp.arange(past // size, dtype=jnp.int32) * size
        pages = (by_page(x, size) for x in (k, v, received.T))
        refined = jax.vmap(chosen)(*pages, sinks.reshape(-1, size), first)  # [pages, heads, tokens]
        exact = refined.swapaxes(1, 2).reshape(past, -1) | sinks[:, None]
        return k, v, values, exact

    layers = jnp.arange(setting.config.num_layers, dtype=jnp.int32)
    return Sample(tokens, *lax.map(one_layer, layers))


def through_code(keys: jax.Array, exact: jax.Array, code: CalibratedCode) -> jax.Array:
    """Keys f32[tokens, heads, dim] of positions 0 and on, coded by the code of one layer, with
    gradients for the code."""
    position = jnp.arange(keys.shape[0], dtype=jnp.int32)
    before = before_rope(keys.swapaxes(0, 1), position, code)
    z = jnp.einsum("htd,hdc->htc", before - code.mean[:, None], code.encode)
    size = lax.stop_gradient(key_scales(z, code))[..., None]
    step = code.step[:, None] * size
    levels = code.levels[:, None]
    u = z / jnp.where(step > 0, step, 1.0)
    rounded = jnp.clip(jnp.floor(u + levels / 2), 0.0, levels - 1) - (levels - 1) / 2
    straight = jnp.clip(u, -levels / 2, levels / 2)
    straight = straight + lax.stop_gradient(rounded - straight)
    again = jnp.einsum("htc,hcd->htd", straight * step, code.decode) + code.mean[:, None]
    coded = turn(again, position, code.frequencies).swapaxes(0, 1)
    return jnp.where(exact[..., None], keys, coded)


@functools.partial(jax.jit, static_argnames="setting")
def loss_and_gradient(
    change: Change,
    params: DecoderParams,
    sample: Sample,
    code: CalibratedCode,
    setting: Setting,
) -> tuple[jax.Array, Change]:
    """Divergence of the predictions after the coded past, in nats, and its gradient."""

    def loss(change: Change) -> jax.Array:
        changed = change.of(code)

        def coded(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys = through_code(sample.keys[layer], sample.exact[layer], changed.at(layer))
            return keys, sample.coded_values[layer]

        def plain(layer: jax.Array) -> tuple[jax.Array, jax.Array]:
            return sample.keys[layer], sample.values[layer]

        past = sample.keys.shape[1]
        read = functools.partial(read_on, params, setting.config, sample.tokens, past)
        reference, compressed = lax.stop_gradient(read(plain)), read(coded)
        return predicted_divergence(reference, compressed)

    return jax.value_and_grad(loss)(change)


def main() -> None:
    """Fits, trains, judges and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--bits", type=float, default=3.5, help="of the code (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=12, help="to train on (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="over them (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="(default: %(default)s)")
    parser.add_argument(
        "--learn", nargs="+", choices=PARTS, default=PARTS, help="of the code (default: all)"
    )
    args = parser.parse_args()
    console = Console()
    model = load_model("smollm2")
    assert model.tokenizer is not None

    def read(tokens: Sequence[int]) -> tuple[jax.Array, AttentionInputs]:
        ids = jnp.asarray(tokens, jnp.int32)
        return ids, capture_forward(model.params, model.config, ids[None])[1]

    samples, apart = take_apart(model, [load_text(None)], count=args.samples, tokens=TOKENS)
    judged = {"kept apart": [read(x) for x in apart]}
    for file in args.files:
        text = model.tokenizer.encode(load_text(file))
        judged[file.name] = [read(text[at : at + TOKENS]) for at in EXCERPTS]
    with stages(console) as progress:
        statistics = gather(model, samples, held_out=apart, progress=progress)
        profile = calibrate(model, statistics, bits=args.bits, progress=progress)
        setting = Setting(profile.rows, model.config, statistics.page_size, statistics.sink_tokens)
        code = profile.code(layer_frequencies(model.config))
        table = Table(
            title=f"KL in 1e-4 nats, {args.bits:g} bits, {' and '.join(args.learn)} trained"
        )
        for column in ("", "trained on", *judged):
            table.add_column(column, justify="left" if not column else "right")

        def judge(name: str, loss: float, code: CalibratedCode) -> None:
            found = [
                np.mean([divergence_of(model.params, *x, code, setting) for x in texts])
                for texts in judged.values()
            ]
            table.add_row(name, *(f"{1e4 * x:.2f}" for x in (loss, *found)))

        prepared = [prepare(*read(tokens), code, setting) for tokens in samples]
        steps = train(
            model.params,
            prepared,
            code,
            setting,
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            learn=args.learn,
        )
        for epoch, (loss, trained) in enumerate(steps):
            progress(f"epoch {epoch}", epoch / (args.epochs + 1))
            judge("closed form" if epoch == 0 else f"after epoch {epoch}", loss, trained)
    console.print(table)


def divergence_of(
    params: DecoderParams,
    tokens: jax.Array,
    seen: AttentionInputs,
    code: CalibratedCode,
    setting: Setting,
) -> float:
    """Of the predictions after a past that went through the code as the cache stores it."""
    return float(
        trial(
            params,
            tokens,
            seen,
            code,
            rows=setting.rows,
            config=setting.config,
            page_size=setting.page_size,
            sink_tokens=setting.sink_tokens,
        )
    )


def train(
    params: DecoderParams,
    samples: Sequence[Sample],
    code: CalibratedCode,
    setting: Setting,
    *,
    epochs: int,
    learning_rate: float,
    learn: Collection[str] = PARTS,
) -> Iterator[tuple[float, CalibratedCode]]:
    """Trains by Adam, the rate falling to 0 along a cosine.

    Yields:
      The mean divergence on the samples while an epoch went, in nats, and the code after it; first
      of the code as it is.
    """
    schedule = optax.cosine_decay_schedule(learning_rate, epochs * len(samples))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    change = no_change(code)
    state = optimizer.init(change)
    for epoch in range(epochs + 1):
        losses = []
        for sample in samples:
            loss, gradient = loss_and_gradient(change, params, sample, code, setting)
            losses.append(float(loss))
            if epoch == 0:
                continue
            still = {x: jnp.zeros_like(getattr(gradient, x)) for x in PARTS if x not in learn}
            with jax.numpy_dtype_promotion("standard"):  # optax counts on it
                update, state = optimizer.update(dataclasses.replace(gradient, **still), state)
            change = optax.apply_updates(change, update)
        yield float(np.mean(losses)), change.of(code)


if __name__ == "__main__":
    main()
