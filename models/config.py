"""The configuration of a decoder: one frozen record, from which shapes, weights and checkpoints follow.

A family (see families/) fills it in from a Hugging Face `config.json` and writes it back; the decoder reads
nothing else.
"""

from __future__ import annotations

import dataclasses

from sled.errors import ConfigError, SettingError
from sled.io import shown

WEIGHT_TYPES = ("float32", "bfloat16", "float16")  # in which weights are kept and computed with
HEAD_KINDS = ("projection", "norm", "affine", "mlp")
MOST = 2**31 - 1  # of every count: positions and token ids are int32
MOST_LAYERS = 10_000  # the deepest models published have hundreds


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (Chen et al. 2023)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between.

    Wavelengths are in tokens; the ramp lies between `original_positions / low_freq_factor` and
    `original_positions / high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class ExitHeads:
    """The parts that early exits have of their own on the way from a hidden state to logits; by default none.

    layers: the hidden states that have a head, n = the output of layer n, within 1 .. L - 1 (EE-LLM's post-exit;
        see `from_pre_exit`).
    kind: "projection": nothing before the final norm, which they share. "norm": a norm of their own in its place.
        "affine": h + h A + b before the final norm (tuned lens, Belrose et al. 2023, arXiv 2303.08112, equation 6).
        "mlp": h + MLP(norm(h)) of the model's own form, then a norm of their own.
    tied: whether they end in the model's final projection W, or in one of their own.

    The first three, and their start from the model's own parts, follow EE-LLM (arXiv 2312.04916) and EE-Tuning
    (2402.00518). Their code runs the MLP beside that of layer n, on what attention left, and starts it as a copy of
    that; here it follows hidden state n, which every exit reads, and starts as the identity, as all heads do.

    Raises SettingError for a value out of range, and for tied projections, which add nothing.
    """

    layers: tuple[int, ...]
    kind: str = "norm"
    tied: bool = True

    def __post_init__(self):
        layers = tuple(self.layers) if isinstance(self.layers, (tuple, list)) else (self.layers,)
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in layers)
        if not layers or not whole or list(layers) != sorted(set(layers)):
            raise SettingError(f"ExitHeads.layers is {shown(self.layers)}, but must be layers of at least "
                               "1, ascending, each named once; n is the output of layer n")
        object.__setattr__(self, "layers", layers)
        if self.kind not in HEAD_KINDS:
            raise SettingError(f"ExitHeads.kind is {self.kind!r}, which is unknown; choose one of "
                               f"{', '.join(HEAD_KINDS)}")
        if not isinstance(self.tied, bool):
            raise SettingError(f"ExitHeads.tied is {self.tied!r}, but must be True or False; True shares the model's "
                               "final projection")
        if self.tied and self.kind == "projection":
            raise SettingError("ExitHeads.kind is 'projection' and tied, so the exits have nothing of their own; "
                               "leave the heads out, or give tied=False")


def from_pre_exit(layers: tuple[int, ...]) -> tuple[int, ...]:
    """EE-LLM's pre-exit layers, whose exits read the layer's input, as hidden states: (7, 13) is (6, 12).

    Raises SettingError for a layer below 2: the embeddings are no exit.
    """
    if wrong := [n for n in layers if n < 2]:
        raise SettingError(f"pre-exit layer {wrong[0]} reads the embeddings, which are no exit; the first is 2")
    return tuple(n - 1 for n in layers)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder-only transformer with rotary positions, RMS norms and a gated MLP.

    Letters as in the legend of shapes: V `vocab_size`, D `width`, F `mlp_width`, L `num_layers`,
    N `num_heads`, K `num_kv_heads`, H `head_dim`.

    `windows` holds one entry per layer: how many positions back (itself included) a token attends
    to, or None for all of them. `eos_ids` end a generation. `exit_heads`: what early exits have of
    their own, or None.
    """

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 10_000.0
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    windows: tuple[int | None, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    exit_heads: ExitHeads | None = None

    def __post_init__(self):
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_positions"):
            value, most = getattr(self, name), MOST_LAYERS if name == "num_layers" else MOST
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ConfigError(f"{name} is {value!r}, but it must be a whole number from 1 to {most:,}")
        for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied_head"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but it must be True or False")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly; "
                "num_heads must be a multiple of num_kv_heads")
        if self.num_heads * self.head_dim > MOST:
            raise ConfigError(f"{self.num_heads} heads of {self.head_dim} are wider than {MOST:,}, as no model is; "
                              "correct num_heads or head_dim")
        if not self.norm_eps >= 0:
            raise ConfigError(f"norm_eps is {self.norm_eps!r}, but it must be at least 0")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ConfigError(f"{len(self.windows)} attention windows given for {self.num_layers} layers; "
                              "give one per layer")
        for window in self.windows:
            if window is not None and window < 1:
                raise ConfigError(f"an attention window is {window!r}, but it must be at least 1 or None")
        if self.exit_heads is not None and self.exit_heads.layers[-1] >= self.num_layers:
            given = shown(self.exit_heads.layers)
            raise ConfigError(f"exit heads are given for layers {given}, but a model of {self.num_layers} layers has "
                              f"early exits 1 to {self.num_layers - 1}")
