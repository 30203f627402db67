"""The folders that exports are made of, as a plugin of pytest: a model's, one with exit heads, and a training run's."""

import json

import jax
import jax.numpy as jnp
import pytest
from export_models import CONFIG, HEADS, random_decoder
from flax import nnx

from sled.models import save_folder
from sled.models.hub import folder_of
from sled.models.huggingface import write_form
from sled.train.run.checkpoint import Checkpoints


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
    settings = {"model": {"kind": "sled.NewModel", "name": "new"}}
    with Checkpoints(run / "checkpoints", settings, save_every=1) as checkpoints:
        for step in (1, 2):
            weights = jax.tree.map(lambda x: x * step, nnx.state(decoder.stack()))  # noqa: B023
            checkpoints.save(step, {"weights": weights, "optimizer": {"moment": jnp.zeros(3)}}, {})
    lines = [{"step": 1, "loss": 3.0, "held_out": [3.5, 2.25, 2.125], "held_out_accuracy": [0.3, 0.4375, 0.45]},
             {"step": 2, "loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run
