"""What every family gives, from one table of tiny models: each method in each, held against the model without a cache.

By default models of four families decode; `--exhaustive` takes every variant, more methods, and gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import on_devices, run_together
from published_configs import PUBLISHED
from published_sizes import whole
from safetensors.numpy import load_file

import sled
from sled.decoding.readout import Readout
from sled.errors import CheckpointWarning
from sled.lm import LM
from sled.models import Decoder, load_folder
from sled.models.families.registry import parse_config
from sled.models.stored import abstract
from sled.train.objective.cross_entropy import exit_cross_entropy
from sled.train.objective.forward import exit_states

FAMILIES = ["qwen3-mha-biases-windows", "gemma", "gemma2", "gemma3_text", "mixtral-window", "gpt_oss",
            "gpt2", "olmo2-mha-biases-yarn", "phi3-longrope-partial-tied"]
BY_DEFAULT = ["qwen3-mha-biases-windows", "gemma3_text", "gpt_oss", "gpt2"]  # what differs most
ROOM = 40  # positions, more than any window and than what a ring of slots holds
PROMPTS = [np.random.RandomState(n).randint(3, 48, n).tolist() for n in (17, 1, 6)]
METHODS = {
    "guessed SLED": dict(fusion=sled.SLED(), exits=sled.SelfSpeculation(1, draft=4, max_draft=5)),
    "sure exits": dict(exits=sled.EarlyExit((1, 2), threshold=1.0)),
    "DoLa": dict(fusion=sled.DoLa(layers=(0, 1, 2))),
}


@pytest.fixture
def everything(variant, request):
    if variant not in BY_DEFAULT and not request.config.getoption("--exhaustive"):
        pytest.skip("models that differ more are tried: run with --exhaustive")
    return variant


@functools.cache
def model_of(folder) -> Decoder:
    model = load_folder(folder)
    model.config = dataclasses.replace(model.config, eos_ids=())
    return model


@pytest.mark.parametrize("method", [
    name if name == "guessed SLED" else pytest.param(name, marks=pytest.mark.exhaustive) for name in METHODS])
def test_texts_are_those_of_the_model_without_a_cache(everything, method, tiny_folder):
    """Every token is the fusion's choice after a full pass: whatever was kept in a ring, guessed, or in another row."""
    model = model_of(tiny_folder(everything))
    lm = LM(model)
    tokens = lm.generate(PROMPTS, max_new_tokens=ROOM - 17, **METHODS[method]).tokens
    readout, layers = Readout(model), model.num_layers
    fusion = METHODS[method].get("fusion", sled.FinalLayer())

    @jax.jit
    def choices(ids_T):
        states = model.hidden_states(ids_T[None])
        return readout.fuse(fusion, {n: states[n, 0] for n in range(layers + 1)}, layers).argmax(-1)

    for prompt, said in zip(PROMPTS, tokens, strict=True):
        assert len(said) == ROOM - 17
        text = np.pad([*prompt, *said], (0, ROOM - len(prompt) - len(said)))
        assert np.asarray(choices(text))[len(prompt) - 1:][:len(said)].tolist() == said


@pytest.mark.exhaustive
def test_scores_are_those_of_the_model_without_a_cache(everything, tiny_folder):
    model = model_of(tiny_folder(everything))
    scores = LM(model).score([PROMPTS[0], PROMPTS[0], PROMPTS[1]], [PROMPTS[2], [5], PROMPTS[0]])
    text = jnp.asarray([*PROMPTS[0], *PROMPTS[2]])
    logits = model.logits(model.hidden_states(text[None])[-1, 0])
    logp = jax.nn.log_softmax(logits)[jnp.arange(16, 22), text[17:]]
    np.testing.assert_allclose(scores.logprobs[0], logp, atol=1e-4)


@pytest.mark.exhaustive
def test_a_step_on_eight_devices_is_that_on_one(tiny_folder, tmp_path):
    run_together([(on_devices(8), ["mesh_of_families.py", tmp_path, *map(tiny_folder, FAMILIES)])])


@pytest.mark.exhaustive
def test_gradients_of_the_fused_loss_are_those_of_plain_logits(variant, tiny_folder):
    """Both forms: the scanned one with the fused loss, the separate one with every layer's logits at once."""
    model = model_of(tiny_folder(variant))
    ids_BT = jnp.asarray(np.random.RandomState(0).randint(3, 48, (2, 12)))
    targets_BT, mask_BT, exits = jnp.roll(ids_BT, -1, 1), jnp.ones((2, 12), bool).at[:, -1].set(False), (1, 3)
    weights_E = jnp.array([0.25, 0.75])

    def fused(state):
        stacked = nnx.merge(graph, state)
        h_EBTD = stacked.normalise(exit_states(stacked, ids_BT, exits))
        return exit_cross_entropy(h_EBTD, stacked.shared_head, targets_BT, mask_BT, weights_E)[0]

    def plain(state):
        separate = nnx.merge(graph, state).unstack()
        states = separate.hidden_states(ids_BT)
        logp = jax.nn.log_softmax(separate.logits(states[jnp.array(exits)]))
        picked = jnp.take_along_axis(logp, targets_BT[None, ..., None], -1)[..., 0]
        return -(weights_E @ (picked * mask_BT).sum((1, 2))) / mask_BT.sum()

    graph, state = nnx.split(model.stack())
    (loss, by), (expected, by_plain) = (jax.jit(jax.value_and_grad(f))(state) for f in (fused, plain))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(by), jax.tree.leaves(by_plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, float(jnp.abs(theirs).max())))


def old_names(weights):
    return {f"language_model.{name}": array for name, array in weights.items()}


def new_names(weights):
    return {name.replace("model.", "model.language_model.", 1): array for name, array in weights.items()}


@pytest.mark.parametrize("names", [old_names, new_names])
@pytest.mark.parametrize("text", ["gemma3_text", "gemma3-old-spelling-untied"])
def test_the_text_model_of_a_multimodal_folder_is_read(names, text, variants, tiny_folder, write_model, tmp_path):
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 7],
             "text_config": {k: v for k, v in variants[text].items() if k not in ("architectures", "eos_token_id")},
             "vision_config": {"hidden_size": 8, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}
    other = {f"{'model.' * (names is new_names)}{part}.weight": np.ones((2, 2), np.float32)
             for part in ("vision_tower.vision_model.post_layernorm", "multi_modal_projector.mm_soft_emb_norm")}
    folder = write_model(tmp_path / "whole", whole, names(load_file(tiny_folder(text) / "model.safetensors")) | other)
    with pytest.warns(CheckpointWarning, match="of this Gemma3ForConditionalGeneration only the text .* vision parts"):
        read = load_folder(folder)
    expected = load_folder(tiny_folder(text))
    assert read.config == dataclasses.replace(expected.config, eos_ids=(1, 7))
    for ours, plain in zip(jax.tree.leaves(nnx.state(read)), jax.tree.leaves(nnx.state(expected)), strict=True):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.filterwarnings("ignore::sled.errors.CheckpointWarning")
def test_the_text_model_of_a_multimodal_folder_by_transformers_says_the_same(transformers, variants, tmp_path):
    import torch

    text = {k: v for k, v in variants["gemma3_text"].items() if k != "architectures"}
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)
    theirs = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=47)).eval()
    theirs.save_pretrained(tmp_path / "whole")
    ids = np.random.RandomState(0).randint(3, 40, (1, 20))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    model = load_folder(tmp_path / "whole")
    np.testing.assert_allclose(model.logits(model.hidden_states(jnp.asarray(ids))[-1]), expected, atol=1e-4)


def test_a_window_bounds_what_a_layer_keeps():
    """K/V of Gemma 3 270M for 32,768 positions: 3 layers keep all of them, 15 keep 512, of 2 KiB each in float32."""
    config = parse_config(whole(PUBLISHED["google/gemma-3-270m"]))
    caches = jax.eval_shape(lambda: abstract(config).empty_caches(1, 32_768, 0))
    full, windowed = 32_768 + 1, 512 + 1  # one more for tokens that are switched off
    assert sum(x.size * 4 for x in jax.tree.leaves(caches)) == 2 * 256 * 4 * (3 * full + 15 * windowed) == 217_092_096
