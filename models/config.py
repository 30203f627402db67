"""What a decoder looks like: one frozen record, from which shapes, weights and checkpoints follow.

A family (llama.py, mistral.py, qwen.py) fills it in from a Hugging Face `config.json` and writes
it back; the decoder reads nothing else.
"""

from __future__ import annotations

import dataclasses

from sled.errors import ConfigError


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
class DecoderConfig:
    """Shape of a decoder-only transformer with rotary positions, RMS norms and a gated MLP.

    Letters as in the legend of shapes: V `vocab_size`, D `width`, F `mlp_width`, L `num_layers`,
    N `num_heads`, K `num_kv_heads`, H `head_dim`.

    `windows` holds one entry per layer: how many positions back (itself included) a token attends
    to, or None for all of them. `eos_ids` end a generation.
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

    def __post_init__(self):
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}, but it must be a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly; "
                "num_heads must be a multiple of num_kv_heads")
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
