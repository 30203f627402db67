"""Fusion by need: what the final layer decides by itself stays as it is, and is not projected again."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sled
from sled.decoding import need
from sled.fusion import SLED, DoLa, SharedHead, latent_bound, partial
from sled.fusion.partial import max_and_index
from sled.fusion.statistics import early_sums, layer_statistics
from sled.fusion.strategy import per_row
from sled.settings.decorator import setting
from sled.settings.decorator import settings as settings_class

V = 53


@jax.jit
def choices(strategy, logits_BCV):
    """What is certain, the final layer's token, and the fusion's, [B] each."""
    best = lambda l_BV: max_and_index(l_BV)[1][:, 0]  # noqa: E731
    final_BV = logits_BCV[:, -1]
    return strategy.certain(final_BV), best(final_BV), best(strategy.logits(logits_BCV, SharedHead(jnp.eye(V))))


@st.composite
def cases(draw):
    """64 rows of logits [B, C, V], the best two of the final layer at any distance, ties included."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = draw(st.sampled_from([0.3, 2.0, 20.0])) * rng.standard_normal((64, 4, V))
    first, second = np.argsort(-logits[:, -1])[:, :2].T
    rows = np.arange(64)
    logits[rows, -1, first] = logits[rows, -1, second] + rng.uniform(0, draw(st.sampled_from([1e-6, 1, 5, 30])), 64)
    if draw(st.booleans()):  # early layers that speak for the second token alone
        logits[:, :-1] = logits[:, -1:]
        logits[rows, :-1, second] -= rng.uniform(0, 3, (64, 1))
    return logits.astype(np.float32)


STRATEGIES = [
    *(functools.partial(SLED, steps=steps, temperature=tau, log_softmax=log, lower_bound=bound, max_scale=16)
      for steps, tau, log, bound in [(1, 1.0, False, -1000.0), (1, 0.3, True, -np.inf), (1, 3.0, False, 0.5),
                                     (4, 1.0, False, -1000.0)]),
    lambda rate, scale: DoLa(relative_top=np.clip(rate / 3, 1e-3, 1).astype(np.float32)),
    lambda rate, scale: DoLa(relative_top=np.clip(rate / 3, 1e-3, 1).astype(np.float32), lower_bound=-2.0)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=25, deadline=None)
@given(logits=cases(), seed=st.integers(0, 100))
def test_what_is_certain_does_not_change(strategy, logits, seed):
    rng = np.random.default_rng(seed)
    rate = rng.choice([0, 0.1, 0.5, 1, 2, 3, 10], 64).astype(np.float32)
    certain_B, final_B, fused_B = map(np.asarray, choices(strategy(rate, scale=rng.integers(1, 17, 64)), logits))
    np.testing.assert_array_equal(final_B[certain_B], fused_B[certain_B])


def choices_by_layer(strategy, logits_BCV, asked_B):
    """As `choices`, of what is certain by single layers."""
    best = lambda l_BV: max_and_index(l_BV)[1][:, 0]  # noqa: E731
    head, final_BV = SharedHead(jnp.eye(V)), logits_BCV[:, -1]
    return (strategy.certain_by_layer(final_BV, logits_BCV, head, asked_B), best(final_BV),
            best(strategy.logits(logits_BCV, head)))


@pytest.mark.parametrize("few", [2, 0])  # layers projected one by one, or none
@pytest.mark.parametrize("strategy", STRATEGIES[:3])
def test_what_is_certain_by_layer_does_not_change(strategy, few, monkeypatch):
    monkeypatch.setattr(latent_bound, "FEW_LAYERS", few)
    monkeypatch.setattr(latent_bound, "PROBE", 5)
    decide, rng, settled = jax.jit(choices_by_layer), np.random.default_rng(0), 0

    @settings(max_examples=25, deadline=None)
    @given(logits=cases(), near=st.booleans())
    def check(logits, near):
        nonlocal settled
        rate, asked_B = rng.choice([0, 0.1, 0.5, 1, 2, 3, 10], 64).astype(np.float32), rng.random(64) < 0.8
        if near:  # layers near the final one, each by another distance
            logits[:, :-1] = logits[:, -1:] + rng.uniform(0, 0.1, (64, 3, 1)).astype(np.float32) * logits[:, :-1]
        of = strategy(rate, scale=rng.integers(1, 17, 64))
        certain_B, final_B, fused_B = map(np.asarray, decide(of, logits, asked_B))
        assert not certain_B[~asked_B].any()
        np.testing.assert_array_equal(final_B[certain_B], fused_B[certain_B])
        settled += certain_B.sum()

    check()
    assert settled > 100


def test_layers_that_agree_settle_what_the_last_layer_leaves_open():
    """Early layers below which the first token rises: SLED speaks for it, but the last layer's gap is no proof."""
    final_V = np.linspace(-9, 0, V)
    final_V[-2:] = 5, 5.5
    agreeing_V = final_V.copy()
    agreeing_V[-2:] = 6, 5
    for early_V, settled in ((agreeing_V, True), (np.where(np.arange(V) == V - 2, 4, final_V), False)):
        logits = np.stack([np.stack([early_V] * (latent_bound.FEW_LAYERS + 1) + [final_V])] * 2).astype(np.float32)
        certain_B, final_B, fused_B = choices(SLED(1.0), logits)
        by_layer_B, _, _ = jax.jit(choices_by_layer)(SLED(1.0), logits, np.array([True, False]))
        assert not certain_B.any() and by_layer_B.tolist() == [settled, False]
        assert (final_B == fused_B).tolist() == [settled, settled]


@pytest.mark.parametrize("few", [2, 0])  # layers projected one by one, or none
def test_sums_in_another_order_do_not_break_the_proof(few, monkeypatch):
    """Early layers so near the final one that rounding decides what they say; the room is just what they say where the
    products of each logit are added in another order. So no row may count as settled there, but many with more room."""
    monkeypatch.setattr(latent_bound, "FEW_LAYERS", few)
    rng, asked_B = np.random.default_rng(0), np.arange(64) % 2 == 0
    w_VD, final_BD = rng.standard_normal((64, 2048)) / 45, rng.standard_normal((64, 2048))
    h_BCD = final_BD[:, None] + 1e-6 * rng.standard_normal((64, 4, 2048)) * np.array([1, 1, 1, 0])[:, None]
    h_BCD, w_VD = jnp.asarray(h_BCD, jnp.float32), jnp.asarray(w_VD, jnp.float32)
    order = rng.permutation(2048)
    stats = layer_statistics(h_BCD[..., order], SharedHead(w_VD[:, order]), k=2)
    m_BEK = jnp.maximum(stats.cosine_BEK, 0) ** 2
    r_BEK = m_BEK / jnp.maximum(m_BEK.sum(-1, keepdims=True), 1e-30)
    room_BK = (r_BEK - r_BEK[..., :1]).max(1)
    final_BV = SharedHead(w_VD).project(h_BCD[:, -1])
    settled = jax.jit(lambda room_BK: latent_bound.none_moves(
        h_BCD, SharedHead(w_VD), final_BV, stats.top_ids_BK, jnp.ones((1, 2), bool), 1.0, room_BK, asked_B))
    assert settled(room_BK).sum() == 0
    assert settled(jnp.maximum(room_BK, 0) + 1.001).sum() == 32


@pytest.mark.parametrize(("few", "tile", "rows"), [(12, None, 8), (3, None, 8), (2, None, 16), (2, 7, 8)])
def test_no_more_states_are_projected_than_asked_for_and_in_tiles(few, tile, rows, monkeypatch):
    """Of 8 rows and three early layers; the final layer's 8 rows of logits are there in any case."""
    monkeypatch.setattr(latent_bound, "FEW_LAYERS", few)
    monkeypatch.setattr(latent_bound, "PROBE", 5)
    head, h_BCD = SharedHead(jnp.ones((V, 2)), tile=tile), jnp.ones((8, 4, 2))
    program = jax.make_jaxpr(lambda *args: SLED().certain_by_layer(*args[:2], head, args[2]))(
        jnp.ones((8, V)), h_BCD, jnp.ones(8, bool))
    shapes = re.findall(rf"f32\[([\d,]+),{V}\]", str(program))
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) == rows


@pytest.mark.parametrize(("tile", "shards", "block"), [
    (None, 1, 2**14), (None, 1, 8), (None, 2, 8), (7, 1, 8), (7, 2, 8)])
def test_sums_of_chosen_layers_are_those_of_all_layers(tile, shards, block, monkeypatch):
    monkeypatch.setattr(partial, "_BLOCK", block)
    rng = np.random.default_rng(0)
    h_BCD, w_VD = rng.standard_normal((5, 4, 6)).astype(np.float32), rng.standard_normal((54, 6)).astype(np.float32)
    row_P, layer_P, beta_B1 = np.array([3, 0, 3, 4]), np.array([0, 2, 1, 2]), np.linspace(0.5, 2, 5)[:, None]
    all_BC = partial.partial_statistics(SharedHead(w_VD).project(h_BCD), 0, beta_B1)
    sums_P = early_sums(h_BCD[row_P, layer_P], SharedHead(w_VD, tile=tile, shards=shards),
                        SharedHead(w_VD).project(h_BCD[:, -1]), row_P, jnp.asarray(beta_B1[row_P], jnp.float32))
    for of_all, of_some in zip(all_BC, sums_P, strict=True):
        np.testing.assert_allclose(of_some, of_all[row_P, layer_P], rtol=1e-4, atol=1e-5)


def test_the_bound_is_sharp():
    """Where early layers give the second token everything, SLED changes the token just below the bound."""
    final_V = np.linspace(-3, 0, V)
    for rate in (0.5, 1.0, 2.0):
        for over, expected in ((0.98, False), (1.02, True)):
            gap = rate
            for _ in range(100):  # its fixed point
                final_V[-2:] = 3, 3 + gap
                p = np.exp(final_V) / np.exp(final_V).sum()
                gap = over * rate * (1 + p[-1] - p[-2])
            logits = np.stack([final_V, final_V])[None].astype(np.float32)
            logits[0, 0, -2] -= 1
            certain_B, final_B, fused_B = choices(SLED(rate), logits)
            assert certain_B.item() == expected == (final_B == fused_B).item()


@settings_class
class Shifted:
    """The mean of the layers' logits and a number; tells of how many places each call projects the early layers."""

    shift: float = setting(rows="B")
    norm_early = False

    def early_layers(self, num_layers, *, tied):
        return tuple(range(num_layers))

    def certain(self, final_BV):
        return final_BV[:, 7] > 10

    def logits(self, h_BCD, head):
        jax.debug.callback(CALLS.append, h_BCD.shape[0])
        return head.project(h_BCD).mean(1) + per_row(self.shift, h_BCD[:, 0])


@settings_class
class Everywhere:
    """A fusion that proves nothing, and so looks at all layers at every token."""

    inner: SLED = setting(traced=True)
    norm_early = False

    def early_layers(self, num_layers, *, tied):
        return self.inner.early_layers(num_layers, tied=tied)

    def logits(self, h_BCD, head):
        return self.inner.logits(h_BCD, head)


@settings_class
class ByNeed:
    """A user's own fusion that leaves all to `certain_by_layer`; it keeps what was asked and proved, [B] each, in
    `ANSWERS`, and says yes of every row that it was not asked about."""

    inner: SLED = setting(traced=True)
    norm_early = False

    def early_layers(self, num_layers, *, tied):
        return self.inner.early_layers(num_layers, tied=tied)

    def certain(self, final_BV):
        return jnp.zeros(final_BV.shape[0], bool)

    def certain_by_layer(self, final_BV, h_BCD, head, asked_B):
        assert final_BV.shape == (h_BCD.shape[0], head.vocabulary) and asked_B.shape == h_BCD.shape[:1]
        proved_B = self.inner.certain_by_layer(final_BV, h_BCD, head, asked_B)
        jax.debug.callback(lambda *answer: ANSWERS.append(answer), asked_B, proved_B)
        return proved_B | ~asked_B

    def logits(self, h_BCD, head):
        return self.inner.logits(h_BCD, head)


ANSWERS: list[tuple] = []
CALLS: list[int] = []
ROW_P = np.arange(8) // 2  # the row of each place


class LogitsForStates:
    """Stands for a readout of three layers, whose hidden states are logits already."""

    def early_layers(self, fusion, last):
        return fusion.early_layers(last, tied=True)

    def fuse(self, fusion, states, last):
        layers = (*self.early_layers(fusion, last), last)
        return fusion.logits(jnp.stack([states[n] for n in layers], 1), SharedHead(jnp.eye(V)))


@pytest.mark.parametrize(("least", "cases"), [
    (1, [([], [], []), ([2, 5, 6], [], [2, 2]), ([2, 5], [3], [2, 2]), ([0, 1, 2, 5, 6], [], [8]), ([], [1], [2])]),
    (2**20, [([], [], []), ([2], [], [8]), ([], [0, 1], [8])])])
def test_early_layers_are_projected_only_where_they_are_needed(least, cases, monkeypatch):
    """Eight places of four rows, the last of them not wanted; rows that draw or have a penalty need all they have."""
    monkeypatch.setattr(need, "BLOCK_LOGITS", {"cpu": least})

    @jax.jit
    def decide(fusion, sampling, states, wanted_P):
        run = types.SimpleNamespace(fusion=fusion, sampling=sampling, readout=LogitsForStates(),
                                    plan=types.SimpleNamespace(exits=(3,)))
        return need.deciding_logits(run, states, wanted_P, ROW_P)

    logits_PCV = np.random.default_rng(0).standard_normal((8, 4, V)).astype(np.float32)
    shift_B = np.arange(4, dtype=np.float32)
    for open_places, drawing, calls in cases:
        temperature_B, penalty_B = np.zeros(4, np.float32), np.ones(4, np.float32)
        temperature_B[drawing[:1]], penalty_B[drawing[1:]] = 1, 2
        logits_PCV[:, 3, 7] = np.where(np.isin(np.arange(8), open_places), 9, 11)
        needed_P = np.isin(np.arange(8), open_places) | np.isin(ROW_P, drawing)
        CALLS.clear()
        out_PV = decide(Shifted(shift_B), sled.Sampling(temperature_B, repetition_penalty=penalty_B),
                        {n: logits_PCV[:, n] for n in range(4)}, np.arange(8) < 7)
        jax.effects_barrier()
        assert CALLS == calls
        fused_PV = logits_PCV.mean(1) + shift_B[ROW_P, None]
        fused_P = needed_P | (calls == [8])  # all at once where most are needed
        expected_PV = np.where(fused_P[:, None], fused_PV, logits_PCV[:, 3])
        np.testing.assert_allclose(out_PV[:7], expected_PV[:7], rtol=1e-5)


def test_tokens_of_sled_that_looks_at_few_layers_are_those_of_sled_that_looks_at_all(monkeypatch, demo):
    """In a vocabulary that counts as large; the last two rows draw their tokens, and so are not asked about."""
    monkeypatch.setattr(need, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr(need, "BLOCK_LOGITS", {"cpu": 1})
    monkeypatch.setattr(latent_bound, "FEW_LAYERS", 2)
    prompts, temperature_B = [[1 + i, 5, 9 + i] for i in range(8)], np.array([0] * 6 + [1, 1.0])
    for rate in (0.1, 1.0):
        ANSWERS.clear()
        by_need, by_all = (demo.generate(prompts, max_new_tokens=24, fusion=fusion(SLED(rate)),
                                         sampling=sled.Sampling(temperature_B)) for fusion in (ByNeed, Everywhere))
        assert by_need.tokens == by_all.tokens
        jax.effects_barrier()
        asked, proved = (np.concatenate(rows) for rows in zip(*ANSWERS, strict=True))
        assert proved[asked].any() and not asked.all()
