"""What a decoder looks like: the options in which the supported architectures differ."""

import dataclasses
from typing import TypeAlias

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
ACTIVATIONS = ("silu", "gelu_tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency is divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor: expected more than 0, got {self.factor}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths are divided by `factor`, short ones stay, those between are blended.

    Attributes:
      factor: of frequencies with a wavelength above original_max_positions / low_frequency_factor.
      low_frequency_factor: see above.
      high_frequency_factor: wavelengths below original_max_positions / high_frequency_factor stay.
      original_max_positions: of the training before the scaling, in tokens.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor: expected more than 0, got {self.factor}")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                "low_frequency_factor: expected more than 0 and less than high_frequency_factor="
                f"{self.high_frequency_factor}, got {self.low_frequency_factor}"
            )
        if self.original_max_positions < 1:
            raise ValueError(
                f"original_max_positions: expected at least 1, got {self.original_max_positions}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyDivisors:
    """Each frequency has its own divisor: how GGUF files store any other scaling."""

    divisors: tuple[float, ...]  # [head_dim / 2]

    def __post_init__(self) -> None:
        if not all(d > 0 for d in self.divisors):
            raise ValueError(f"divisors: expected more than 0, got {min(self.divisors)}")


RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | FrequencyDivisors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: channels d and d + head_dim / 2 turn by position * frequency[d].

    Attributes:
      theta: frequency[d] = theta ** (-2 d / head_dim), before scaling.
      scaling: None: as trained.
    """

    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ValueError(f"theta: expected more than 0, got {self.theta}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer. Hashable: a static argument of `jax.jit`.

    Attributes:
      architecture: "llama", "qwen2", "qwen3" or "gemma3"; a name only, all that differs is below.
      vocab_size: rows of the embedding.
      hidden_size: of the residual stream.
      intermediate_size: of the gated MLP.
      num_layers: of the decoder.
      num_heads: query heads.
      num_kv_heads: each serves num_heads / num_kv_heads query heads.
      head_dim: of queries, keys and values; even.
      norm_eps: of every RMS norm.
      tie_embeddings: the output matrix is the embedding.
      qkv_bias: query, key and value projections have biases.
      output_bias: the attention's output projection has a bias.
      qk_norm: queries and keys are RMS-normalised per head before RoPE.
      post_norms: the outputs of attention and MLP are RMS-normalised before they are added.
      activation: of the MLP's gate, "silu" or "gelu_tanh".
      embedding_scale: factor of the embeddings.
      query_scale: what q . k is multiplied by.
      soft_cap: attention logits become soft_cap * tanh(logits / soft_cap).
      final_soft_cap: the same for the output logits.
      rope: of layers with full attention, and of all where `local_rope` is None.
      local_rope: of layers with a window.
      sliding_window: tokens that a layer with a window sees: a query at t sees the keys at
        t - sliding_window + 1 to t.
      layer_windows: per layer the window, or 0 for full attention.
      max_positions: that the model was made for, in tokens.
      eos_token_ids: any of them ends a text.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    query_scale: float
    soft_cap: float | None = None
    final_soft_cap: float | None = None
    rope: Rope
    local_rope: Rope | None = None
    sliding_window: int | None = None
    layer_windows: tuple[int, ...]
    max_positions: int
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(
            self.architecture in ARCHITECTURES,
            "architecture",
            f"one of {ARCHITECTURES}",
            self.architecture,
        )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _check(self.head_dim % 2 == 0, "head_dim", "an even number", self.head_dim)
        _check(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"a divisor of num_heads={self.num_heads}",
            self.num_kv_heads,
        )
        _check(
            self.activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", self.activation
        )
        for name in ("norm_eps", "embedding_scale", "query_scale"):
            _check(getattr(self, name) > 0, name, "more than 0", getattr(self, name))
        for name in ("soft_cap", "final_soft_cap", "sliding_window"):
            value = getattr(self, name)
            _check(value is None or value > 0, name, "more than 0 or None", value)
        _check(
            len(self.layer_windows) == self.num_layers,
            "layer_windows",
            f"{self.num_layers} entries, one per layer",
            len(self.layer_windows),
        )
        window = self.sliding_window or 0
        _check(
            all(w in (0, window) for w in self.layer_windows),
            "layer_windows",
            f"only 0 and sliding_window={self.sliding_window}",
            sorted(set(self.layer_windows)),
        )
        for rope in (self.rope, self.local_rope):
            if rope is not None and isinstance(rope.scaling, FrequencyDivisors):
                count = len(rope.scaling.divisors)
                _check(count * 2 == self.head_dim, "divisors", self.head_dim // 2, count)


def _check(valid: bool, name: str, expected: object, got: object) -> None:
    if not valid:
        raise ValueError(f"{name}: expected {expected}, got {got}")
