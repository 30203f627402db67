"""config.json: released files are accepted, with the published sizes; what is not understood is refused."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from unittest.mock import Mock

import huggingface_hub
import jax
import pytest
from flax import nnx
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from sled.errors import ConfigError, DownloadError
from sled.models import DecoderConfig, LinearScaling, Llama3Scaling, Rope, fetch, read_config
from sled.models.families.registry import format_config, parse_config
from sled.models.huggingface import abstract

USUAL = {  # of all the released files below, unless they say otherwise
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True}
LLAMA_31_8B = {
    **USUAL, "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "transformers_version": "4.43.0.dev0", "vocab_size": 128256}
LLAMA_31_70B = {**LLAMA_31_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                "num_hidden_layers": 80, "eos_token_id": [128001, 128008, 128009]}
MISTRAL_7B = {
    **USUAL, "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "transformers_version": "4.34.0.dev0", "vocab_size": 32000}
QWEN25_7B = {
    **USUAL, "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
    "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
    "transformers_version": "4.40.1", "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064}
QWEN3_8B = {
    **USUAL, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3", "num_hidden_layers": 36,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "transformers_version": "4.51.0", "use_sliding_window": False, "vocab_size": 151936}
RELEASED = {"Llama-3.1-8B": (LLAMA_31_8B, 8_030_261_248), "Llama-3.1-70B": (LLAMA_31_70B, 70_553_706_496),
            "Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096), "Qwen2.5-7B": (QWEN25_7B, 7_615_616_512),
            "Qwen3-8B": (QWEN3_8B, 8_190_735_360)}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_have_the_published_number_of_parameters(name):
    values, published = RELEASED[name]
    config = parse_config(values)
    shapes = nnx.state(abstract(config), nnx.Param)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == published


def test_what_released_configurations_mean():
    config = parse_config(LLAMA_31_70B)
    assert config.rope == Rope(500_000, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert config.norm_eps == 1e-5
    assert config.head_dim == 128 and config.eos_ids == (128001, 128008, 128009)
    assert set(parse_config(MISTRAL_7B).windows) == {4096}
    assert set(parse_config(QWEN25_7B).windows) == {None}  # a window that is not in use
    assert parse_config(QWEN25_7B).qkv_bias and not parse_config(QWEN25_7B).out_bias
    assert parse_config(QWEN3_8B).qk_norm


def test_absent_fields_have_each_familys_defaults(variants):
    def read(name, *absent):
        return parse_config({key: value for key, value in variants[name].items() if key not in absent})

    assert read("llama", "num_key_value_heads").num_kv_heads == 4
    assert read("llama", "max_position_embeddings").max_positions == 2048
    assert read("llama", "rms_norm_eps").norm_eps == 1e-6
    assert read("llama", "eos_token_id", "bos_token_id").eos_ids == (2,)
    assert read("qwen2", "eos_token_id", "bos_token_id").eos_ids == ()
    assert set(read("mistral-window", "sliding_window").windows) == {4096}
    assert read("qwen3", "head_dim").head_dim == 128
    assert read("llama", "architectures").family == read("llama", "model_type").family == "llama"
    upper = read("qwen2-tied-upper-layers-slide", "max_window_layers")
    assert set(upper.windows) == {None}  # from layer 28 on


def test_both_spellings_of_rotary_positions_mean_the_same(variants):
    assert parse_config(variants["llama-llama3"]) == parse_config(variants["llama-llama3-old-spelling"])
    old = parse_config(variants["llama-linear-old-spelling"])
    assert old.rope == Rope(1000, LinearScaling(4.0))
    without = {**LLAMA_31_8B, "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                                               "high_freq_factor": 4}}
    assert parse_config(without).rope.scaling.original_positions == 131072


def test_generation_config_decides_about_token_ids(tmp_path, write_model):
    folder = write_model(tmp_path, "llama", pad_token_id=-1)
    assert read_config(folder).eos_ids == (2,) and read_config(folder).pad_id is None
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [5, 6], "bos_token_id": 7, "pad_token_id": 0, "temperature": 0.6,
        "do_sample": True}))
    config = read_config(folder)
    assert (config.eos_ids, config.bos_id, config.pad_id) == ((5, 6), 7, 0)
    (folder / "generation_config.json").write_text("{}")
    assert read_config(folder).eos_ids == (2,)


@pytest.mark.parametrize("name, fields, says", [
    ("llama", {"sliding_window": 128}, "'sliding_window' is 128, but only None is supported; use a checkpoint without"),
    ("llama", {"hidden_act": "relu6"}, "'hidden_act' is 'relu6', but only silu, swish, gelu"),
    ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config' is .* checkpoint before quantisation"),
    ("llama", {"hidden_size": "32"}, "'hidden_size' is '32', but it must be of type int"),
    ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
    ("llama", {"hidden_size": 30}, "30 is not a multiple of num_attention_heads 4"),
    ("llama", {"num_key_value_heads": 3}, "config.json: 4 query heads cannot share 3"),
    ("llama", {"eos_token_id": "</s>"}, "'eos_token_id' is '</s>', but it must be a token id"),
    ("llama", {"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1, but it must be of type bool"),
    ("llama", {"model_type": "falcon", "architectures": ["FalconForCausalLM"]},
     "'falcon'.*nearest by name is .*; all: llama, .*qwen3"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]},
     "LlamaForSequenceClassification.* of model_type 'llama' only LlamaForCausalLM is read"),
    ("llama", {"architectures": ["MistralForCausalLM"]},
     "architectures are .*Mistral.* of model_type 'llama' only Llama"),
    ("llama", {"rope_scaling": {"type": "axial"}}, "rotary scaling 'axial' is not supported"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "yarn"}},
     "'type' is 'linear' .* 'rope_type' is 'yarn'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' is 0, but it must be above 0"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
    ("llama", {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
     "'rope_theta' .* given as 5.0 and as 6.0"),
    ("llama-llama3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
     "'rope_type' .* 'llama3' and as 'linear'"),
    ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5, but only 1"),
    ("mistral-window", {"sliding_window": 0}, "config.json: an attention window is 0"),
    ("qwen2-layer-types", {"layer_types": ["full_attention"]}, "config.json: 1 attention windows"),
    ("qwen2-layer-types", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention', but only full_attention"),
    ("qwen2-layer-types", {"use_sliding_window": False}, "no sliding window is in use"),
    ("llama", {"rope_scaling": {**LLAMA_31_8B["rope_scaling"], "high_freq_factor": 1.0}},
     "high_freq_factor 1.0 must be above low_freq_factor 1.0"),
])
def test_what_is_not_understood_is_refused_by_name(variants, name, fields, says):
    with pytest.raises(ConfigError, match=says) as error:
        parse_config({**variants[name], **fields})
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


SMALL = DecoderConfig(family="llama", vocab_size=8, width=8, mlp_width=8, num_layers=2, num_heads=2, num_kv_heads=1,
                      head_dim=4, max_positions=8)


@pytest.mark.parametrize("change, says", [
    (dict(family="gpt5"), "'gpt5' is unknown; choose one of llama, mistral"),
    (dict(qkv_bias=True), "out_bias = False cannot be written as a llama config.json"),
    (dict(qk_norm="head"), "qk_norm = 'head' cannot be written"),
    (dict(windows=(3, None)), "windows = .* cannot be written as a llama"),
    (dict(family="qwen2", qkv_bias=True, windows=(3, 5)), "windows = .* cannot be written as a qwen2"),
    # What no family can.
    (dict(num_layers=0), "num_layers is 0"),
    (dict(num_kv_heads=3), "cannot share 3"),
    (dict(head_dim=7), "even number"),
    (dict(windows=(None,)), "one per layer"),
    (dict(windows=(0, None)), "window is 0"),
])
def test_what_a_family_cannot_express_is_not_written(change, says):
    with pytest.raises(ConfigError, match=says):
        format_config(dataclasses.replace(SMALL, **change), "float32")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_damaged_config_json_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config.json .*fetch it again"):
        read_config(tmp_path)


# Fetching from the hub: what is asked for, and what is said when it cannot be had. No network needed.

WANTED = {"config.json", "generation_config.json", "model.safetensors", "model-00001-of-00004.safetensors",
          "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
          "additional_chat_templates/rag.jinja"}


def test_the_folder_is_returned_and_only_model_files_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_text("")
    download = Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("owner/name", "v1") == tmp_path
    (hub_id,), asked = download.call_args
    assert hub_id == "owner/name" and asked["revision"] == "v1"
    files = [*WANTED, "consolidated.safetensors", "pytorch_model.bin", "modeling.py", "onnx/tokenizer.json",
             "onnx/model.safetensors"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects(files, **patterns)) == WANTED


def http(kind):
    # Made without a response: its constructor differs between versions of huggingface_hub.
    return kind.__new__(kind)


@pytest.mark.parametrize("error, says", [
    (http(errors.GatedRepoError),
     "owner/name is gated; accept its terms on https://huggingface.co/owner/name"),
    (http(errors.RepositoryNotFoundError), "owner/name is not on the hub, or private; check the spelling"),
    (http(errors.RevisionNotFoundError), "owner/name has no revision 'v1'; see its branches"),
    (errors.LocalEntryNotFoundError("gone"), "revision v1 is not in the local cache, .* go online"),
    (OSError("disk full\nand more"),
     r"owner/name at revision v1 could not be fetched \(disk full\); try again"),
    (RuntimeError("the connection broke"),  # not all of its errors are an OSError
     r"owner/name at revision v1 could not be fetched \(the connection broke\); try again"),
    (None, "owner/name at revision v1 has no safetensors, and pickles are not loaded; try"),
])
def test_failures_say_what_to_do(error, says, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error, return_value=str(tmp_path)))
    with pytest.raises(DownloadError, match=says) as raised:
        fetch("owner/name", "v1")
    assert "\n" not in str(raised.value)


def test_a_malformed_id_is_refused_by_the_real_client():
    with pytest.raises(DownloadError, match="'a/b/c' is neither a folder nor a hub id"):
        fetch("a/b/c")


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_a_network_the_real_client_fails_soon(environment, tmp_path):
    """In a process of its own: huggingface_hub reads its environment once. Port 9 refuses connections."""
    code = "from sled.models import fetch; fetch('nobody/nothing')"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env={"HF_HOME": str(tmp_path), "PATH": "",
                                                             **environment},
                          capture_output=True, text=True, timeout=60)
    assert time.monotonic() - start < 30
    assert "DownloadError: nobody/nothing is not in the local cache, and the hub is out of" in done.stderr


@pytest.mark.parametrize("wrong", [
    dict(tied_head="no"), dict(tied_head=1), dict(qkv_bias=0), dict(qk_norm=True), dict(mlp_bias=[]),
    dict(out_bias="False"), dict(vocab_size=True), dict(num_layers=1.0), dict(num_layers=2**63)])
def test_flags_and_counts_of_a_configuration_are_what_they_say(wrong):
    plain = dict(family="llama", vocab_size=8, width=8, mlp_width=8, num_layers=1, num_heads=1, num_kv_heads=1,
                 head_dim=8, max_positions=8)
    [name] = wrong
    with pytest.raises(ConfigError, match=f"^{name} is .*, but it must be"):
        DecoderConfig(**plain | wrong)
