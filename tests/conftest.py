"""Tiny checkpoints of every family and variant, made of fixed random numbers, for all tests."""

import dataclasses
import functools
import gc
import json
import os
import re
import shutil
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import sled
from sled import cli
from sled.errors import CheckpointWarning
from sled.lm import LM
from sled.models import Decoder
from sled.models.families.registry import parse_config
from sled.models.layout import layout, tensor_shapes
from sled.models.stored import parameter_shapes

# Tests compile much and compute little: XLA need not optimise, and its older code generator compiles in half the time.
# Read when jax starts its devices, which is later; the programs beside the tests inherit it.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0",
                                    "--xla_llvm_disable_expensive_passes=true",
                                    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"])
os.environ["SLED_COMPILATION_CACHE"] = "0"  # what tests compile is not for the user's cache folder
# Plugins that tests import from too.
pytest.register_assert_rewrite("training_data", "export_folders", "harness_tasks", "scripted_sweep")
gc.set_threshold(100_000, 20, 100)  # tracing makes many objects that live on; looking through them took a tenth of all

COMPILES = 0.1  # seconds: a test that took less compiled nothing to speak of

# Files that take longest begin: one of them at the end would keep one process waiting for the other.
LONG = ["test_train_trainer.py", "test_train_mesh.py", "test_bench.py", "test_exits.py", "test_notebook.py",
        "test_checkpoint.py", "test_export_program.py", "test_decoding.py", "test_eval_adapter.py", "test_lossless.py",
        "test_fusion_sled.py", "test_engine.py", "test_face.py"]

BASE = dict(vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, hidden_act="silu",
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
LLAMA = dict(BASE, model_type="llama", architectures=["LlamaForCausalLM"])
MISTRAL = dict(BASE, model_type="mistral", architectures=["MistralForCausalLM"])
QWEN2 = dict(BASE, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
QWEN3 = dict(BASE, model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=16)
GEMMA = {**BASE, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "tie_word_embeddings": True}
del GEMMA["hidden_act"]
GPT2 = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=48, n_embd=32, n_layer=3, n_head=4,
            n_positions=64, n_ctx=64, bos_token_id=1, eos_token_id=2)
OLMO2 = dict(BASE, model_type="olmo2", architectures=["Olmo2ForCausalLM"], pad_token_id=3)
PHI3 = dict(BASE, model_type="phi3", architectures=["Phi3ForCausalLM"], pad_token_id=3)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02)
MIXTRAL = dict(BASE, **EXPERTS, model_type="mixtral", architectures=["MixtralForCausalLM"])
QWEN3_MOE = dict(BASE, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], head_dim=16, num_experts=6,
                 num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True)
GPT_OSS = dict(BASE, **EXPERTS, model_type="gpt_oss", architectures=["GptOssForCausalLM"], head_dim=16,
               sliding_window=6)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16)

VARIANTS = {
    "llama": LLAMA,
    "llama-mha-tied": dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
    "llama-linear-old-spelling": dict(LLAMA, rope_theta=1000.0, rope_scaling={"type": "linear", "factor": 4.0},
                                      torch_dtype="float32"),
    "llama-llama3-old-spelling": dict(LLAMA, rope_theta=500.0, rope_scaling=LLAMA3_ROPE),
    "llama-llama3": dict(LLAMA, rope_parameters=dict(LLAMA3_ROPE, rope_theta=500.0), dtype="float32"),
    "llama-biases": dict(LLAMA, attention_bias=True, mlp_bias=True),
    "llama-head-dim": dict(LLAMA, head_dim=16),
    "mistral-window": dict(MISTRAL, sliding_window=6),
    "mistral-head-dim": dict(MISTRAL, sliding_window=None, head_dim=16),
    "qwen2": dict(QWEN2, sliding_window=4),
    "qwen2-tied-upper-layers-slide": dict(QWEN2, tie_word_embeddings=True, use_sliding_window=True,
                                          sliding_window=5, max_window_layers=2),
    "qwen2-layer-types": dict(QWEN2, use_sliding_window=True, sliding_window=5,
                              layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "qwen3": QWEN3,
    "qwen3-mha-biases-windows": dict(QWEN3, num_key_value_heads=4, attention_bias=True, use_sliding_window=True,
                                     sliding_window=7, max_window_layers=1),
    "gemma": dict(GEMMA, model_type="gemma", architectures=["GemmaForCausalLM"], hidden_act="gelu"),
    "gemma2": dict(GEMMA, model_type="gemma2", architectures=["Gemma2ForCausalLM"], sliding_window=6,
                   query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3_text": dict(GEMMA, model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], sliding_window=6,
                   query_pre_attn_scalar=24, rope_parameters={
                       "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=500.0),
                       "sliding_attention": dict(rope_type="default", rope_theta=100.0)},
                   layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "gemma3-old-spelling-untied": dict(
        GEMMA, model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], sliding_window=5,
        sliding_window_pattern=2, rope_theta=500.0, rope_local_base_freq=100.0, final_logit_softcapping=3.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, tie_word_embeddings=False),
    "gpt2": GPT2,
    "gpt2-wide-untied": dict(GPT2, n_inner=48, activation_function="gelu", tie_word_embeddings=False,
                             layer_norm_epsilon=1e-3),
    "olmo2": OLMO2,
    "olmo2-mha-biases-yarn": dict(OLMO2, num_key_value_heads=4, attention_bias=True, rope_theta=500.0, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "phi3": dict(PHI3, sliding_window=6),
    "phi3-longrope-partial-tied": dict(
        PHI3, hidden_size=64, partial_rotary_factor=0.75, original_max_position_embeddings=48, tie_word_embeddings=True,
        rope_scaling={"type": "longrope", "short_factor": [1, 1.5, 2, 2.5, 3, 4], "long_factor": [1, 2, 3, 4, 5, 6]}),
    "mixtral": MIXTRAL,
    "mixtral-window": dict(MIXTRAL, sliding_window=6, head_dim=16),
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe-unnormalised": dict(QWEN3_MOE, norm_topk_prob=False, attention_bias=True, tie_word_embeddings=True),
    "gpt_oss": GPT_OSS,  # with its own YaRN
    "gpt_oss-low-clamp": dict(
        GPT_OSS, swiglu_limit=0.5, attention_bias=False, num_key_value_heads=4, rope_theta=100.0,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, truncate=False)),
}


def tensors(config: dict) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face's names. RandomState: the same numbers in every numpy.

    Names and shapes are the library's own: that transformers has the same is seen by the logits that it gave for them
    (`test_models_decoder.record`).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        ours, random = parse_config(config), np.random.RandomState(0)
    shapes = tensor_shapes(layout(ours, parameter_shapes(ours)))
    centre = {name: 1.0 if "norm" in name or ".ln_" in name else 0.0 for name in shapes}
    return {name: (centre[name] + 0.2 * random.standard_normal(shapes[name])).astype(np.float32)
            for name in sorted(shapes, key=_turn)}


DRAWN = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_layernorm",
         "post_attention_layernorm", "q_norm", "k_norm")


def _turn(name: str) -> tuple:
    """Sorts stored names by when their numbers are drawn: as they were for the answers that tests have on record."""
    layer = re.search(r"\.(\d+)\.", name)
    last = name.startswith(("model.norm", "lm_head"))
    rank = next((i for i, part in enumerate(DRAWN) if part in name), len(DRAWN))
    return last, name.startswith("lm_head"), int(layer[1]) if layer else -1, rank, name.endswith("bias"), name


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="also run the cases that take minutes")


def pytest_configure(config):
    """What one process compiled the others read, in this run and the next. `pytest --cache-clear` forgets it."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not config.pluginmanager.hasplugin("cacheprovider"):
        return  # given by the user, or by the process that started this worker; or `-p no:cacheprovider`
    folder = config.cache.mkdir("jax")
    if sum(file.stat().st_size for file in folder.iterdir()) > 2**30:  # programs of versions long gone
        shutil.rmtree(folder)
    for name, value in (("compilation_cache_dir", str(folder)), ("persistent_cache_min_compile_time_secs", 0.1)):
        os.environ[f"JAX_{name.upper()}"] = str(value)  # for the processes that this one starts
        jax.config.update(f"jax_{name}", value)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if not config.getoption("--exhaustive"):
        for item in items:
            if item.get_closest_marker("exhaustive"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --exhaustive"))


@pytest.fixture(autouse=True)
def forget_programs(monkeypatch):
    """Compiled programs are dropped when they are many: each holds memory maps, of which Linux allows a process
    only so many (65,530 by default), and XLA crashes beyond. Between tests only: many tests count what is compiled."""
    monkeypatch.setattr("sled.decoding.programs.MOST", 10**6)
    begun = time.perf_counter()
    yield
    maps = Path("/proc/self/maps")
    if time.perf_counter() - begun < COMPILES:  # to read the maps takes milliseconds
        return
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def transformers():
    """The library whose models are the oracle."""
    for name in ("torch", "transformers"):
        module = pytest.importorskip(name, reason=f"{name} is not installed: pip install sled-jax[parity]")
    return module


@pytest.fixture(scope="session")
def demo():
    """The bundled model's first four layers, which say what all sixteen say; their programs compile in a fourth of the
    time."""
    whole, layers = sled.load("demo"), 4
    config = dataclasses.replace(whole.config, num_layers=layers, windows=whole.config.windows[:layers])
    model = Decoder.init(config, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.from_flat_state([(path, value) for path, value in nnx.to_flat_state(whole.params)
                                           if path[0] != "layers" or path[1] < layers]))
    return LM(model, whole.text, name="demo", generation=whole.generation)


@pytest.fixture
def command(capsys):
    """`command(*arguments)`: the exit status of `sled`, what it wrote to stdout, and to stderr."""
    return lambda *arguments: (cli.main(list(arguments)), *capsys.readouterr())


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    """The name of each variant in turn."""
    return request.param


@pytest.fixture(scope="session")
def variants() -> dict[str, dict]:
    """Every variant's `config.json`."""
    return VARIANTS


@pytest.fixture(scope="session")
def write_model():
    """`write_model(folder, config, weights=None, **fields)`: a Hugging Face folder of the variant `config` (a name or a
    dict), `fields` changed in its config.json."""

    def write(folder: Path, config: str | dict, weights=None, **fields) -> Path:
        config = {**(VARIANTS[config] if isinstance(config, str) else config), **fields}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors(config) if weights is None else weights, folder / "model.safetensors",
                  metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, write_model):
    """`tiny_folder(name)`: the folder of a variant, written once per run. Do not change it."""
    root = tmp_path_factory.mktemp("tiny")
    return functools.cache(lambda name: write_model(root / name, name))
