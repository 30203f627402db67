"""DoLa, Confident Decoding, layer averaging and plain decoding against direct numpy forms; what all methods share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import on_devices, run_together
from scipy.special import log_softmax

from sled import fusion
from sled.errors import SettingError
from sled.fusion import SLED, ClampOnly, ConfidentDecoding, DoLa, FinalLayer, LayerAverage, SharedHead
from sled.fusion.confident import first_valley
from sled.fusion.dola import final_divergence

FORMS = [(None, 1), (16, 1), (10, 3)]  # vocabulary 99: neither 16 nor 10 divides its part


@jax.jit
def fuse(strategy, h_BCD, head):
    return strategy.logits(h_BCD, head)


@pytest.fixture(params=FORMS, ids=str)
def case(request):
    """Hidden states, a head in one of its forms, and the candidates' log-probabilities in float64."""
    rng = np.random.default_rng(1)
    h_BCD, w_VD = rng.standard_normal((4, 6, 12), np.float32), rng.standard_normal((99, 12), np.float32)
    logits_BCV = np.einsum("bcd,vd->bcv", h_BCD.astype(np.float64), w_VD)
    tile, shards = request.param
    return jnp.asarray(h_BCD), SharedHead(jnp.asarray(w_VD), tile=tile, shards=shards), logits_BCV


def test_final_layer(case):
    h_BCD, head, logits_BCV = case
    np.testing.assert_allclose(fuse(FinalLayer(), h_BCD, head), logits_BCV[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relative_top", [0.1, 0.9, 1.0])
def test_dola(case, relative_top):
    h_BCD, head, logits_BCV = case
    log_p = log_softmax(logits_BCV, axis=-1)
    log_early, log_final = log_p[:, :-1], log_p[:, -1:]
    m = (np.exp(log_early) + np.exp(log_final)) / 2
    divergence = (m * (np.log(m) - log_final) + m * (np.log(m) - log_early)).mean(-1) / 2
    norm_BC = jax.nn.logsumexp(jnp.asarray(logits_BCV, jnp.float32), -1)
    np.testing.assert_allclose(final_divergence(h_BCD, head, norm_BC), divergence, rtol=1e-3, atol=1e-8)

    chosen = divergence.argmax(1)
    assert len(set(chosen)) > 1  # the rows differ in their choice, so a batch-wide choice would show
    expected = log_final[:, 0] - log_early[np.arange(4), chosen]
    kept = np.exp(log_final[:, 0]) >= relative_top * np.exp(log_final.max(-1)) * (1 - 1e-6)
    out_BV = np.asarray(fuse(DoLa(relative_top=relative_top), h_BCD, head))
    np.testing.assert_array_equal(np.isfinite(out_BV), kept)
    np.testing.assert_allclose(out_BV[kept], expected[kept], rtol=1e-4, atol=1e-4)
    bounded_BV = fuse(DoLa(relative_top=relative_top, lower_bound=-1000.0), h_BCD, head)
    np.testing.assert_array_equal(np.asarray(bounded_BV)[~kept], -1000)
    # With one candidate there is nothing to choose.
    out_BV = np.asarray(fuse(DoLa(relative_top=relative_top, layers=(2,)), h_BCD[:, -2:], head))
    np.testing.assert_allclose(out_BV[kept], (log_p[:, -1] - log_p[:, -2])[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("strategy", "num_layers", "tied", "expected"), [
    (SLED(), 4, True, (0, 1, 2, 3)),  # the embeddings are a candidate
    (SLED(layers=[6, 2]), 12, False, (2, 6)),
    (SLED.preset("paper"), 4, False, (1, 2, 3)),
    (DoLa(), 32, False, tuple(range(0, 16, 2))),
    (DoLa(), 32, True, tuple(range(2, 16, 2))),
    (DoLa(layers="high"), 32, True, tuple(range(16, 32, 2))),
    (DoLa(), 80, False, tuple(range(0, 20, 2))),
    (DoLa(layers="high"), 80, False, tuple(range(60, 80, 2))),
    (DoLa(), 1, True, (0,)),
    (DoLa(), 2, True, (1,)),
    (DoLa(), 4, True, (2,)),
    (DoLa(layers=(8, 0, 8)), 32, False, (0, 8)),
    (ConfidentDecoding(window=4), 32, False, (29, 30, 31)),
    (ConfidentDecoding(window=10), 4, True, (1, 2, 3)),
    (ConfidentDecoding(window=1), 4, True, ()),
    (LayerAverage(), 3, False, (0, 1, 2)),
    (FinalLayer(), 3, False, ()),
])
def test_early_layers(strategy, num_layers, tied, expected):
    assert strategy.early_layers(num_layers, tied=tied) == expected


def test_confident_decoding(case):
    h_BCD, head, logits_BCV = case
    # Layers of different sharpness, so that the entropy has valleys.
    sharpness_BC1 = np.random.default_rng(0).uniform(0.2, 2, (4, 6, 1)).astype(np.float32)
    h_BCD, logits_BCV = h_BCD * sharpness_BC1, logits_BCV * sharpness_BC1
    log_p = log_softmax(logits_BCV, axis=-1)
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    chosen = []
    for row in entropy:
        layer = len(row) - 1
        while layer > 0 and row[layer - 1] < row[layer]:
            layer -= 1
        chosen.append(layer)
    assert len(set(chosen)) > 1 and ConfidentDecoding().norm_early
    out_BV = fuse(ConfidentDecoding(), h_BCD, head)
    np.testing.assert_allclose(out_BV, logits_BCV[np.arange(4), chosen], rtol=1e-4, atol=1e-4)


def test_first_valley():
    entropy_BC = jnp.array([
        [1.0, 2.0, 3.0],  # falls all the way back
        [1.0, 3.0, 2.0],  # rises at once, although a deeper valley lies beyond
        [3.0, 1.0, 2.0],
        [1.0, 2.0, 2.0],  # no strict fall
        [1.0, 2.0, jnp.nan],
    ])
    np.testing.assert_array_equal(first_valley(entropy_BC), [0, 2, 1, 2, 2])
    np.testing.assert_array_equal(first_valley(entropy_BC[:, :1]), 0)


@pytest.mark.parametrize("weights", [None, (0, 1, 2, 0, 1, 4), "per row"])
def test_layer_average(case, weights):
    h_BCD, head, logits_BCV = case
    if weights == "per row":
        weights = np.random.default_rng(0).uniform(size=(4, 6)).astype(np.float32)
    share = np.broadcast_to(np.ones(6) if weights is None else np.asarray(weights, np.float64), (4, 6))
    share = share / share.sum(-1, keepdims=True)
    expected = np.log((share[..., None] * np.exp(log_softmax(logits_BCV, axis=-1))).sum(1))
    out_BV = fuse(LayerAverage(weights), h_BCD, head)
    np.testing.assert_allclose(out_BV, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.exp(out_BV).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("strategy", [DoLa(), ConfidentDecoding(), LayerAverage()], ids=lambda s: type(s).__name__)
def test_rows_do_not_see_each_other(case, strategy):
    h_BCD, head, _ = case
    alone_BV = jnp.concatenate([fuse(strategy, h_BCD[b : b + 1], head) for b in range(2)])
    np.testing.assert_allclose(fuse(strategy, h_BCD, head)[:2], alone_BV, rtol=1e-4, atol=1e-5)


# Settings and tiles.

def test_max_scale_is_settled():
    assert [SLED(scale=s).max_scale for s in (1, 16, 17, 75, 300)] == [16, 16, 32, 128, 512]
    assert SLED(scale=5, max_scale=100).max_scale == 100


def test_presets():
    assert SLED.preset("official-code") == SLED()
    assert SLED.preset("paper").lower_bound == -1000.0
    factor, truthfulqa = SLED.preset("factor"), SLED.preset("truthfulqa", scale=100)
    assert (factor.steps, factor.lower_bound, factor.log_softmax) == (1, -2500.0, True)
    assert (truthfulqa.steps, truthfulqa.lower_bound, truthfulqa.log_softmax) == (10, -100.0, False)
    assert (truthfulqa.scale, truthfulqa.max_scale) == (100, 128)


@pytest.mark.parametrize("strategies", [
    [SLED(), SLED(rate=1), SLED(scale=16), SLED(temperature=3), SLED(steps=5), SLED(np.float32(1.5), lower_bound=-7),
     SLED(max_scale=16)],
    [ClampOnly(), ClampOnly(3), ClampOnly(lower_bound=-5)],
    [DoLa(), DoLa(relative_top=1), DoLa(relative_top=0.5, lower_bound=-9)],
    [LayerAverage((1, 2, 3)), LayerAverage((3.0, 2, 0)), LayerAverage([1, 1, 1])],
], ids=lambda strategies: type(strategies[0]).__name__)
def test_tuning_never_recompiles(strategies):
    count = fuse._cache_size()
    for strategy in strategies:
        fuse(strategy, jnp.ones((1, 3, 4)), SharedHead(jnp.eye(4)))
    assert fuse._cache_size() == count + 1


def test_a_vocabulary_smaller_than_max_scale():
    logits_BCV = jnp.asarray([[[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]])
    for strategy in (SLED(2.0, 10), ClampOnly(10)):
        out_BV = jax.jit(lambda s: s.logits(logits_BCV, SharedHead(jnp.eye(3))))(strategy)
        assert out_BV.shape == (1, 3) and (out_BV > -1000).all()


def test_the_tile_is_that_of_the_platform_the_computation_is_lowered_for():
    h_BCD, w_VD = jax.ShapeDtypeStruct((64, 33, 4), "float32"), jax.ShapeDtypeStruct((128_256, 4), "float32")
    fuse = jax.jit(lambda h_BCD, w_VD: fusion.fused_logits(LayerAverage(), h_BCD, SharedHead(w_VD)))
    for platform, tile, other in (("cpu", 1024, 8192), ("cuda", 8192, 1024)):
        program = fuse.trace(h_BCD, w_VD).lower(lowering_platforms=(platform,)).as_text()
        assert f"tensor<{tile}x4xf32>" in program and f"tensor<{other}x4xf32>" not in program
    assert fusion.default_tile(33, 32_000, "cpu") is None
    assert fusion.default_tile(33, 128_256, "cpu") is None
    assert fusion.default_tile(8 * 33, 32_000, "cpu") == 1024
    assert fusion.default_tile(33, 128_256, "gpu") is None
    assert fusion.default_tile(64 * 33, 128_256, "tpu") == 8192


# A projection split over devices: the same numbers, and no device gathers another's rows.

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from sled.fusion import SLED, DoLa, LayerAverage, SharedHead

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
key_h, key_w = jax.random.split(jax.random.key(0))
h_BCD = jax.random.normal(key_h, (2, 5, 16))
w_VD = jax.random.normal(key_w, (8 * 37, 16))
split_VD = jax.device_put(w_VD, NamedSharding(mesh, P("tensor", None)))
whole_BCD = jax.device_put(h_BCD, NamedSharding(mesh, P()))
for strategy in (SLED(), DoLa(), LayerAverage()):
    fuse = jax.jit(lambda s, h, head: s.logits(h, head))
    expected = fuse(strategy, h_BCD, SharedHead(w_VD))
    for tile in (None, 8):
        compiled = fuse.lower(strategy, whole_BCD, SharedHead(split_VD, tile=tile, shards=8)).compile()
        out = compiled(strategy, whole_BCD, SharedHead(split_VD, tile=tile, shards=8))
        np.testing.assert_allclose(np.asarray(out), np.asarray(expected), rtol=1e-4, atol=1e-4)
        if tile is not None:
            gathers = [line for line in compiled.as_text().splitlines() if " all-gather" in line]
            # The projection's width is 16, and nothing else's is: no rows of it may travel.
            assert not [line for line in gathers if ",16]" in line.split(" all-gather")[0]], gathers
"""


@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (2, 3, 7)], ids=str)
def test_a_strategy_of_ones_own_must_give_logits(shape):
    class Own:
        def logits(self, h_BCD, head):
            return jnp.zeros(shape)

    with pytest.raises(SettingError, match=r"Own.logits gave an array of the shape .* \(2, 7\)"):
        fusion.projection.fused_logits(Own(), jnp.zeros((2, 3, 4)), SharedHead(jnp.zeros((7, 4))))


def test_split_projection_on_eight_devices():
    run_together([(on_devices(8), ["-c", PROGRAM])])
