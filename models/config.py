"""The configuration of a decoder: one frozen record, from which shapes, weights and checkpoints follow.

A family (see families/) fills it in from a Hugging Face `config.json` and writes it back; the decoder reads
nothing else.
"""

from __future__ import annotations

import dataclasses

from sled.errors import ConfigError, SettingError
from sled.io import shown
from sled.models.positions import LongRopeScaling, Rope

WEIGHT_TYPES = ("float32", "bfloat16", "float16")  # in which weights are kept and computed with
NORMS = ("rms", "rms_plus_one", "layer")  # see layers/basic.py
NORM_PLACES = ("before", "around", "after")  # of attention and of the MLP
QK_NORMS = (None, "head", "whole")
DEFAULT_ROPE = Rope()
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")  # by config.json's names
HEAD_KINDS = ("projection", "norm", "affine", "mlp", "block")
MOST = 2**31 - 1  # of every count: positions and token ids are int32
MOST_LAYERS = MOST_EXPERTS = 10_000  # the largest models published have hundreds


@dataclasses.dataclass(frozen=True)
class ExitHeads:
    """The parts that early exits have of their own on the way from a hidden state to logits; by default none.

    layers: the hidden states that have a head, n = the output of layer n, within 1 .. L - 1 (EE-LLM's post-exit;
        see `from_pre_exit`).
    kind: "projection": nothing before the final norm, which they share. "norm": a norm of their own in its place.
        "affine": h + h A + b before the final norm (tuned lens, Belrose et al. 2023, arXiv 2303.08112, equation 6).
        "mlp": h + MLP(norm(h)) of the model's own form, then a norm of their own. "block": a whole layer of the model's
        own form, with attention over all that came to the exit and so keys and values of its own, then such a norm.
    tied: whether they end in the model's final projection W, or in one of their own.

    All but "affine", and their start from the model's own parts, follow EE-LLM (arXiv 2312.04916) and EE-Tuning
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
class Experts:
    """A mixture of experts in the MLP's place.

    count, chosen, width: how many there are; how many a token goes through, those whose router logits are the highest;
        and F of each.
    normalised: a token's experts are weighed by the softmax over their logits alone, else over those of all experts.
    balance: the coefficient of the load-balancing loss in training (Switch Transformers, arXiv 2101.03961).
    clamp: (slope, limit) of gpt-oss's form, g sigmoid(slope g) (u + 1), of the gate g at most `limit`, and u within
        both limits. None: act(g) * u, as in an MLP.
    """

    count: int
    chosen: int
    width: int
    normalised: bool = True
    balance: float = 0.001
    clamp: tuple[float, float] | None = None

    def __post_init__(self):
        for name, most in (("count", MOST_EXPERTS), ("chosen", self.count), ("width", MOST)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} of the experts is {getattr(self, name)!r}, but it must be from 1 to "
                                  f"{most:,}")
        if not self.balance >= 0:
            raise ConfigError(f"balance of the experts is {self.balance!r}, but it must be at least 0")
        if self.clamp is not None and not min(self.clamp) > 0:
            raise ConfigError(f"clamp of the experts is {self.clamp!r}, but both numbers must be above 0")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder-only transformer: what families differ in, as data.

    Letters as in the legend of shapes: V `vocab_size`, D `width`, F `mlp_width`, L `num_layers`,
    N `num_heads`, K `num_kv_heads`, H `head_dim`.

    rope: rotary positions; None: positions are learned, up to `max_positions`, and added to the embeddings.
        local_rope: those of layers with a window, where they have their own.
    norm: x / rms(x) times w ("rms"), times 1 + w ("rms_plus_one"), or (x - mean) / std * w + b ("layer").
    norms_at: "before" attention and MLP, between them and their residual ("after"), or both ("around").
    qk_norm: of queries and keys, each "head" by itself or the "whole" vector before it is split; None: not.
    activation: of the MLP, by config.json's name; gated: down(act(gate x) * up x), else down(act(up x)).
    experts: what every layer has in the MLP's place, which only exit heads then have; None: an MLP.
    embedding_scale, query_scale: factors of the embeddings and of the attention scores (None: 1, and H ** -0.5).
    sinks: every query head has a logit of its own in the softmax over its scores, whose share goes nowhere (arXiv
        2309.17453).
    attention_cap, logit_cap: scores, and logits of every layer, s become cap * tanh(s / cap); None: not.
    windows: one entry per layer: how many positions back (itself included) a token attends to, or None for all.
    eos_ids end a generation. exit_heads: what early exits have of their own, or None.
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
    rope: Rope | None = DEFAULT_ROPE
    local_rope: Rope | None = None
    norm: str = "rms"
    norms_at: str = "before"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    activation: str = "silu"
    gated: bool = True
    experts: Experts | None = None
    embedding_scale: float | None = None
    query_scale: float | None = None
    sinks: bool = False
    attention_cap: float | None = None
    logit_cap: float | None = None
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
        for name in ("qkv_bias", "out_bias", "mlp_bias", "gated", "sinks", "tied_head"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but it must be True or False")
        for name, choices in (("norm", NORMS), ("norms_at", NORM_PLACES), ("qk_norm", QK_NORMS),
                              ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but it must be one of {choices}")
        for name in ("embedding_scale", "query_scale", "attention_cap", "logit_cap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but it must be above 0 or None")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly; "
                "num_heads must be a multiple of num_kv_heads")
        if self.num_heads * self.head_dim > MOST:
            raise ConfigError(f"{self.num_heads} heads of {self.head_dim} are wider than {MOST:,}, as no model is; "
                              "correct num_heads or head_dim")
        if not self.norm_eps >= 0:
            raise ConfigError(f"norm_eps is {self.norm_eps!r}, but it must be at least 0")
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                rope.check(self.head_dim)
        if self.rope and self.local_rope and self.rope.share != self.local_rope.share:
            raise ConfigError(f"{self.rope.share:g} of each head is to turn, but {self.local_rope.share:g} in layers "
                              "with a window; give one share")
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

    @property
    def head_windows(self) -> tuple[int | None, ...]:
        """The window of each exit head of kind "block": that of the layer above its exit, from which it begins."""
        return tuple(self.windows[n] for n in self.exit_heads.layers)

    @property
    def context(self) -> int:
        """How many positions a text may have: `max_positions`, or as many as the rotary positions hold for."""
        ropes = [rope for rope in (self.rope, self.local_rope) if rope is not None]
        return min((rope.context(self.max_positions) for rope in ropes), default=self.max_positions)

    def for_long_context(self) -> DecoderConfig:
        """The same, for texts of all `max_positions`. Raises SettingError where texts may have them anyway."""
        if self.rope is None or not isinstance(self.rope.scaling, LongRopeScaling):
            raise SettingError("long_context is True, but this model has no rotary positions of their own for long "
                               f"texts (longrope): all have up to {self.context:,}; leave it out")
        scaling = dataclasses.replace(self.rope.scaling, long_context=True)
        return dataclasses.replace(self, rope=dataclasses.replace(self.rope, scaling=scaling))

    @property
    def long_context(self) -> bool:
        """Whether positions are computed in a way of their own for long texts."""
        scaling = self.rope and self.rope.scaling
        return isinstance(scaling, LongRopeScaling) and scaling.long_context

    @property
    def beyond(self) -> str:
        """What to know where a text is to have more: a clause to follow "; ", or nothing."""
        return "" if self.rope is None else self.rope.beyond()
