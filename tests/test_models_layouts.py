"""Folders as people have them: layouts that mean the same, faults that are named, files that would never end."""

import json
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import sled
from sled.errors import CheckpointError, ConfigError, SledError
from sled.models import load_folder, read_config
from sled.models.config import MOST_LAYERS
from sled.models.sharding.load_sharded import load_onto

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = ["llama-mha-tied", "qwen2-tied-upper-layers-slide"]
FAMILIES = ["llama-biases", "mistral-window", "qwen2-layer-types", "qwen3", "mixtral-window", "gpt_oss",
            "phi3-longrope-partial-tied", *TIED]


def head_alone(weights):
    return {HEAD if name == EMBED else name: array for name, array in weights.items()}


def base_names(weights):
    return {name.removeprefix("model."): array for name, array in weights.items()}


def double(weights):
    return {name: array.astype(np.float64) for name, array in weights.items()}


def some_double(weights):
    return {name: array.astype(np.float64 if "norm" in name else np.float32) for name, array in weights.items()}


def both(weights):
    return {**weights, HEAD: weights[EMBED].copy()}


LAYOUTS = [(one, name) for one, names in [
    (base_names, FAMILIES), (head_alone, TIED), (both, TIED), (double, FAMILIES), (some_double, ["llama-biases"]),
    (lambda w: base_names(head_alone(w)), TIED), (lambda w: double(base_names(both(w))), TIED)] for name in names]


@pytest.mark.parametrize("layout, name", LAYOUTS)
def test_layouts_that_mean_the_same_are_read_alike(layout, name, tiny_folder, tmp_path, write_model):
    folder = write_model(tmp_path / "in", name, layout(load_file(tiny_folder(name) / "model.safetensors")))
    expected = nnx.to_flat_state(nnx.state(load_folder(tiny_folder(name))))
    for (path, plain), (_, read) in zip(expected, nnx.to_flat_state(nnx.state(load_folder(folder))), strict=True):
        assert read.dtype == jnp.float32
        np.testing.assert_array_equal(plain[...], read[...], err_msg=str(path))
    mesh = jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "stage", "tensor"))
    whole = nnx.to_flat_state(nnx.state(load_onto(folder, mesh)))
    for (path, plain), (_, read) in zip(nnx.to_flat_state(nnx.state(load_folder(folder).stack())), whole, strict=True):
        np.testing.assert_array_equal(plain[...], read[...], err_msg=str(path))


@pytest.mark.parametrize("name", TIED)
def test_exports_of_base_models_by_transformers_are_read(name, tiny_folder, tmp_path):
    torch, transformers = (pytest.importorskip(one, reason=f"{one} is not installed: pip install sled-jax[parity]")
                           for one in ("torch", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(name))
    model.model.save_pretrained(tmp_path / "base")
    tokens = np.arange(20)[None]
    decoder = load_folder(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == [type(model.model).__name__]
    with torch.no_grad():
        np.testing.assert_allclose(decoder.logits(decoder.hidden_states(jnp.asarray(tokens))[-1]),
                                   model(torch.tensor(tokens)).logits.numpy(), atol=1e-4, rtol=0)


def without(*ends):
    return lambda weights: {name: array for name, array in weights.items() if not name.endswith(ends)}


def renamed(old, new):
    return lambda weights: {name.replace(old, new): array for name, array in weights.items()}


def more(**arrays):
    return lambda weights: {**weights, **{name.replace("__", "."): np.ones(shape, np.float32)
                                          for name, shape in arrays.items()}}


@pytest.mark.parametrize("change, says", [
    (without(HEAD), f"lacks 1 of 30 tensors: {HEAD}; the base model was saved without its head"),
    (lambda w: base_names(without(HEAD)(w)), f"lacks 1 of 30 tensors: {HEAD}; the base model was saved without its"),
    (renamed("model.", "transformer.h."), "lacks 29 of 30 tensors: .* and holds 29 tensors .*another model's"),
    (lambda w: {f"base_model.{name}.lora_A.weight": np.ones((2, 2), np.float32) for name in w},
     "lacks 30 of 30 .*they are another kind of model's, or an adapter's: use the folder of a whole model"),
    (renamed("q_proj.weight", "q_proj.qweight"), "lacks 3 of 30 .* and holds 3 .*; they are quantised: use the"),
    (more(model__layers__0__mlp__up_proj__weight_scale=(1,)), "holds 1 tensors .*; they are quantised"),
    (more(model__layers__3__mlp__up_proj__weight=(1,)), "holds 1 .*config.json asks for 3 layers, but 4 are stored"),
    (lambda w: {name: array for name, array in w.items() if ".layers.2." not in name},
     "lacks 9 of 30 .*config.json asks for 3 layers, but 2 are stored: use the config.json of these"),
    (without("1.input_layernorm.weight"), "lacks 1 of 30 .*the files are incomplete"),
    (more(model__layers__0__self_attn__q_norm__weight=(8,)), "holds 1 .*correct config.json or remove them"),
    (more(**{EMBED.replace(".", "__"): (50, 32)}), r"has shape \(50, 32\), but config.json asks for \(48, 32\)"),
    (lambda w: {**w, EMBED: w[EMBED].astype(np.float64) * 1e300}, "values up to .*, too large for float32; the model"),
    (lambda w: {**w, EMBED: np.full_like(w[EMBED], np.nan, np.float64)}, f"{EMBED} holds values that are not finite"),
])
def test_what_is_wrong_with_the_tensors_is_said(change, says, tiny_folder, tmp_path, write_model):
    weights = load_file(tiny_folder("llama") / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        load_folder(write_model(tmp_path / "in", "llama", change(weights)))


def given(folder, **fields):
    """The folder, these fields changed in its config.json and nothing in its weights."""
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **fields}))
    return folder


COUNTS = ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads",
          "num_key_value_heads", "head_dim")
BEYOND = (0, -1, 200_000, 10**9, 2**31 - 1, 2**63, -2**70, 10**400, 1e39, True, "3", [3])


@pytest.mark.parametrize("name", COUNTS)
def test_no_count_is_built_that_the_weights_do_not_have(name, tmp_path, write_model):
    folder = write_model(tmp_path, "llama")
    for value in BEYOND:
        with pytest.raises((ConfigError, CheckpointError)) as error:
            load_folder(given(folder, **{name: value}))
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name, values", [
    ("max_position_embeddings", (0, -5, 2**31, 2**63, 10**400, 1e39)),
    ("eos_token_id", (2**31, 2**63, 10**400, 1e3, [2, 2**63], "2")),
    ("bos_token_id", (2**31, -2**70, 10**400, True, {"a": 1})),
    ("rope_theta", (0, -1.0, 1e39, 10**400, "1", float("inf"), float("nan"))),
    ("rms_norm_eps", (-1e-6, 1e39, 10**400, float("nan"), "1e-6")),
    ("sliding_window", (0, -4, 2**31, 2**63, 10**400, 4.5)),
    ("rope_scaling", tuple({"rope_type": "linear", "factor": factor} for factor in (0, 1e39, 10**400, "2", None))),
    ("rope_scaling", tuple({"rope_type": kind, "factor": 2.0} for kind in ("yarns", "ntk", "", 3, ["linear"]))),
    ("architectures", (["X" * 10_000], [[["LlamaForCausalLM"]]], "MistralForCausalLM", [3], [None])),
])
def test_no_number_is_taken_that_cannot_be_computed_with(name, values, variants):
    for value in values:
        with pytest.raises(ConfigError) as error:
            sled.models.families.registry.parse_config({**variants["mistral-window"], name: value})
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name, value", [
    ("rope_theta", 10**30), ("rope_theta", 3 * 10**38), ("rope_theta", 1), ("rms_norm_eps", 10**30),
    ("rms_norm_eps", 0), ("max_position_embeddings", 2**31 - 1)])
def test_numbers_at_the_edge_are_computed_with(name, value, tmp_path, write_model):
    lm = sled.load(given(write_model(tmp_path, "llama"), **{name: value}))
    assert np.isfinite(lm.score([1, 2], [3]).totals).all()


def test_as_many_layers_as_there_may_be_are_compared_without_being_built(tmp_path, write_model):
    folder = write_model(tmp_path, "llama")
    with pytest.raises(CheckpointError, match=f"config.json asks for {MOST_LAYERS} layers, but 3 are stored"):
        load_folder(given(folder, num_hidden_layers=MOST_LAYERS))
    with pytest.raises(ConfigError, match=f"'num_hidden_layers' is {MOST_LAYERS + 1}, but it can be at most"):
        load_folder(given(folder, num_hidden_layers=MOST_LAYERS + 1))


def test_token_ids_outside_the_vocabulary_are_none_and_are_named(tmp_path, write_model):
    folder = write_model(tmp_path, "llama", eos_token_id=[2, 48, 50_256], pad_token_id=48)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 99}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        config = read_config(folder)
    assert (config.eos_ids, config.pad_id, config.bos_id) == ((2,), None, 1)
    assert ("passed over pad_token_id 48, eos_token_id 48, eos_token_id 50256 (no tokens of the vocabulary)"
            in str(seen[0].message) + str(seen[1].message))


ODD_TEXTS = ["[" * 100_000, '{"a":' * 100_000, "{", '{"a": ' + "9" * 5000 + "}", "null", "[]", '"a"',
             '{"a": ' + "[" * 300 + "]" * 300 + "}", b"\xff", b"\xff\xfe{}", b"{\"a\": \"\xe9\"}", b""]
JSON_FILES = ["config.json", "generation_config.json", "exit_heads.json", "model.safetensors.index.json",
              "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]


def with_tokenizer(folder):
    """The folder, with a tokenizer of its own."""
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}))
    return folder


@pytest.mark.parametrize("name", JSON_FILES)
def test_files_that_are_no_json_object_are_named(name, tmp_path, write_model):
    folder = with_tokenizer(write_model(tmp_path, "llama"))
    if "index" in name:
        (folder / "model.safetensors").unlink()
    for text in ODD_TEXTS:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(SledError, match=f"{name} (holds|cannot be read|is damaged)"):
            sled.load(folder)


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors", "model-00001-of-00001.safetensors",
                                  "exit_heads.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_never_opened(name, kind, tmp_path, write_model):
    folder = with_tokenizer(write_model(tmp_path, "llama"))
    if "index" in name or "-of-" in name:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBED: name}}))
    if name == "exit_heads.safetensors":
        (folder / "exit_heads.json").write_text(json.dumps({"layers": [1], "kind": "norm", "tied": True}))
    (folder / name).unlink(missing_ok=True)
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[kind]
    make(folder / name)
    with pytest.raises(SledError, match=f"{name} is (no regular file|a folder, a pipe or a device)"):
        sled.load(folder)


@pytest.mark.parametrize("header", [
    b"", b"\0" * 8, b"\xff" * 8, b"\x08" + b"\0" * 7 + b"{[[[[[[[", (2**40).to_bytes(8, "little"),
    (9).to_bytes(8, "little") + b'{"a": [1}', (2 * 10**5).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995,
])
def test_weights_with_a_damaged_header_are_named(header, tmp_path, write_model):
    folder = write_model(tmp_path, "llama")
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        load_folder(folder)


def test_the_same_bounds_hold_where_weights_are_in_orbax(tmp_path, tiny_folder):
    folder = sled.models.save_orbax(load_folder(tiny_folder("llama")), tmp_path / "orbax")
    values = json.loads((folder / "config.json").read_text())
    for name, value in (("num_hidden_layers", MOST_LAYERS), ("num_hidden_layers", 10**9), ("vocab_size", 10**9),
                        ("hidden_size", 2**63), ("intermediate_size", 2**31 - 1)):
        with pytest.raises((CheckpointError, ConfigError)):
            sled.load(given(folder, **{**values, name: value}))


def test_a_file_of_many_shards_saves_and_reads(tiny_folder, tmp_path, write_model):
    weights = base_names(double(load_file(tiny_folder("llama") / "model.safetensors")))
    folder = write_model(tmp_path, "llama", weights)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for i in range(3):
        save_file({name: weights[name] for name in names[i::3]}, folder / f"model-0000{i + 1}-of-00003.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}}))
    plain = load_folder(tiny_folder("llama")).embedding.weight[...]
    np.testing.assert_array_equal(load_folder(folder).embedding.weight[...], plain)
