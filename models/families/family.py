"""The parts that families share: reading a `config.json` field by field, writing it back, naming tensors.

A family is data: how its `config.json` becomes a `DecoderConfig` and back, and one table of module
names, used in both directions. A model of a family is what transformers' class of that `model_type` computes: `Fields`
hands the file's fields out one at a time, and of those that nobody took, the ones that this class reads are in the two
tables below (tests/test_models_published.py sees it read them); what it does not know cannot matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sled.errors import ConfigError
from sled.io import shorten, shown
from sled.models.config import MOST, MOST_LAYERS, DecoderConfig

REQUIRED = object()
FULL, SLIDING = "full_attention", "sliding_attention"
FLOAT32_MAX = 3.4028235e38
MOST_IDS = 1000  # that end a text; published files have up to ten

# Fields that transformers knows, and that change neither weights nor logits of these decoders: of training, of sampling
# (ours comes from the caller), of what a forward pass returns, of who wrote the file and how, of other kinds of models.
WITHOUT_EFFECT = frozenset("""
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path _output_attentions _post_init_done
    add_cross_attention assistant_confidence_threshold assistant_lookbehind attention_dropout attn_implementation
    attn_pdrop bad_words_ids begin_suppress_tokens cache_implementation chunk_size_feed_forward
    cross_attention_hidden_size diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff experts_implementation exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder
    label2id length_penalty max_length min_length mlp_layer_types mtp_layer_types name_or_path no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_heads num_labels
    num_return_sequences output_attentions output_cross_attentions output_hidden_states output_router_logits
    output_scores prefix pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop
    return_dict return_dict_in_generate sep_token_id summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj suppress_tokens target_lookbehind task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_last_hidden_states tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16 use_cache vision_aspect_ratio vision_feature_layer vision_feature_select_strategy
""".split())

# Fields that change what transformers computes, and the only values under which they do not.
ONE_VALUE: Mapping[str, tuple] = {
    "_heterogeneity_spec": (None,),
    "_rope_type_labels": (None,),
    "attention_chunk_size": (None,),
    "attribute_map": (None, {}),
    "decoder": (None,),
    "fusion_config": (None,),
    "generator": (None,),
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "kv_sharing_modes": (None,),
    "layer_types": (None,),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "reorder_and_upcast_attn": (False, None),
    "rope_parameters": (None, {}),
    "router_jitter_noise": (0, None),  # of training
    "scale_attn_by_inverse_layer_idx": (False, None),
    "scale_attn_weights": (True,),
    "sliding_window": (None,),  # its cache forgets what is further back, in every class
    "text_config": (None,),
    "transformers_weights": (None,),
    "use_bidirectional_attention": (False, None),
}
# Hugging Face's names of activations -> ours. "gelu_new" is the same tanh.
ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh",
                    "gelu_new": "gelu_pytorch_tanh"}

# Ours -> Hugging Face's. `#` is the layer; the last part of a name (weight, bias) is the same in both, unless the table
# has the whole name of a parameter.
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
        self.unknown: list[str] = []  # fields that were passed over because transformers does not know them
        self.outside: list[str] = []  # token ids that were, because the vocabulary does not have them
        self._left = dict(values)

    def take(self, name: str, kind: type, default=REQUIRED, *, null: bool = False, most: float | None = None):
        """The field's value, or `default` where it is absent (or, unless `null`, where it is null).

        An int serves as a float. Raises ConfigError where a required field is absent, the value is of another kind, or
        a number is beyond `most`, by default what it is computed with (int32, float32).
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
            raise self.refused(name, value, f"it must be of type {kind.__name__}; correct the file")
        most = most or {int: MOST, float: FLOAT32_MAX}.get(kind)
        if most is not None and not abs(value) <= most:
            raise self.refused(name, value, f"it can be at most {most:,}; correct the file")
        return value

    def take_ids(self, name: str, vocabulary: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A token id, a list of them, or null. Negative ids (an old spelling of 'none') are dropped, and so are those
        outside the vocabulary, of which a warning tells."""
        if name not in self._left:
            return default
        value = self._left.pop(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if len(ids) > MOST_IDS or any(not isinstance(i, int) or isinstance(i, bool) or abs(i) > MOST for i in ids):
            raise self.refused(name, value, f"it must be a token id, at most {MOST:,}, or a list of them, of up to "
                                             f"{MOST_IDS:,}; correct the file")
        self.outside += [f"{name} {i}" for i in ids if i >= vocabulary]
        return tuple(i for i in ids if 0 <= i < vocabulary)

    def finish(self, one_value: Mapping[str, tuple] | None = None) -> list[str]:
        """The names of the fields that nobody took and that cannot matter. Raises ConfigError for one that can.

        one_value: those that can, with the values under which they do not. None: every field can.
        """
        for name, value in self._left.items():
            if one_value is None:
                raise self.refused(name, value, "it is not understood; remove it")
            if name not in one_value:
                off = value is None or value is False  # what a file says it does not use is not worth a word
                note = name.startswith("_") or name.endswith("_token_id")  # nor is a note of its writer, or a role
                self.unknown += [] if off or note or name in WITHOUT_EFFECT else [name]
            elif not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in one_value[name]):
                remedy = ("quantised weights are not read; use the checkpoint before quantisation"
                          if name == "quantization_config" else
                          f"only {one_value[name][0]!r} is supported; use a checkpoint without it")
                raise self.refused(name, value, remedy)
        return self.unknown

    def refused(self, name: str, value: Any, why: str) -> ConfigError:
        return ConfigError(f"{self.source}: field '{name}' is {shown(value, 200)}, but {why}")


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family. `name` is Hugging Face's `model_type`.

    read: takes the family's fields and returns `DecoderConfig` arguments; write: all fields of its config.json.
    modules: its table of module names. Parameters with one name there are parts of one tensor: side by side, in the
        order of the table, along their last axis.
    interleaved: names of the table whose parts lie column by column in turn.
    in_out: names of the table whose matrices are stored [in, out], as ours, and not the other way round.
    base: before all names but the head's; a base model saved alone has them without.
    other_bases: what other classes that hold this model have before its names, each with what belongs there.
    left_out: beginnings of the names of tensors that are no part of the decoder.
    buffers: ends of the names of stored tensors that are no weights.
    early_exit: whether transformers' class stops after `config.num_hidden_layers` layers, however many it has, as its
        `assistant_early_exit` asks of it.
    """

    name: str
    architecture: str
    read: Callable[[Fields], dict]
    write: Callable[[DecoderConfig], dict]
    modules: Mapping[str, str] = dataclasses.field(default_factory=lambda: MODULES)
    interleaved: frozenset[str] = frozenset()
    in_out: frozenset[str] = frozenset()
    base: str = "model."
    other_bases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    early_exit: bool = True

    def has(self, architecture: Any) -> bool:
        """Whether this names the family's class, or the one without a head; older files write LLaMA."""
        own = self.architecture.lower()
        names = own, own.replace("forcausallm", "model"), own.replace("lmhead", "")
        return isinstance(architecture, str) and architecture.lower() in names

    def key(self, path: tuple[str | int, ...]) -> str:
        """The entry of the table for the parameter at `path`, e.g. ("layers", 3, "mlp", "up", "weight")."""
        parts = ["#" if isinstance(part, int) else part for part in path]
        whole = ".".join(parts)
        return whole if whole in self.modules else ".".join(parts[:-1])

    def stored_name(self, path: tuple[str | int, ...]) -> str:
        """Hugging Face's name of the parameter at `path`; `*` stands for the expert, where each has a tensor."""
        key, layer = self.key(path), next((str(part) for part in path if isinstance(part, int)), "")
        name = self.modules[key].replace("#", layer)
        return name if key.endswith(f".{path[-1]}") else f"{name}.{path[-1]}"

    def canonical(self, names: Collection[str]) -> dict[str, str]:
        """The stored tensors that count, by the names that the family's own class has for them."""
        found = {}
        for name in names:
            if name.startswith(self.left_out) or name.endswith(self.buffers):
                continue
            other = next((other for other in self.other_bases if name.startswith(other)), None)
            found[name if other is None else self.other_bases[other] + name.removeprefix(other)] = name
        if any(name.startswith(self.base) for name in found):
            return found
        head = self.modules["head"]
        return {name if name.startswith(head) else self.base + name: stored for name, stored in found.items()}


def read_shape(f: Fields, *, max_positions: int, kv_heads: int | None = None, head_dim: int | None = None,
               bos: tuple[int, ...] = (), eos: tuple[int, ...] = (), pad: tuple[int, ...] = (), tied: bool = False,
               activation: tuple[str, str] = ("hidden_act", "silu"), eps: float = 1e-6,
               absent: Mapping[str, int] | None = None) -> dict:
    """The fields that most families have. The arguments are the family's defaults for absent fields.

    Absent `kv_heads` means as many as query heads; absent `head_dim` means width / heads. `activation`: the field's
    name and default. absent: defaults of the sizes, which files need not give in every family.
    """
    sizes = absent or {}
    size = lambda name, **kw: f.take(name, int, sizes.get(name, REQUIRED), **kw)  # noqa: E731
    width, heads = size("hidden_size"), size("num_attention_heads")
    given_kv = f.take("num_key_value_heads", int, heads if kv_heads is None else kv_heads, null=True)
    given_dim = f.take("head_dim", int, head_dim)
    if given_dim is None and (heads < 1 or width % heads):
        raise ConfigError(f"{f.source}: hidden_size {width} is not a multiple of num_attention_heads "
                          f"{heads}; add the field 'head_dim' to the file")
    vocabulary = size("vocab_size")
    return dict(
        vocab_size=vocabulary,
        width=width,
        mlp_width=size("intermediate_size"),
        num_layers=size("num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=heads if given_kv is None else given_kv,
        head_dim=width // heads if given_dim is None else given_dim,
        max_positions=f.take("max_position_embeddings", int, max_positions),
        norm_eps=float(f.take("rms_norm_eps", float, eps)),
        activation=read_activation(f, *activation),
        tied_head=f.take("tie_word_embeddings", bool, tied),
        **read_ids(f, vocabulary, bos=bos, eos=eos, pad=pad),
    )


def read_ids(f: Fields, vocabulary: int, *, bos: tuple[int, ...] = (), eos: tuple[int, ...] = (),
             pad: tuple[int, ...] = ()) -> dict:
    """The ids of special tokens; the arguments are those of files that do not say."""
    bos, pad = f.take_ids("bos_token_id", vocabulary, bos), f.take_ids("pad_token_id", vocabulary, pad)
    return dict(bos_id=bos[0] if bos else None, eos_ids=f.take_ids("eos_token_id", vocabulary, eos),
                pad_id=pad[0] if pad else None)


def write_ids(c: DecoderConfig) -> dict:
    """The inverse of `read_ids`."""
    eos = list(c.eos_ids)
    return {"bos_token_id": c.bos_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "pad_token_id": c.pad_id}


def take_either(f: Fields, name: str, other: str, default: int) -> int:
    """A count that transformers takes by two names. Raises ConfigError where they differ."""
    first, second = (f.take(one, int, None) for one in (name, other))
    if first is not None and second not in (None, first):
        raise f.refused(other, second, f"'{name}' is {first}; remove the wrong one")
    return next((one for one in (first, second) if one is not None), default)


def read_activation(f: Fields, name: str, default: str) -> str:
    """The activation that a field names, by our name."""
    given = f.take(name, str, default)
    if given not in ACTIVATION_NAMES:
        raise f.refused(name, given, f"only {', '.join(ACTIVATION_NAMES)} are supported; use another model")
    return ACTIVATION_NAMES[given]


def write_shape(c: DecoderConfig, activation: str = "hidden_act") -> dict:
    """The inverse of `read_shape`."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        activation: c.activation,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_head,
        **write_ids(c),
    }


def layer_kinds(windows: tuple[int | None, ...]) -> list[str]:
    """What transformers' `layer_types` calls layers with these windows."""
    return [FULL if window is None else SLIDING for window in windows]


def read_windows(f: Fields, num_layers: int, *, every: int, window: int = 4096) -> tuple[int | None, ...]:
    """The window of each layer by `sliding_window` and `layer_types`; without the latter every `every`th layer has
    none. Raises ConfigError where a layer has to slide and there is no window; `window` is that of files without one.
    """
    window = f.take("sliding_window", int, window, null=True)
    default = [FULL if (i + 1) % every == 0 else SLIDING for i in range(num_layers)]
    return windows_of(f, f.take("layer_types", list, default), window)


def windows_of(f: Fields, kinds: list, window: int | None) -> tuple[int | None, ...]:
    """The window of each layer of these `layer_types`. Raises ConfigError as `read_windows`."""
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise f.refused("layer_types", kind, f"only {FULL} and {SLIDING} are supported; use another model")
        if kind == SLIDING and window is None:
            raise f.refused("layer_types", kinds, "no sliding window is in use; give 'sliding_window' (and set "
                            "'use_sliding_window', where the file has it), or correct 'layer_types'")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def write_windows(c: DecoderConfig) -> dict:
    """The inverse of `read_windows`."""
    return {"sliding_window": max((window for window in c.windows if window is not None), default=None),
            "layer_types": layer_kinds(c.windows)}


def check_layer_kinds(f: Fields, windows: tuple[int | None, ...], why: str) -> None:
    """Raises ConfigError where 'layer_types' is given and is not that of these windows, which `why` explains."""
    given, own = f.take("layer_types", list, None), layer_kinds(windows)
    if given not in (None, own):
        differing = next((i for i, (one, other) in enumerate(zip(given, own, strict=False)) if one != other), None)
        wrong = f"{len(given)} entries" if differing is None else f"{given[differing]!r} for layer {differing + 1}"
        raise ConfigError(f"{f.source}: field 'layer_types' has {shorten(wrong, 100)}, but {why}; remove the field, or "
                          "use a model whose layers are alike")
