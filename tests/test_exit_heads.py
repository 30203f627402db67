"""Exit heads: what they add to the model, in decoding, in training and on disk; and CALM's trained classifier."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import sled
from sled.decoding.network import candidates, read
from sled.errors import CheckpointError, ConfigError, DataError, SettingError
from sled.exits.measures import confidence
from sled.lm import LM
from sled.models import Decoder, DecoderConfig, ExitHeads, exportable, from_pre_exit, load_folder, save_folder
from sled.models.stored import abstract_stacked
from sled.train.exit_classifier import train_classifier
from sled.train.exit_tuning import (
    exit_head_loss,
    merge,
    partition,
    read_exits,
    trainable_paths,
    tuning_loss,
    with_heads,
)
from sled.train.folders import load_onto
from sled.train.mesh import Mesh
from sled.train.placing import Placing
from sled.train.rows import Batch

CONFIG = DecoderConfig(family="llama", vocab_size=47, width=16, mlp_width=24, num_layers=4, num_heads=2,
                       num_kv_heads=1, head_dim=8, max_positions=32, eos_ids=(5,))
KINDS = {f"{kind}{'' if tied else ', untied'}": ExitHeads((1, 3), kind, tied) for kind, tied in (
    ("projection", False), ("norm", True), ("affine", True), ("affine", False), ("mlp", True), ("mlp", False))}
FAST = {"xla_backend_optimization_level": 0}
COUNT = 12
PROMPTS = [np.random.default_rng(7).integers(6, 47, size=n).tolist() for n in (1, 5, 9)]


@pytest.fixture(scope="module")
def bare():
    """Random, with deeper layers that change less and less: early layers are right now and then."""
    decoder = Decoder.init(CONFIG, rngs=nnx.Rngs(1))
    nnx.update(decoder, jax.tree.map(lambda x: 6 * x if x.ndim == 2 else x, nnx.state(decoder)))
    for n, block in enumerate(decoder.layers):
        for weight in (block.attention.o.weight, block.mlp.down.weight):
            weight[...] = weight[...] * 0.4**n
    return decoder


def stirred(model, scale=0.3):
    """The model with exit heads that have moved from where they start."""
    heads, backbone = partition(nnx.state(model))
    key = jax.random.key(3)
    heads = jax.tree.map(lambda x: x + scale * jax.random.normal(key, x.shape, x.dtype) * jnp.std(x, keepdims=True)
                         + 0.1 * scale * jax.random.normal(key, x.shape, x.dtype), heads)
    return nnx.merge(nnx.graphdef(model), merge(heads, backbone))


@pytest.fixture(scope="module")
def headed(bare):
    """`headed(name)`: the model with the heads of KINDS, moved from their start; separate form."""
    return functools.cache(lambda name: stirred(bare.with_exit_heads(KINDS[name], rngs=nnx.Rngs(0))))


def plain_logits(model, h, layer):
    """The head's definition in float64, without any of the model's code; h [..., D]."""
    w = {path: np.float64(x[...]) for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    heads, h = model.config.exit_heads, np.float64(h)
    rms = lambda x, weight: x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * weight  # noqa: E731
    norm, projection = w["norm", "weight"], w["head", "weight"]
    if heads is not None and layer in heads.layers:
        part = lambda *name: w["exit_heads", heads.layers.index(layer), *name]  # noqa: E731
        if heads.kind == "affine":
            h = h + h @ part("affine", "weight") + part("affine", "bias")
        if heads.kind == "mlp":
            x = rms(h, part("mlp_norm", "weight"))
            gate = x @ part("mlp", "gate", "weight")
            h = h + gate / (1 + np.exp(-gate)) * (x @ part("mlp", "up", "weight")) @ part("mlp", "down", "weight")
        norm = part("norm", "weight") if heads.kind in ("norm", "mlp") else norm
        projection = projection if heads.tied else part("projection")
    return rms(h, norm) @ projection.T


def logits_at(model, h, layer):
    head = model.exit_head(layer)
    if head is None:
        return model.logits(h)
    return head.read(h) @ (model.head_weight if head.projection is None else head.projection).T


@pytest.mark.parametrize("name", KINDS)
def test_new_heads_change_no_logit_and_trained_ones_follow_their_definition(bare, headed, name):
    h = jax.random.normal(jax.random.key(0), (3, 2, 5, 16))
    new = bare.stack().with_exit_heads(KINDS[name])
    for layer in (1, 2, 3):
        np.testing.assert_array_equal(logits_at(new, h, layer), bare.logits(h))
    model = headed(name)
    for layer in (1, 2, 3):
        np.testing.assert_allclose(logits_at(model, h, layer), plain_logits(model, h, layer), rtol=2e-4, atol=2e-4)
        assert np.allclose(logits_at(model, h, layer), bare.logits(h), atol=1e-3) == (layer == 2)
    stacked = model.stack()
    for exits in ((1, 3), (2, 3, 4)):
        together = read_exits(stacked, h[:len(exits)], exits)
        for e, n in enumerate(exits):
            head = model.exit_head(n)
            alone = model.normalise(h[e]) if head is None else head.read(h[e])
            np.testing.assert_allclose(together[e], alone, rtol=1e-5, atol=1e-5)
    back = stacked.unstack()
    assert nnx.graphdef(back) == nnx.graphdef(model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))


# Decoding.

@functools.cache
def forward(graph):
    return jax.jit(lambda weights, tokens: nnx.merge(graph, weights).hidden_states(tokens)[:, 0], compiler_options=FAST)


def states_of(bare, ids):
    """Hidden states [L + 1, T, D] of these tokens, by a full pass."""
    graph, weights = nnx.split(bare)
    padded = np.zeros((1, 32), np.int32)
    padded[0, :len(ids)] = ids
    return forward(graph)(weights, padded)[:, :len(ids)]


def slow_early_exit(bare, model, prompt, policy):
    """(tokens, layers), every token through as many layers of a full pass as it needs; heads by their definition."""
    ids, layers = list(prompt), []
    while len(layers) < COUNT and (not layers or ids[-1] != 5):
        states = states_of(bare, ids)[:, -1]
        for layer, limit in zip((*policy.layers, 4), (*policy.threshold, -1), strict=True):
            logits = plain_logits(model, states[layer], layer)
            if layer == 4 or (p := np.exp(logits - logits.max())).max() / p.sum() > limit:
                break
        ids.append(int(logits.argmax()))
        layers.append(layer)
    return ids[len(prompt):], layers


def test_early_exit_speaks_through_the_heads(bare, headed):
    policy, model = sled.EarlyExit((1, 3), threshold=(0.07, 0.052), max_deferred=2), headed("mlp, untied")
    out = LM(model).generate(PROMPTS, max_new_tokens=COUNT, exits=policy)
    assert list(zip(out.tokens, out.exit_layers, strict=True)) == [
        slow_early_exit(bare, model, prompt, policy) for prompt in PROMPTS]
    assert {layer for row in out.exit_layers for layer in row} == {1, 3, 4}


def test_self_speculation_guesses_by_the_heads_and_loses_nothing(bare, headed):
    """The text of plain decoding whatever the heads say; how much is right is theirs."""
    plain = [slow_early_exit(bare, bare, prompt, sled.EarlyExit(1, threshold=(1.0,)))[0] for prompt in PROMPTS]
    model = headed("mlp, untied")
    moved, backbone = partition(nnx.state(model))
    fresh = partition(nnx.state(bare.with_exit_heads(KINDS["mlp, untied"])))[0]
    useless = jax.tree.map(lambda x: -x if x.ndim == 2 and x.shape[0] == 47 else x, fresh)  # its projection
    accepted = []
    for heads in (fresh, moved, useless):
        lm = LM(nnx.merge(nnx.graphdef(model), merge(heads, backbone)))
        out = lm.generate(PROMPTS, max_new_tokens=COUNT, exits=sled.SelfSpeculation(1, draft=3, max_draft=3))
        assert out.tokens == plain
        accepted.append(out.stats.acceptance)
    assert len(set(accepted)) == 3


def test_guesses_are_made_through_the_exits_own_rows(headed):
    model = headed("projection, untied")
    h = jax.random.normal(jax.random.key(0), (2, 16))
    guesser = sled.SelfSpeculation((1, 2), adaptive=True, vocabulary=jnp.array([7, 3])).prepare(model)
    for index, layer in enumerate((1, 2)):
        logits = guesser.project(read(model, h, layer), index)
        np.testing.assert_allclose(logits[:, [7, 3]], plain_logits(model, h, layer)[:, [7, 3]], rtol=1e-4, atol=1e-4)
        assert np.isneginf(np.delete(logits, [7, 3], axis=1)).all()


def test_the_lens_and_fusions_read_by_the_heads(bare, headed):
    model, ids = headed("affine, untied"), PROMPTS[2]
    states = states_of(bare, ids)
    lens = LM(model).lens(ids)
    np.testing.assert_array_equal(lens.top, [plain_logits(model, states[n], n).argmax(-1) for n in range(5)])
    # A tied head reads its layer in a fusion too, whether or not the others are normed; an untied one does not.
    tied = headed("affine")
    for norm in (True, False):
        other = model.normalise(states[2]) if norm else states[2]
        found = candidates(tied, states, (1, 2), norm, 3)
        np.testing.assert_array_equal(found, jnp.stack([read(tied, states[1], 1), other, read(tied, states[3], 3)], 1))
        found = candidates(model, states, (1, 2), norm, 4)
        plain = model.normalise(states[1]) if norm else states[1]
        np.testing.assert_array_equal(found, jnp.stack([plain, other, model.normalise(states[4])], 1))


def test_what_an_untied_head_cannot_do_is_said(headed):
    lm = LM(headed("projection, untied"))
    with pytest.raises(SettingError, match=r"SLED looks at layers \(0,\) at the exit after layer 1, whose head has a "
                                           "projection of its own.* use FinalLayer"):
        lm.generate(PROMPTS, exits=sled.EarlyExit(1), fusion=sled.SLED())


# Settings.

@pytest.mark.parametrize("settings, says", [
    (dict(layers=()), r"layers is \(\), but must be layers of at least 1"),
    (dict(layers=(3, 1)), r"layers is \(3, 1\).* ascending"),
    (dict(layers=(1,), kind="lens"), "kind is 'lens', which is unknown; choose one of projection, norm"),
    (dict(layers=(1,), kind="projection"), "nothing of their own; leave the heads out"),
    (dict(layers=(1,), tied=0), "tied is 0, but must be True or False"),
])
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        ExitHeads(**settings)


def test_exits_lie_below_the_last_layer_and_pre_exits_are_their_inputs(bare):
    assert from_pre_exit((7, 13)) == (6, 12)
    with pytest.raises(SettingError, match="pre-exit layer 1 reads the embeddings"):
        from_pre_exit((1, 2))
    with pytest.raises(ConfigError, match=r"layers \(3, 4\), but a model of 4 layers has early exits 1 to 3"):
        bare.with_exit_heads(ExitHeads((3, 4)))
    with pytest.raises(SettingError, match="no exit heads, so there is nothing to tune"):
        partition(nnx.state(bare))


# On disk.

@pytest.mark.parametrize("name", ["mlp, untied", "norm"])
def test_folders_hold_heads_beside_the_model(headed, bare, tmp_path, name):
    model = headed(name)
    save_folder(model.stack(), tmp_path / "model")
    lm = sled.load(tmp_path / "model")
    assert lm.config.exit_heads == KINDS[name]
    jax.tree.map(np.testing.assert_array_equal, lm.params, nnx.state(model))
    spread = load_onto(tmp_path / "model", Mesh().build(jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(spread), nnx.state(model.stack()))
    save_folder(bare, tmp_path / "bare")
    theirs = {file.name: file.read_bytes() for file in (tmp_path / "bare").iterdir()}
    ours = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert {file: ours.pop(file) for file in theirs} == theirs  # what other libraries read
    assert set(ours) == {"exit_heads.json", "exit_heads.safetensors"}
    with pytest.raises(CheckpointError, match="exits after layers 1, 3 have heads of their own"):
        exportable(model)
    assert exportable(model.with_exit_heads(None)).config == CONFIG
    save_folder(bare, tmp_path / "model")  # over the old one: its heads go with it
    assert load_folder(tmp_path / "model").config == CONFIG


def test_damaged_heads_are_refused(headed, tmp_path):
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
    with pytest.raises(CheckpointError, match=r"exit_heads.safetensors .*damaged|lacks|exit_heads.safetensors"):
        load_folder(tmp_path)


# On a mesh.

def test_every_head_has_a_place_on_the_mesh():
    for name in KINDS:
        config = dataclasses.replace(CONFIG, exit_heads=KINDS[name], mlp_bias=True)
        placing = Placing(config, Mesh(data=2, fsdp=2, tensor=2).abstract(8))
        specs = {at: spec for at, (_, spec) in placing.parameters.items() if at.startswith("exit_heads")}
        wanted = {"affine.weight": P(None, "fsdp", None), "mlp.gate.weight": P(None, "fsdp", "tensor"),
                  "mlp.down.weight": P(None, "tensor", "fsdp"), "norm.weight": P(None, None)}
        assert specs and all(specs.get(f"exit_heads.{at}", spec) == spec for at, spec in wanted.items())
        if not KINDS[name].tied:
            assert specs["exit_heads.projection"] == P(None, None, "fsdp")  # 47 entries do not divide over tensor
        heads, _ = partition(nnx.state(abstract_stacked(config)))
        moments = jax.tree.leaves(placing.shardings(jax.eval_shape(optax.adam(1e-3).init, heads)))
        assert {where.spec for where in moments} == {*specs.values(), P()}  # the counter's


MESH_PROGRAM = """
import sys

import jax
import numpy as np
from flax import nnx

from sled.models import ExitHeads, load_folder
from sled.train.exit_tuning import merge, partition, tuning_loss, with_heads
from sled.train.folders import load_onto
from sled.train.mesh import Mesh
from sled.train.placing import Placing

mesh = Mesh(data=2, fsdp=2, tensor=2).build()
heads = ExitHeads((1, 2), "mlp", tied=False)
tokens = np.random.RandomState(0).randint(0, 48, (8, 6))


def step(model, placing=None):
    graph, weights = nnx.split(model)
    trained, frozen = partition(weights)
    def loss(trained, frozen, tokens):
        return tuning_loss(nnx.merge(graph, merge(trained, frozen)), tokens, tokens, tokens > 0)[0]
    tokens_BT = tokens if placing is None else jax.device_put(tokens, placing.rows)
    where = None if placing is None else (jax.sharding.NamedSharding(mesh, jax.P()), placing.shardings(trained))
    compiled = jax.jit(jax.value_and_grad(loss), out_shardings=where, compiler_options={
        "xla_backend_optimization_level": 0})
    return compiled(trained, frozen, tokens_BT)


alone = with_heads(load_folder(sys.argv[1]).stack(), heads)
spread = with_heads(load_onto(sys.argv[1], mesh), heads, mesh=mesh)
placing = Placing(spread.config, mesh)
weights = nnx.state(spread)
assert jax.tree.all(jax.tree.map(lambda x, where: x.sharding.is_equivalent_to(where, x.ndim), weights,
                                 placing.shardings(weights)))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), nnx.state(alone), weights)
for a, b in zip(jax.tree.leaves(step(alone)), jax.tree.leaves(step(spread, placing)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
"""


def test_heads_are_tuned_on_a_mesh(tiny_folder):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", MESH_PROGRAM, str(tiny_folder("llama"))], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# Tuning.

TOKENS_BT = np.random.RandomState(0).randint(6, 47, (4, 9))


def tuner(model):
    """The parts, and a compiled `run(heads, backbone, tokens, weights_E) -> ((loss, metrics), gradient)`."""
    graph, weights = nnx.split(model)

    def loss(heads, backbone, tokens_BT, weights_E):
        rows = tokens_BT[:, :-1], tokens_BT[:, 1:], jnp.ones((4, 8))
        return tuning_loss(nnx.merge(graph, merge(heads, backbone)), *rows, weights_E)

    heads, backbone = partition(weights)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)
    return heads, backbone, run.lower(heads, backbone, TOKENS_BT, jnp.ones(2)).compile()


@pytest.fixture(scope="module")
def tuned(bare):
    return tuner(with_heads(bare.stack(), ExitHeads((1, 2), "mlp", tied=False)))


def test_tuning_lowers_the_loss_and_touches_nothing_else(bare, tuned):
    heads, backbone, run = tuned
    adam = optax.adam(0.01)
    state, frozen = adam.init(heads), jax.tree.map(np.array, backbone)
    losses = []
    for _ in range(15):
        (loss, _), gradient = run(heads, backbone, TOKENS_BT, jnp.array([1.0, 0.5]))
        change, state = adam.update(gradient, state, heads)
        heads = optax.apply_updates(heads, change)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, backbone, frozen)
    parameters = trainable_paths(nnx.state(with_heads(bare.stack(), ExitHeads((1, 2), "mlp", tied=False))))
    assert len(parameters) == 6 and all(name.startswith("exit_heads.") for name in parameters)
    sizes = [leaf.shape for leaf in jax.tree.leaves(heads)]
    assert [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim] == 2 * sizes


def test_the_loss_of_heads_is_the_plain_one(headed):
    model, exits = headed("mlp, untied"), (1, 3, 4)
    h_EBTD = jax.random.normal(jax.random.key(1), (3, 2, 4, 16))
    targets, mask, weights = TOKENS_BT[:2, :4], np.array([[1, 1, 0, 1.0], [0, 1, 1, 1]]), np.array([0.5, 0.25, 1.0])
    graph, state = nnx.split(model.stack())
    loss, metrics = jax.jit(lambda state, h_EBTD: exit_head_loss(
        nnx.merge(graph, state), h_EBTD, exits, targets, mask, weights), compiler_options=FAST)(state, h_EBTD)
    nll = []
    for h_BTD, n in zip(h_EBTD, exits, strict=True):
        logits = plain_logits(model, h_BTD, n)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll.append(-(np.take_along_axis(logp, targets[..., None], -1)[..., 0] * mask).sum() / mask.sum())
    np.testing.assert_allclose(metrics.nll_E, nll, rtol=1e-5)
    np.testing.assert_allclose(loss, weights @ nll, rtol=1e-5)
    assert metrics.targets == 6
    with pytest.raises(SettingError, match="distill is given, but exits have projections of their own"):
        exit_head_loss(model.stack(), h_EBTD, exits, targets, mask, weights, distill=0.5)


def test_layers_above_the_last_exit_and_backward_passes_below_cost_nothing(monkeypatch):
    """Operations as the lowered program counts them, the loop over layers unrolled so that each is counted."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))

    deep = Decoder.init(dataclasses.replace(CONFIG, num_layers=6, windows=()), rngs=nnx.Rngs(0))

    def operations(last):
        model = with_heads(deep.stack(), ExitHeads((1, last), "norm"))
        graph, weights = nnx.split(model)
        loss = lambda heads, backbone: tuning_loss(  # noqa: E731
            nnx.merge(graph, merge(heads, backbone)), TOKENS_BT, TOKENS_BT, TOKENS_BT > 0)[0]
        return jax.jit(jax.grad(loss)).lower(*partition(weights)).cost_analysis()["flops"]

    h = jnp.zeros((4, 9, 16))
    one = jax.jit(lambda h: deep.run_layers(h, jnp.arange(9)[None], None, 3, 4)[0]).lower(h).cost_analysis()["flops"]
    assert (operations(5) - operations(2)) / one == pytest.approx(3, rel=0.03)


# CALM's classifier.

@pytest.fixture(scope="module")
def toy(bare):
    """A model whose layers do nothing. Exit 1 says what the last layer says after an even token, and 0 after an odd."""
    model = nnx.clone(bare.with_exit_heads(ExitHeads((1,), "projection", tied=False)))
    for block in model.layers:
        for weight in (block.attention.o.weight, block.mlp.down.weight):
            weight[...] = jnp.zeros_like(weight[...])
    table, own = model.embedding.weight, model.exit_heads[0].projection
    table[...] = table[...].at[:, 0].set(jnp.where(jnp.arange(47) % 2, 1.0, -1.0))
    model.head.weight[...] = model.head.weight[...].at[0].set(0)
    own[...] = model.head.weight[...].at[0, 0].set(100)
    return model


@pytest.fixture(scope="module")
def classifier(toy):
    """For exits 1 and 2 of the toy model."""
    rows = np.random.RandomState(1).randint(6, 47, (16, 12)).astype(np.int32)
    batch = Batch(rows, np.ones(rows.shape, np.float32), np.ones(rows.shape, np.int32), np.zeros_like(rows))
    return train_classifier(LM(toy), itertools.repeat(batch), (1, 2), steps=100, rate=0.1, progress=False)


def test_the_classifier_learns_when_an_exit_is_right(toy, classifier):
    ids = jnp.arange(6, 47)
    sure = [confidence("classifier", None, toy.embed(ids), None, classifier, e) for e in range(2)]
    assert (sure[0][::2] > 0.7).all() and (sure[0][1::2] < 0.3).all()
    assert (sure[1] > 0.9).all()  # exit 2 is always right


def test_a_classifier_is_kept_for_its_model(toy, classifier, tmp_path):
    sled.save_classifier(classifier, tmp_path / "c.safetensors", LM(toy))
    found = sled.load_classifier(tmp_path / "c.safetensors", LM(toy))
    jax.tree.map(np.testing.assert_array_equal, found, classifier)
    for other in (toy.with_exit_heads(None), stirred(toy)):
        with pytest.raises(CheckpointError, match="trained for another model"):
            sled.load_classifier(tmp_path / "c.safetensors", LM(other))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is no complete classifier"):
        sled.load_classifier(tmp_path / "cut.safetensors", LM(toy))
    with pytest.raises(SettingError, match=r"trained for exits \(1, 2\), but layers is \(1, 3\)"):
        sled.EarlyExit((1, 3), measure="classifier", classifier=found)
    with pytest.raises(SettingError, match="has weights for 2 exits, but layers names 1"):
        sled.EarlyExit(1, measure="classifier", classifier=dataclasses.replace(found, layers=None))
    with pytest.raises(CheckpointError, match="does not say for which exits"):
        sled.save_classifier(dataclasses.replace(found, layers=None), tmp_path / "c", LM(toy))
    with pytest.raises(DataError, match="end after 0 of 5 steps"):
        train_classifier(toy, [], 1, steps=5, progress=False)
    nothing = Batch(*np.zeros((4, 2, 12), np.int32))
    with pytest.raises(DataError, match="first batch has no token of weight above 0"):
        train_classifier(toy, [nothing], 1, steps=1, progress=False)
