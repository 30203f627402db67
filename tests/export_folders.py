"""What is exported: a tiny random model; and as a plugin of pytest its folders, with exit heads, and a run's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sled.models import Decoder, DecoderConfig, ExitHeads, save_folder
from sled.models.hub import folder_of
from sled.models.huggingface import write_form
from sled.settings.describe import describe
from sled.train.recipes import named
from sled.train.run.checkpoint import Checkpoints

CONFIG = DecoderConfig(family="llama", vocab_size=47, width=16, mlp_width=24, num_layers=3, num_heads=2,
                       num_kv_heads=1, head_dim=8, max_positions=96, eos_ids=(5,), tied_head=True)
HEADS = ExitHeads((1, 2), "affine")
PROMPTS = [np.random.default_rng(7).integers(6, 47, size=n).tolist() for n in (1, 70, 9)]  # 70 is over a prefill block


def random_decoder(heads=None, seed=1):
    decoder = Decoder.init(CONFIG, rngs=nnx.Rngs(seed))
    nnx.update(decoder, jax.tree.map(lambda x: 6 * x if x.ndim == 2 else x, nnx.state(decoder)))
    return decoder if heads is None else decoder.with_exit_heads(heads, rngs=nnx.Rngs(2))


def same(one: Decoder, other: Decoder) -> bool:
    pairs = zip(*(jax.tree.leaves(nnx.state(model)) for model in (one, other)), strict=True)
    return one.config == other.config and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="session")
def decoder():
    return random_decoder()


@pytest.fixture(scope="session")
def plain_folder(decoder, tmp_path_factory):
    return save_folder(decoder, tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="session")
def headed_folder(tmp_path_factory):
    return save_folder(random_decoder(HEADS), tmp_path_factory.mktemp("headed") / "model",
                       tokenizer_from=folder_of("demo"))


@pytest.fixture(scope="session")
def run_folder(decoder, tmp_path_factory):
    """What a run of two checkpoints leaves, the first one measured."""
    run = tmp_path_factory.mktemp("run")
    (run / "model_config").mkdir()
    write_form(run / "model_config", CONFIG, "float32", folder_of("demo"))
    data = dict(name="/home/ann/data/own.jsonl", digest="ab" * 32, prompt="Q: {q}\n", completion="a", limit=None)
    settings = {"model": {"kind": "sled.NewModel", "name": "new"}, "recipe": describe(named("finetune", steps=2)),
                "data": data, "held_out": None, "prompt_weight": 0.0}
    with Checkpoints(run / "checkpoints", settings, save_every=1) as checkpoints:
        for step in (1, 2):
            weights = jax.tree.map(lambda x: x * step, nnx.state(decoder.stack()))  # noqa: B023
            checkpoints.save(step, {"weights": weights, "optimizer": {"moment": jnp.zeros(3)}}, {})
    lines = [{"step": 1, "loss": 3.0, "held_out": [3.5, 2.25, 2.125], "held_out_accuracy": [0.3, 0.4375, 0.45]},
             {"step": 2, "loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run
