"""Exit heads: what they add to the model, in decoding, in training and on disk; and CALM's trained classifier."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from headed_models import CONFIG, KINDS, bare, headed, plain_logits
from jax.sharding import PartitionSpec as P
from scipy.special import softmax

import sled
from sled.decoding.readout import Readout
from sled.errors import CheckpointError, ConfigError
from sled.lm import LM
from sled.models import exportable, from_pre_exit, load_folder, save_folder
from sled.models.sharding.load_sharded import load_onto
from sled.models.sharding.mesh import Mesh
from sled.models.sharding.sharding import Sharding
from sled.models.stored import abstract_stacked
from sled.train.objective.exit_heads import merge, partition, read_exits

COUNT = 12
PROMPTS = [np.random.default_rng(7).integers(6, 47, size=n).tolist() for n in (1, 5, 9)]


def logits_at(model, h, layer):
    head = model.exit_head(layer)
    if head is None:
        return model.logits(h)
    if model.config.exit_heads.kind == "block":
        h = jax.jit(jax.vmap(lambda h_BTD: head.run(h_BTD, jnp.arange(h.shape[-2])[None], None)[0]))(h)
    return (head.projection or model.shared_head).project(head.read(h))


@pytest.mark.parametrize("name", KINDS)
def test_new_heads_change_no_logit_and_trained_ones_follow_their_definition(name):
    h = jax.random.normal(jax.random.key(0), (3, 2, 5, 16))
    new = bare().stack().with_exit_heads(KINDS[name])
    for layer in (1, 2, 3):
        np.testing.assert_array_equal(logits_at(new, h, layer), bare().logits(h))
    model = headed(name)
    for layer in (1, 2, 3):
        np.testing.assert_allclose(logits_at(model, h, layer), plain_logits(model, h, layer), rtol=2e-4, atol=2e-4)
        assert np.allclose(logits_at(model, h, layer), bare().logits(h), atol=1e-3) == (layer == 2)
    stacked = model.stack()
    for exits in ((1, 3), (2, 3, 4)):
        together = read_exits(stacked, h[:len(exits)], exits)
        for e, n in enumerate(exits):
            projected = Readout(model).head(n).project(together[e])
            np.testing.assert_allclose(projected, logits_at(model, h[e:e + 1], n)[0], rtol=1e-4, atol=1e-4)
    assert from_pre_exit((2, 4)) == KINDS[name].layers
    back = stacked.unstack()
    assert nnx.graphdef(back) == nnx.graphdef(model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))


# Decoding.

full_pass = functools.cache(lambda: jax.jit(bare().hidden_states))


def states_of(ids):
    """Hidden states [L + 1, T, D] of these tokens, by a full pass."""
    return full_pass()(np.pad(ids, (0, 32 - len(ids)))[None])[:, 0, :len(ids)]


def by_definition(model, prompt, text, policy):
    """The tokens and layers after the prompt and each part of the text: of a full pass, heads by their definition."""
    states, layers = states_of([*prompt, *text]), np.array([*policy.layers, 4])
    logits_LTV = np.stack([plain_logits(model, states[n], n) for n in layers])[:, len(prompt) - 1:-1]
    first_T = (softmax(logits_LTV, axis=-1).max(-1) > np.array([*policy.threshold, -1])[:, None]).argmax(0)
    return logits_LTV[first_T, np.arange(len(text))].argmax(-1).tolist(), layers[first_T].tolist()


def test_early_exit_speaks_through_the_heads():
    policy, model = sled.EarlyExit((1, 3), threshold=(0.07, 0.052), max_deferred=2), headed("block, untied")
    out = LM(model).generate(PROMPTS, max_new_tokens=COUNT, exits=policy)
    for prompt, text, layers in zip(PROMPTS, out.tokens, out.exit_layers, strict=True):
        assert (text, layers) == by_definition(model, prompt, text, policy)
        assert len(text) == COUNT or text[-1] == 5
    assert {layer for row in out.exit_layers for layer in row} == {1, 3, 4}


def test_self_speculation_guesses_by_the_heads_and_loses_nothing():
    """The text of plain decoding whatever the heads say; how much is right is theirs."""
    plain = LM(bare()).generate(PROMPTS, max_new_tokens=COUNT).tokens
    model = headed("block, untied")
    moved, backbone = partition(nnx.state(model))
    fresh = partition(nnx.state(bare().with_exit_heads(KINDS["block, untied"])))[0]
    useless = jax.tree.map(lambda x: -x if x.ndim == 2 and x.shape[0] == 47 else x, fresh)  # its projection
    accepted = []
    for heads in (fresh, moved, useless):
        lm = LM(nnx.merge(nnx.graphdef(model), merge(heads, backbone)))
        out = lm.generate(PROMPTS, max_new_tokens=COUNT, exits=sled.SelfSpeculation(1, draft=3, max_draft=3))
        assert out.tokens == plain
        assert out.stats.accepted == accepted_by_definition(lm.build(lm.params), out.tokens)
        accepted.append(out.stats.accepted)
    assert len(set(accepted)) == 3


def accepted_by_definition(model, texts):
    """How many of three drafts at a time are what a full pass over the text says after layer 1."""
    accepted = 0
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids, at = [*prompt, *text], len(prompt)
        drafts = plain_logits(model, states_of(ids)[1], 1).argmax(-1)
        while at < len(ids):
            right = next((k for k in range(3) if at + k == len(ids) or drafts[at + k - 1] != ids[at + k]), 3)
            accepted, at = accepted + right, at + right + 1
    return accepted


def test_guesses_are_made_through_the_exits_own_rows():
    model = headed("projection, untied")
    h = jax.random.normal(jax.random.key(0), (2, 16))
    for ids, some in (([7, 3], dict(vocabulary=jnp.array([7, 3]))), ([0, 1, 2], dict(first_ids=3))):
        drafter = sled.SelfSpeculation((1, 2), adaptive=True, **some).prepare(Readout(model))
        for index, layer in enumerate((1, 2)):
            logits = drafter.logits({layer: h}, index)
            np.testing.assert_allclose(logits[:, ids], plain_logits(model, h, layer)[:, ids], rtol=1e-4, atol=1e-4)
            assert np.isneginf(np.delete(logits, ids, axis=1)).all()


def test_the_lens_and_fusions_read_by_the_heads():
    model, ids = headed("affine, untied"), PROMPTS[2]
    states = states_of(ids)
    lens = LM(model).lens(ids)
    np.testing.assert_array_equal(lens.top, [plain_logits(model, states[n], n).argmax(-1) for n in range(5)])
    # A tied head reads its layer in a fusion too, whether or not the others are normed; an untied one does not.
    tied = headed("affine")
    for norm in (True, False):
        other = model.normalise(states[2]) if norm else states[2]
        found = Readout(tied).candidates(states, (1, 2), norm, 3)
        np.testing.assert_array_equal(found, jnp.stack(
            [Readout(tied).pre_logits(states, 1), other, Readout(tied).pre_logits(states, 3)], 1))
        found = Readout(model).candidates(states, (1, 2), norm, 4)
        plain = model.normalise(states[1]) if norm else states[1]
        np.testing.assert_array_equal(found, jnp.stack([plain, other, model.normalise(states[4])], 1))


# On disk.

@pytest.mark.parametrize("name", ["block, untied", "norm"])
def test_folders_hold_heads_beside_the_model(tmp_path, name):
    model = headed(name)
    save_folder(model.stack(), tmp_path / "model")
    lm = sled.load(tmp_path / "model")
    assert lm.config.exit_heads == KINDS[name]
    jax.tree.map(np.testing.assert_array_equal, lm.params, nnx.state(model))
    spread = load_onto(tmp_path / "model", Mesh().build(jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(spread), nnx.state(model.stack()))
    save_folder(bare(), tmp_path / "bare")
    theirs = {file.name: file.read_bytes() for file in (tmp_path / "bare").iterdir()}
    ours = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert {file: ours.pop(file) for file in theirs} == theirs  # what other libraries read
    assert set(ours) == {"exit_heads.json", "exit_heads.safetensors"}
    with pytest.raises(CheckpointError, match="exits after layers 1, 3 have heads of their own"):
        exportable(model)
    assert exportable(model.with_exit_heads(None)).config == CONFIG
    save_folder(bare(), tmp_path / "model")  # over the old one: its heads go with it
    assert load_folder(tmp_path / "model").config == CONFIG


def test_damaged_heads_are_refused(tmp_path):
    save_folder(headed("norm"), tmp_path)
    settings = tmp_path / "exit_heads.json"
    written = json.loads(settings.read_text())
    for changed, error, says in (
            (dict(written, layers=[2, 3]), CheckpointError, "lacks 1 of .* tensors: exit_heads.2.norm.weight"),
            (dict(written, depth=2), ConfigError, "field 'depth' .* is not understood"),
            (dict(written, kind="x"), ConfigError, "exit_heads.json: ExitHeads.kind is 'x'"),
            (dict(written, layers=[1, 9]), ConfigError, "early exits 1 to 3")):
        settings.write_text(json.dumps(changed))
        with pytest.raises(error, match=says):
            load_folder(tmp_path)
    settings.write_text(json.dumps(written))
    (tmp_path / "exit_heads.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"exit_heads\.safetensors"):
        load_folder(tmp_path)


# On a mesh.

def test_every_head_has_a_place_on_the_mesh():
    for name in KINDS:
        config = dataclasses.replace(CONFIG, exit_heads=KINDS[name], mlp_bias=True)
        sharding = Sharding(config, Mesh(data=2, fsdp=2, tensor=2).abstract(8))
        specs = {at: spec for at, (_, spec) in sharding.parameters.items() if at.startswith("exit_heads")}
        wanted = {"affine.weight": P(None, "fsdp", None), "mlp.gate.weight": P(None, "fsdp", "tensor"),
                  "mlp.down.weight": P(None, "tensor", "fsdp"), "norm.weight": P(None, None)}
        assert specs and all(specs.get(f"exit_heads.{at}", spec) == spec for at, spec in wanted.items())
        if not KINDS[name].tied:
            assert specs["exit_heads.projection"] == P(None, None, "fsdp")  # 47 entries do not divide over tensor
        heads, _ = partition(nnx.state(abstract_stacked(config)))
        moments = jax.tree.leaves(sharding.shardings(jax.eval_shape(optax.adam(1e-3).init, heads)))
        assert {where.spec for where in moments} == {*specs.values(), P()}  # the counter's
