"""The parts that families share: reading a `config.json` field by field, writing it back, naming tensors.

A family is data: how its `config.json` becomes a `DecoderConfig` and back, and one table of module
names, used in both directions. `Fields` hands the file's fields out one at a time and refuses what
nobody took, so no field of a checkpoint is ever ignored by oversight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from sled.errors import ConfigError
from sled.models.config import DecoderConfig, LinearScaling, Llama3Scaling

REQUIRED = object()

# Fields that change neither the weights nor the logits of a decoder: training settings, sampling
# settings (ours come from the caller), what a forward pass returns, who wrote the file and how.
WITHOUT_EFFECT = frozenset("""
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path
    attention_dropout attn_implementation begin_suppress_tokens bad_words_ids chunk_size_feed_forward
    cross_attention_hidden_size diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range is_decoder is_llama_config label2id length_penalty max_length max_sequence_length
    min_length no_repeat_ngram_size num_assistant_tokens num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_last_hidden_states tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
""".split())

# Fields that would change the computation, and the only values under which they do not.
ONE_VALUE = {
    "hidden_act": ("silu", "swish"),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None, {}),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}

# Ours -> Hugging Face's. `#` is the layer; the last part of a name (weight, bias) is the same in both.
MODULES = {
    "embedding": "model.embed_tokens",
    "layers.#.attention_norm": "model.layers.#.input_layernorm",
    "layers.#.attention.q": "model.layers.#.self_attn.q_proj",
    "layers.#.attention.k": "model.layers.#.self_attn.k_proj",
    "layers.#.attention.v": "model.layers.#.self_attn.v_proj",
    "layers.#.attention.o": "model.layers.#.self_attn.o_proj",
    "layers.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    "layers.#.mlp.gate": "model.layers.#.mlp.gate_proj",
    "layers.#.mlp.up": "model.layers.#.mlp.up_proj",
    "layers.#.mlp.down": "model.layers.#.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


class Fields:
    """The fields of one JSON object, each to be taken once. `source` names the file in messages."""

    def __init__(self, values: Mapping, source: str):
        self.source = source
        self._left = dict(values)

    def take(self, name: str, kind: type, default=REQUIRED, *, null: bool = False):
        """The field's value, or `default` where it is absent (or, unless `null`, where it is null).

        An int serves as a float. Raises ConfigError where a required field is absent or the value
        is of another kind.
        """
        absent = name not in self._left
        value = self._left.pop(name, default)
        if value is None and not null:
            absent, value = True, default
        if value is REQUIRED:
            raise ConfigError(f"{self.source}: field '{name}' is missing; fetch the file again")
        if absent or value is None:
            return value
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.source}: field '{name}' is {value!r}, but it must be of type "
                              f"{kind.__name__}; correct the file")
        return value

    def take_ids(self, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A token id, a list of them, or null. Negative ids (an old spelling of 'none') are dropped."""
        if name not in self._left:
            return default
        value = self._left.pop(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
            raise ConfigError(f"{self.source}: field '{name}' is {value!r}, but it must be a token id or a "
                              "list of them; correct the file")
        return tuple(i for i in ids if i >= 0)

    def finish(self):
        """Refuse whatever nobody took and is not known to be harmless. Raises ConfigError."""
        for name, value in self._left.items():
            if name in WITHOUT_EFFECT:
                continue
            allowed = ONE_VALUE.get(name)
            if allowed is None:
                raise ConfigError(
                    f"{self.source}: field '{name}' ({value!r}) is not understood and might change what the "
                    "model computes; remove it from the file if it has no effect, or use another model")
            if value not in allowed:
                raise ConfigError(f"{self.source}: field '{name}' is {value!r}, but only {allowed[0]!r} is "
                                  "supported; use a checkpoint without it")


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family. `name` is Hugging Face's `model_type`.

    `read` takes the family's fields and returns `DecoderConfig` arguments; `write` gives the JSON
    fields that only this family has; `modules` is its table of module names.
    """

    name: str
    architecture: str
    read: Callable[[Fields], dict]
    write: Callable[[DecoderConfig], dict]
    modules: Mapping[str, str] = dataclasses.field(default_factory=lambda: MODULES)

    def tensor_name(self, path: tuple[str | int, ...]) -> str:
        """Hugging Face's name of the parameter at `path`, e.g. ("layers", 3, "mlp", "up", "weight")."""
        *module, last = path
        layer = next((str(part) for part in module if isinstance(part, int)), "")
        key = ".".join("#" if isinstance(part, int) else part for part in module)
        return f"{self.modules[key].replace('#', layer)}.{last}"


def read_shape(f: Fields, *, max_positions: int, kv_heads: int | None = None, head_dim: int | None = None,
               bos: tuple[int, ...] = (), eos: tuple[int, ...] = ()) -> dict:
    """The fields that all families have. The arguments are the family's defaults for absent fields.

    Absent `kv_heads` means as many as query heads; absent `head_dim` means width / heads.
    """
    width, heads = f.take("hidden_size", int), f.take("num_attention_heads", int)
    positions = f.take("max_position_embeddings", int, max_positions)
    given_kv = f.take("num_key_value_heads", int, heads if kv_heads is None else kv_heads, null=True)
    given_dim = f.take("head_dim", int, head_dim)
    if given_dim is None and (heads < 1 or width % heads):
        raise ConfigError(f"{f.source}: hidden_size {width} is not a multiple of num_attention_heads "
                          f"{heads}; add the field 'head_dim' to the file")
    bos_ids, pad_ids = f.take_ids("bos_token_id", bos), f.take_ids("pad_token_id")
    return dict(
        vocab_size=f.take("vocab_size", int),
        width=width,
        mlp_width=f.take("intermediate_size", int),
        num_layers=f.take("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=heads if given_kv is None else given_kv,
        head_dim=width // heads if given_dim is None else given_dim,
        max_positions=positions,
        norm_eps=f.take("rms_norm_eps", float, 1e-6),
        tied_head=f.take("tie_word_embeddings", bool, False),
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=f.take_ids("eos_token_id", eos),
        pad_id=pad_ids[0] if pad_ids else None,
        **_read_rope(f, positions),
    )


def write_shape(c: DecoderConfig) -> dict:
    """The inverse of `read_shape`."""
    eos = list(c.eos_ids)
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": c.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": c.pad_id,
        **_write_rope(c),
    }


def _read_rope(f: Fields, max_positions: int) -> dict:
    """`rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before), or both alike.

    Versions of transformers disagree on which of the two wins, so a contradiction is refused.
    """
    spellings = {name: f.take(name, dict, None) or {} for name in ("rope_parameters", "rope_scaling")}
    given = {"rope_theta": f.take("rope_theta", float, None)}
    for values in spellings.values():
        renamed = {"rope_type" if key == "type" else key: value for key, value in values.items()}
        if values.get("type", renamed.get("rope_type")) != renamed.get("rope_type"):
            raise ConfigError(f"{f.source}: the rope's 'type' is {values['type']!r} but its 'rope_type' is "
                              f"{values['rope_type']!r}; remove the wrong one")
        for key, value in renamed.items():
            if given.get(key) not in (None, value):
                raise ConfigError(f"{f.source}: '{key}' of the rotary positions is given as {given[key]!r} "
                                  f"and as {value!r}; remove the wrong one")
            given[key] = value

    rope = Fields(given, f"{f.source}, rotary positions")
    theta = _positive(rope, "rope_theta", 10_000.0)
    kind = rope.take("rope_type", str, "default")
    scaling: LinearScaling | Llama3Scaling | None = None
    if kind == "linear":
        scaling = LinearScaling(factor=_positive(rope, "factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=_positive(rope, "factor"),
            low_freq_factor=_positive(rope, "low_freq_factor"),
            high_freq_factor=_positive(rope, "high_freq_factor"),
            original_positions=rope.take("original_max_position_embeddings", int, max_positions),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ConfigError(f"{rope.source}: high_freq_factor {scaling.high_freq_factor} must be above "
                              f"low_freq_factor {scaling.low_freq_factor}; correct the file")
    elif kind != "default":
        raise ConfigError(f"{f.source}: rotary scaling {kind!r} is not supported (supported: default, "
                          "linear, llama3); use another model")
    rope.finish()
    return dict(rope_theta=theta, rope_scaling=scaling)


def _write_rope(c: DecoderConfig) -> dict:
    """Both spellings: transformers 5 reads `rope_parameters`, 4.x the other two."""
    s = c.rope_scaling
    scaling = None
    if isinstance(s, LinearScaling):
        scaling = {"rope_type": "linear", "factor": s.factor}
    elif isinstance(s, Llama3Scaling):
        scaling = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
                   "high_freq_factor": s.high_freq_factor,
                   "original_max_position_embeddings": s.original_positions}
    return {
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": c.rope_theta},
    }


def _positive(f: Fields, name: str, default=REQUIRED) -> float:
    value = f.take(name, float, default)
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{f.source}: '{name}' is {value!r}, but it must be above 0; correct the file")
    return value
