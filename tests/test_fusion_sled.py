"""SLED's numbers: against the released code, an extended-precision oracle, and the textbook form."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import entr, logsumexp, softmax

from sled.fusion import SLED, ClampOnly, SharedHead, layer_statistics, partial
from sled.fusion.sled import latent_distribution

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
ORACLE = np.load(FIXTURES / "sled_oracle.npz")
REFERENCE = np.load(FIXTURES / "sled_reference.npz")
FORMS = [(None, 1), (50, 4)]


@jax.jit
def fuse(strategy, h_BCD, head):
    """Compiled once per shape: every setting below is traced."""
    stats = layer_statistics(h_BCD, head, strategy.max_scale, strategy.temperature)
    return stats, latent_distribution(stats.cosine_BEK, strategy.scale), strategy.logits(h_BCD, head)


def identity_head(vocabulary, tile=None, shards=1):
    """A projection that hands the hidden states through, so that tests can give logits."""
    return SharedHead(jnp.eye(vocabulary), tile=tile, shards=shards)


def padded(logits_BCV):
    """32 candidates for every fixture, to compile once: a layer equal to the final one counts for nothing."""
    missing = 32 - logits_BCV.shape[1]
    return jnp.asarray(np.concatenate([np.repeat(logits_BCV[:, -1:], missing, axis=1), logits_BCV], axis=1))


def longdouble_cosines(logits_BCV, ids_BK, tau=1.0):
    """cosine(P_n - e_i, l_n - l_N) by the definition, in extended precision, (B, E, K)."""
    z = logits_BCV.astype(np.longdouble)
    e, d = z[:, :-1], z[:, :-1] - z[:, -1:]
    p = np.exp((e - e.max(-1, keepdims=True)) / tau)
    p /= p.sum(-1, keepdims=True)
    out = np.zeros((*e.shape[:2], ids_BK.shape[1]), np.longdouble)
    for b, e_, k in np.ndindex(out.shape):
        i = ids_BK[b, k]
        gradient = p[b, e_].copy()
        gradient[i] = -(gradient[:i].sum() + gradient[i + 1 :].sum())
        length = np.sqrt((gradient**2).sum()) * np.sqrt((d[b, e_] ** 2).sum())
        out[b, e_, k] = (gradient * d[b, e_]).sum() / length if length > 0 else 0
    return out


def longdouble_sled(logits_BCV, ids_BK, rate, steps, tau, lower_bound):
    """SLED by its definition; `ids_BK` are the tokens to evolve."""
    rows = np.arange(len(ids_BK))[:, None]
    m = np.maximum(longdouble_cosines(logits_BCV, ids_BK, tau), 0) ** 2
    latent = np.zeros(logits_BCV[:, 0].shape, np.longdouble)
    total = m.sum((1, 2))[:, None]
    latent[rows, ids_BK] = np.where(total > 0, m.sum(1) / np.where(total > 0, total, 1), 0)
    z = logits_BCV[:, -1].astype(np.longdouble)
    for t in range(steps):
        p = np.exp((z - z.max(-1, keepdims=True)) / tau)
        z = z - rate * (1 - t / steps) / tau * (p / p.sum(-1, keepdims=True) - latent)
    out = np.full(z.shape, lower_bound, np.float64)
    out[rows, ids_BK] = z[rows, ids_BK]
    return out


@pytest.mark.parametrize(("tile", "shards"), FORMS)
@pytest.mark.parametrize("case", range(6))
def test_extended_precision_oracle(case, tile, shards):
    logits_BCV = padded(ORACLE[f"{case}_logits"][None])
    scale, rate, bound = ORACLE[f"{case}_params"]
    k, cosine_EK = int(scale), ORACLE[f"{case}_cosine"]
    strategy = SLED(rate, k, lower_bound=bound, max_scale=128)
    stats, latent_BK, out_BV = fuse(strategy, logits_BCV, identity_head(logits_BCV.shape[-1], tile, shards))
    np.testing.assert_array_equal(stats.top_ids_BK[0, :k], ORACLE[f"{case}_topk"])
    np.testing.assert_allclose(stats.cosine_BEK[0, -len(cosine_EK) :, :k], cosine_EK, atol=1e-6)
    np.testing.assert_allclose(latent_BK[0, :k], ORACLE[f"{case}_latent"], atol=1e-6)
    np.testing.assert_allclose(out_BV[0], ORACLE[f"{case}_out"], rtol=1e-5)


@pytest.mark.parametrize(("tile", "shards"), FORMS)
@pytest.mark.parametrize("case", range(8))
def test_released_code_generation(case, tile, shards):
    logits_BCV = padded(REFERENCE[f"gen{case}_logits"][None])
    scale, rate, bound = REFERENCE[f"gen{case}_params"]
    strategy = SLED.preset("official-code", rate=rate, scale=int(scale), lower_bound=bound, max_scale=128)
    *_, out_BV = fuse(strategy, logits_BCV, identity_head(logits_BCV.shape[-1], tile, shards))
    np.testing.assert_allclose(out_BV[0], REFERENCE[f"gen{case}_out"], atol=1e-4)


@pytest.mark.parametrize(("tile", "shards"), FORMS)
@pytest.mark.parametrize("case", range(3))
def test_released_code_scoring(case, tile, shards):
    logits_TCV = padded(REFERENCE[f"score{case}_logits"].swapaxes(0, 1))
    scale, rate, bound, prefix, log_softmax = REFERENCE[f"score{case}_params"]
    ids_T = REFERENCE[f"score{case}_ids"]
    strategy = SLED.preset("truthfulqa", rate=rate, scale=int(scale), lower_bound=bound,
                           log_softmax=bool(log_softmax), max_scale=128)
    *_, out_TV = fuse(strategy, logits_TCV, identity_head(logits_TCV.shape[-1], tile, shards))
    places = np.arange(int(prefix), len(ids_T))
    score = np.asarray(out_TV, np.float64)[places - 1, ids_T[places]].sum()
    np.testing.assert_allclose(score, REFERENCE[f"score{case}_out"], atol=1e-4)


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(1, 2, 70), (3, 5, 53)]))
    spread = draw(st.sampled_from([0.01, 1.0, 8.0, 60.0]))  # 60: layers as sure as float32 can say, and more
    logits = (spread * rng.standard_normal(shape)).astype(np.float32)
    kind = draw(st.sampled_from(["plain", "ties", "near", "equal"]))
    if kind == "ties":
        logits = np.round(logits / spread).astype(np.float32)
    if kind == "near":  # early layers that hardly differ from the final one
        logits[:, :-1] = logits[:, -1:] * (1 + 1e-3 * rng.standard_normal(shape)[:, :-1]).astype(np.float32)
    if kind == "equal":
        logits[:, 0] = logits[:, -1]
    return logits


@settings(max_examples=40, deadline=None)
@given(logits=cases(), scale=st.integers(1, 90), steps=st.sampled_from([1, 1, 3, 10]),
       tau=st.sampled_from([1.0, 0.5, 3.0]), tile=st.sampled_from([None, 7, 64]))
def test_against_the_definition(logits, scale, steps, tau, tile):
    strategy = SLED(2.0, scale, steps=steps, temperature=tau, max_scale=128)
    stats, _, out_BV = fuse(strategy, jnp.asarray(logits), identity_head(logits.shape[-1], tile))
    ids_BK = np.asarray(stats.top_ids_BK)
    np.testing.assert_array_equal(ids_BK, np.argsort(-logits[:, -1], axis=-1, kind="stable"))
    np.testing.assert_allclose(stats.cosine_BEK, longdouble_cosines(logits, ids_BK, tau), atol=1e-5)
    expected = longdouble_sled(logits, ids_BK[:, :scale], 2.0, steps, tau, -1000)
    np.testing.assert_allclose(out_BV, expected, rtol=1e-5, atol=2e-5)

    z = logits.astype(np.float64) / tau
    p = softmax(z, axis=-1)
    first, second = np.sort(p, -1)[..., :-3:-1].transpose(2, 0, 1)
    np.testing.assert_allclose(stats.log_norm_BC, logsumexp(z, axis=-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.entropy_BC, entr(p).sum(-1), atol=2e-5)
    np.testing.assert_allclose(stats.max_prob_BC, first, atol=1e-5)
    np.testing.assert_allclose(stats.margin_BC, first - second, atol=1e-5)
    np.testing.assert_array_equal(stats.argmax_BC, logits.argmax(-1))


@pytest.mark.parametrize("tile", [None, 40])
def test_float64_inputs_give_float64(tile):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        h_BCD, w_VD = jnp.asarray(rng.standard_normal((2, 4, 8))), jnp.asarray(rng.standard_normal((101, 8)))
        *_, out_BV = fuse(SLED(steps=3), h_BCD, SharedHead(w_VD, tile=tile))
        assert out_BV.dtype == jnp.float64
        logits = np.asarray(jnp.einsum("bcd,vd->bcv", h_BCD, w_VD))
        ids_BK = np.argsort(-logits[:, -1], axis=-1, kind="stable")[:, :10]
        np.testing.assert_allclose(out_BV, longdouble_sled(logits, ids_BK, 2.0, 3, 1.0, -1000), rtol=1e-12)


def test_half_precision_weights_give_float32_statistics():
    rng = np.random.default_rng(0)
    h_BCD, w_VD = rng.standard_normal((2, 3, 16)), rng.standard_normal((90, 16))
    h_BCD, w_VD = jnp.asarray(h_BCD, jnp.bfloat16), jnp.asarray(w_VD, jnp.bfloat16)
    plain, tiled = (fuse(SLED(), h_BCD, SharedHead(w_VD, tile=tile))[-1] for tile in (None, 32))
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(plain, tiled, rtol=1e-5)


def test_large_vocabulary_by_blocks(monkeypatch):
    logits_BCV = 5 * jax.random.normal(jax.random.key(0), (2, 4, 77))
    head = identity_head(77)
    whole = jax.jit(layer_statistics, static_argnums=2)(logits_BCV, head, 10)
    for block in (11, 20):
        monkeypatch.setattr(partial, "_BLOCK", block)
        blocks = jax.jit(lambda h, head: layer_statistics(h, head, 10))(logits_BCV, head)
        for a, b in zip(whole, blocks, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile", [None, 30])
def test_rows_do_not_see_each_other(tile):
    """A row's result is the same alone, in a batch, and under vmap; settings may differ per row."""
    key_h, key_w = jax.random.split(jax.random.key(0))
    h_BCD, w_VD = jax.random.normal(key_h, (4, 5, 16)), jax.random.normal(key_w, (97, 16))
    head = SharedHead(w_VD, tile=tile)
    rows = [SLED(0.5, 3, max_scale=16), SLED(2.0, 10, steps=4, max_scale=16), SLED(3.0, 16, temperature=2.0),
            SLED(0.0, 1, lower_bound=-50.0)]
    alone_BV = jnp.concatenate([fuse(s, h_BCD[i : i + 1], head)[-1] for i, s in enumerate(rows)])
    together = jax.tree.map(lambda *leaves: jnp.asarray(leaves), *rows)
    *_, batch_BV = fuse(together, h_BCD, head)
    np.testing.assert_allclose(batch_BV, alone_BV, rtol=1e-5, atol=1e-5)
    mapped_BV = jax.jit(jax.vmap(lambda s, h_CD: s.logits(h_CD[None], head)[0]))(together, h_BCD)
    np.testing.assert_allclose(mapped_BV, alone_BV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tile", "log_softmax"), [(None, False), (30, True)])
def test_clamp_only_is_sled_at_rate_zero(tile, log_softmax):
    key_h, key_w = jax.random.split(jax.random.key(0))
    h_BCD = jax.random.normal(key_h, (3, 5, 16))
    head = SharedHead(jax.random.normal(key_w, (97, 16)), tile=tile)
    clamp = ClampOnly(7, log_softmax=log_softmax)
    assert clamp.early_layers(12, tied=True) == ()
    *_, sled_BV = fuse(SLED(0.0, 7, log_softmax=log_softmax), h_BCD, head)
    clamp_BV = jax.jit(lambda s, h, head: s.logits(h, head))(clamp, h_BCD[:, -1:], head)
    np.testing.assert_allclose(clamp_BV, sled_BV, rtol=1e-5)
