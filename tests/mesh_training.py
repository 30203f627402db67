"""What the programs that test_train_mesh.py runs have in common: a plain training run, with or without a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sled.models.layers import rotary_angles
from sled.models.sharding.sharding import ROWS

BATCH, LENGTH = 8, 12
OPTIMIZER = optax.adamw(3e-3)
HASTY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class CountedFile:
    """A safetensors file that notes in `asked` the name and number of elements of everything read from it."""

    asked: list = []  # noqa: RUF012

    def __init__(self, path, framework):
        self.file = safetensors.safe_open(path, framework=framework)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return CountedSlice(name, self.file.get_slice(name))


class CountedSlice:
    def __init__(self, name, inner):
        self.name, self.get_shape, self.get_dtype, self.read = name, inner.get_shape, inner.get_dtype, inner.__getitem__

    def __getitem__(self, index):
        part = self.read(index)
        CountedFile.asked.append((self.name, math.prod(part.shape)))
        return part


def tokens_of(step, vocabulary):
    return np.random.RandomState(step).randint(0, vocabulary, (BATCH, LENGTH + 1)).astype(np.int32)


def logits(model, tokens_BT, sharding):
    """Logits of a stacked decoder, everything held in its place where there is a mesh."""
    same = lambda x: x  # noqa: E731
    hold, hold_logits, table = (same,) * 3 if sharding is None else (
        sharding.activations, lambda x_BTV: jax.lax.with_sharding_constraint(
            x_BTV, NamedSharding(sharding.mesh, P(ROWS, None, "tensor"))), sharding.table)
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    angles = rotary_angles(model.config, positions)
    graph, weights_L = nnx.split(model.layers)

    def layer(h_BTD, weights):
        return hold(nnx.merge(graph, weights)(h_BTD, positions, angles, None, None)[0]), None

    h0_BTD = jnp.take(table(model.embedding.weight[...]), tokens_BT, axis=0)
    h_BTD, _ = jax.lax.scan(layer, hold(h0_BTD), weights_L)
    return hold_logits(model.normalise(h_BTD) @ table(model.head_weight).T)


def make_step(graph, sharding):
    """`step(state, tokens) -> (state, loss)`, not compiled; `state` is a pair of weights and optimiser state."""

    def loss_of(weights, tokens_BT):
        targets_BT = tokens_BT[:, 1:]
        said = logits(nnx.merge(graph, weights), tokens_BT[:, :-1], sharding)
        return optax.softmax_cross_entropy_with_integer_labels(said, targets_BT).mean()

    def step(state, tokens_BT):
        weights, optimizer = state
        loss, gradient = jax.value_and_grad(loss_of)(weights, tokens_BT)
        change, optimizer = OPTIMIZER.update(gradient, optimizer, weights)
        return (optax.apply_updates(weights, change), optimizer), loss

    return step


def train(decoder, steps, sharding=None):
    """Losses of so many steps, the decoder after them, and the compiled step."""
    graph, weights = nnx.split(decoder)
    if sharding is None:
        state, feed, compile_ = (weights, OPTIMIZER.init(weights)), jnp.asarray, jax.jit
    else:
        state = (weights, sharding.create(OPTIMIZER.init, weights))
        where = sharding.shardings(state)
        own = sharding.local_rows(BATCH)
        feed = lambda tokens: sharding.batch(tokens[own], BATCH)  # noqa: E731
        compile_ = functools.partial(jax.jit, in_shardings=(where, sharding.rows), out_shardings=(where, None))
    tokens = [feed(tokens_of(number, decoder.config.vocab_size)) for number in range(steps)]
    step = compile_(make_step(graph, sharding)).lower(state, tokens[0]).compile(HASTY)
    losses = []
    for one in tokens:
        state, loss = step(state, one)
        losses.append(float(loss))
    return losses, nnx.merge(graph, state[0]), step
