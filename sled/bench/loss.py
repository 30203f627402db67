"""The cost of the multi-exit loss, value and gradient, against its plain form and the products it cannot avoid.

The floor are three products for each exit: logits, and the gradients of hidden states and of the projection. The
first round is the warm-up.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from sled.bench.report import BenchReport, column
from sled.fusion import SharedHead
from sled.settings.rules import Whole
from sled.timing import interleave
from sled.train.objective.cross_entropy import exit_cross_entropy

PLAIN, OURS, FLOOR = "plain", "exit_cross_entropy", "three products"
AGAIN = "logits again in the backward pass"  # the choice that exit_cross_entropy did not take
FEW = "exit_cross_entropy, a quarter of the exits on"
_CHUNK = 512  # of AGAIN


@dataclasses.dataclass
class LossRow:
    """One form. Memory in MB (10^6 bytes) is what the compiled program holds beyond its inputs, results included."""

    form: str = column("form")
    best_s: float = column("best s")
    median_s: float = column("median s")
    over_plain: float = column("x plain")
    over_floor: float = column("x floor")
    memory_mb: float = column("MB")
    memory_over_plain: float = column("MB x plain")


def run_loss_bench(*, vocabulary: int = 32_000, width: int = 768, exits: int = 12, tokens: int = 2048,
                   rounds: int = 2, progress: bool = True) -> BenchReport:
    """Time value and gradient of every form in float32; each takes part in every round. `tokens` is a multiple of 512.

    The plain form is optax's cross-entropy of h @ W.T for each exit, and automatic differentiation.
    """
    Whole(1, hint="it counts the repetitions")("rounds", rounds)
    keys = jax.random.split(jax.random.key(0), 3)
    h_END = jax.random.normal(keys[0], (exits, tokens, width))
    w_VD = jax.random.normal(keys[1], (vocabulary, width)) / width**0.5
    targets_N = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    all_E, few_E = jnp.ones(exits), jnp.float32((exits - 1 - jnp.arange(exits)) % 4 == 0)

    forms = {PLAIN: _gradient(_plain), OURS: _gradient(_ours), AGAIN: _gradient(_again), FLOOR: _three_products}
    compiled = {name: jax.jit(form).lower(h_END, w_VD, targets_N, all_E).compile() for name, form in forms.items()}
    compiled[FEW] = compiled[OURS]
    calls = {name: lambda run=run, weights_E=few_E if name == FEW else all_E: jax.block_until_ready(
        run(h_END, w_VD, targets_N, weights_E)) for name, run in compiled.items()}
    with tqdm(total=rounds * len(calls), desc="sled bench loss", disable=not progress) as bar:
        times = interleave(calls, rounds, bar)
    memory = {name: (run.memory_analysis().temp_size_in_bytes + run.memory_analysis().output_size_in_bytes) / 1e6
              for name, run in compiled.items()}
    rows = [LossRow(form=name, best_s=times[name].best, median_s=times[name].median,
                    over_plain=times[name].best / times[PLAIN].best, over_floor=times[name].best / times[FLOOR].best,
                    memory_mb=memory[name], memory_over_plain=memory[name] / memory[PLAIN]) for name in calls]
    settings = {"vocabulary": vocabulary, "width": width, "exits": exits, "tokens": tokens, "rounds": rounds}
    title = (f"Loss of {exits} exits with its gradient, {tokens} tokens, vocabulary {vocabulary}, width {width}, "
             f"float32, best of {rounds} rounds")
    return BenchReport(title, settings, rows)


def _gradient(loss):
    return jax.value_and_grad(loss, argnums=(0, 1))


def _plain(h_END, w_VD, targets_N, weights_E):
    losses = [optax.softmax_cross_entropy_with_integer_labels(h_ND @ w_VD.T, targets_N).mean() for h_ND in h_END]
    return weights_E @ jnp.stack(losses)


def _ours(h_END, w_VD, targets_N, weights_E):
    mask_N = jnp.ones(targets_N.shape)
    return exit_cross_entropy(h_END[:, None], SharedHead(w_VD), targets_N[None], mask_N[None], weights_E)[0]


def _again(h_END, w_VD, targets_N, weights_E):
    """The plain form of one exit and chunk at a time, whose logits the backward pass computes again."""
    chunk = min(_CHUNK, targets_N.size)

    def step(total, part):
        h_CD, targets_C, weight = part
        return total + weight * optax.softmax_cross_entropy_with_integer_labels(h_CD @ w_VD.T, targets_C).sum(), None

    exits, tokens, width = h_END.shape
    parts = (h_END.reshape(-1, chunk, width), jnp.tile(targets_N.reshape(-1, chunk), (exits, 1)),
             jnp.repeat(weights_E, tokens // chunk))
    return jax.lax.scan(jax.checkpoint(step), 0.0, parts)[0] / tokens


def _three_products(h_END, w_VD, targets_N, weights_E):
    """The products that loss and gradient need, in number and size, with nothing between them."""

    def step(dw_VD, h_ND):
        logits_NV = h_ND @ w_VD.T
        return dw_VD + logits_NV.T @ h_ND, logits_NV @ w_VD

    return jax.lax.scan(step, jnp.zeros_like(w_VD), h_END)
