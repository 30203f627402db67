"""Mixtures of experts: only what a token chose is computed, and nothing depends on who else is in the batch."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from sled.errors import CheckpointError, ConfigError
from sled.models import Decoder, DecoderConfig, Experts, load_folder, save_folder
from sled.models.layers import experts as layer
from sled.models.layers.experts import ExpertMLP
from sled.train.data.rows import TrainingBatch
from sled.train.objective.balance import balance_loss
from sled.train.objective.forward import exit_states, states_and_routing
from sled.train.objective.layer_dropout import LayerDropout, WholeBatch
from sled.train.objective.train_step import init_state, make_train_step
from sled.train.recipes import Recipe
from sled.train.run.throughput import flops_per_token

CONFIG = DecoderConfig(family="mixtral", vocab_size=24, width=16, mlp_width=32, num_layers=2, num_heads=2,
                       num_kv_heads=1, head_dim=8, max_positions=64, experts=Experts(4, 2, 32))
GPT_OSS = dataclasses.replace(
    CONFIG, family="gpt_oss", mlp_bias=True, qkv_bias=True, out_bias=True, sinks=True, windows=(4, None),
    experts=Experts(6, 2, 32, clamp=(1.7, 0.1)))
TOKENS_BT = jnp.asarray(np.random.RandomState(0).randint(0, 24, (3, 11)))
close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


@functools.cache
def decoder(config):
    """With weights and biases large enough to matter."""
    graph, state = nnx.split(Decoder.init(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return nnx.merge(graph, tree.unflatten([leaf + 0.3 * jax.random.normal(key, leaf.shape)
                                            for leaf, key in zip(leaves, keys, strict=True)]))


def everything(mlp: ExpertMLP, x_ND):
    """The definition: every expert for every token, times its share or 0."""
    e, logits_NX = mlp.experts, mlp.router(x_ND)
    chosen_NX = logits_NX >= jnp.sort(logits_NX, axis=-1)[:, [-e.chosen]]
    share_NX = jax.nn.softmax(jnp.where(chosen_NX, logits_NX, -jnp.inf) if e.normalised else logits_NX) * chosen_NX

    def products(x, part):
        return jnp.matmul(x, part.weight[...]) + (0 if part.bias is None else part.bias[:, None])

    hidden = layer._form(mlp.activation, e.clamp, products(x_ND, mlp.gate), products(x_ND, mlp.up))
    return jnp.einsum("xno,nx->no", products(hidden, mlp.down), share_NX)


@pytest.mark.parametrize("config", [GPT_OSS, dataclasses.replace(CONFIG, experts=Experts(7, 3, 48, False))])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("way", ["in_blocks", "in_groups"])
def test_what_is_chosen_is_computed_forward_and_backward(way, tokens, config, monkeypatch):
    """By either way, with stretches of a third or half of F, with fewer pairs than experts and with more."""
    monkeypatch.setattr(layer, "CACHE_BYTES", 1100)
    monkeypatch.setattr(layer, "in_blocks", getattr(layer, way))
    graph, state = nnx.split(decoder(config).layers[0].mlp)
    x_ND = jax.random.normal(jax.random.key(tokens), (tokens, config.width))

    def run(function):
        def loss(state, x_ND):
            y_ND = function(nnx.merge(graph, state), x_ND)
            return (y_ND * jnp.cos(jnp.arange(y_ND.size).reshape(y_ND.shape))).sum(), y_ND
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x_ND)

    ours, expected = run(lambda mlp, x_ND: mlp(x_ND[None])[0][0]), run(everything)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), ours, expected)


def test_what_was_not_chosen_is_not_read():
    """Nor are all experts converted or copied: the memory beside the weights is less than a third of theirs."""
    matrices = layer.Matrices(*(jnp.full((8, 256, 256), jnp.nan, jnp.bfloat16) for _ in range(3)), None, None)
    chosen_NA = jnp.array([[5, 2]])
    matrices = matrices.map(lambda array, _: array.at[chosen_NA[0]].set(1.0))
    run = jax.jit(functools.partial(layer.in_blocks, lambda gate, up: gate * up)).lower(
        matrices, jnp.ones((1, 256), jnp.bfloat16), chosen_NA, jnp.full((1, 2), 0.5)).compile()
    np.testing.assert_array_equal(run(matrices, jnp.ones((1, 256), jnp.bfloat16), chosen_NA, jnp.full((1, 2), 0.5)),
                                  jnp.full((1, 256), 256.0 ** 3))
    assert run.memory_analysis().temp_size_in_bytes < matrices.gate.nbytes


@pytest.mark.parametrize("config", [CONFIG, GPT_OSS])
def test_a_row_does_not_depend_on_the_others(config):
    model = decoder(config)
    run = jax.jit(lambda tokens_BT: model.hidden_states(tokens_BT)[-1])
    whole = run(TOKENS_BT)
    close(run(TOKENS_BT[:, ::-1].at[1].set(TOKENS_BT[1]))[1], whole[1])
    close(run(jnp.repeat(TOKENS_BT[2:], 3, axis=0))[0], whole[2])
    close(run(TOKENS_BT[:1]), whole[:1])


def test_gradients_of_both_forms_are_equal():
    graph, state = nnx.split(decoder(GPT_OSS))
    stacked_graph, stacked = nnx.split(decoder(GPT_OSS).stack())

    @jax.jit
    @jax.grad
    def of_separate(state):
        return jnp.square(nnx.merge(graph, state).hidden_states(TOKENS_BT)[-1]).mean()

    @jax.jit
    @jax.grad
    def of_stacked(state):
        return jnp.square(exit_states(nnx.merge(stacked_graph, state), TOKENS_BT, (2,))).mean()

    separate = nnx.state(nnx.merge(graph, of_separate(state)).stack())
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), of_stacked(stacked), separate)
    assert all(jnp.isfinite(leaf[...]).all() and (leaf[...] != 0).any() for path, leaf in nnx.to_flat_state(separate)
               if path[0] == "layers" and path[-2:] != ("k", "bias"))  # which moves all scores alike


def test_padding_and_dropped_layers_count_as_not_routed():
    model = decoder(CONFIG).stack()
    segments_BT = jnp.ones(TOKENS_BT.shape, jnp.int32).at[1, 7:].set(0)
    run = functools.partial(states_and_routing, model, TOKENS_BT, (2,), segments_BT=segments_BT)
    whole, dropping = run()[1], LayerDropout(0.99, strategy=WholeBatch(), rescale=False)
    assert whole.tokens_B == 2 * (33 - 4) and whole.chosen_BX.sum() == 2 * whole.tokens_B
    np.testing.assert_allclose(whole.probability_BX.sum(), whole.tokens_B, rtol=1e-6)
    counted = {int(run(drops=dropping.draw(jax.random.key(0), step, 3, 2))[1].tokens_B) for step in range(3)}
    assert counted == {29}  # the first layer is never dropped
    assert balance_loss(whole) >= 2 - 0.5  # of choices all alike it is A


def in_four_bits(folder):
    """Writes a model of random weights into `folder`, its experts in MXFP4; returns their matrices by name."""
    random = np.random.RandomState(0)
    config = dataclasses.replace(GPT_OSS, width=64, experts=dataclasses.replace(GPT_OSS.experts, width=32))
    save_folder(decoder(config), folder, dtype="bfloat16")
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, inside, columns = tensors.pop(name).shape
        codes = random.randint(0, 16, (experts, columns, inside // 32, 32))
        exponents = random.randint(118, 128, (experts, columns, inside // 32))
        tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).astype(np.uint8)
        tensors[f"{name}_scales"] = exponents.astype(np.uint8)
        table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        numbers = np.array(table + [-one for one in table])[codes] * 2.0 ** (exponents[..., None] - 127)
        expected[name] = numbers.reshape(experts, columns, inside).swapaxes(1, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "mxfp4"}}))
    return expected


def test_matrices_in_four_bits_are_read(tmp_path):
    """Against the numbers written out; a part of them as the whole."""
    expected, folder = in_four_bits(tmp_path / "model"), tmp_path / "model"
    written = load_file(save_folder(load_folder(folder), tmp_path / "out") / "model.safetensors")
    for name, numbers in expected.items():
        np.testing.assert_array_equal(written[name].astype(np.float64), numbers)
    tensors = load_file(folder / "model.safetensors")
    shortened = next(name for name in tensors if name.endswith("_scales"))
    save_file({**tensors, shortened: tensors[shortened][:, 1:]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="are no matrices in MXFP4"):
        load_folder(folder)


def test_a_folder_in_four_bits_says_what_transformers_says(transformers, tmp_path):
    import torch

    in_four_bits(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(np.asarray(TOKENS_BT))).logits.numpy()
    model = load_folder(tmp_path / "model", dtype="float32")
    np.testing.assert_allclose(model.logits(model.hidden_states(TOKENS_BT)[-1]), expected, rtol=1e-4,
                               atol=1e-4 * np.abs(expected).max())


def test_arithmetic_of_training_counts_the_experts_that_a_token_goes_through():
    count = lambda experts: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(  # noqa: E731
        nnx.eval_shape(lambda: Decoder.init(dataclasses.replace(GPT_OSS, experts=experts), rngs=nnx.Rngs(0))))))
    routers = 2 * 17 * (6 - 2)
    few = dataclasses.replace(GPT_OSS.experts, count=2)
    flops = [flops_per_token(dataclasses.replace(GPT_OSS, experts=experts), count(experts), 0, 8).model
             for experts in (GPT_OSS.experts, few)]
    assert flops[0] == flops[1] + 6 * routers


@pytest.mark.parametrize("given, says", [
    (dict(count=0), "count of the experts is 0"), (dict(chosen=9), "chosen of the experts is 9, .* from 1 to 4"),
    (dict(width=0), "width of the experts is 0"), (dict(balance=-1.0), "balance of the experts is -1.0"),
    (dict(clamp=(1.0, 0.0)), "clamp of the experts is .* above 0")])
def test_odd_experts_are_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        Experts(**{"count": 4, "chosen": 2, "width": 8, **given})


def test_training_goes_down_the_balance_too():
    config = dataclasses.replace(CONFIG, experts=dataclasses.replace(CONFIG.experts, balance=0.5))
    model, optimizer, recipe = decoder(config).stack(), optax.sgd(0.1), Recipe(steps=2, batch_size=3, context=11)
    batch = TrainingBatch(np.asarray(TOKENS_BT), np.ones((3, 11), np.float32), np.ones((3, 11), np.int32))
    state = init_state(nnx.split(model)[1], optimizer)
    _, metrics = make_train_step(model, recipe, optimizer)(state, batch, None)
    balance = balance_loss(states_and_routing(model, TOKENS_BT, (2,))[1])
    np.testing.assert_allclose(metrics.loss - metrics.nll_E[-1], 0.5 * balance, rtol=1e-4)
