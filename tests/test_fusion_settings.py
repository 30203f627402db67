"""Settings of the fusion strategies: what is refused, what is traced, which layers are asked for."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sled.errors import SettingError
from sled.fusion import (
    SLED,
    ClampOnly,
    ConfidentDecoding,
    DoLa,
    FinalLayer,
    LayerAverage,
    SharedHead,
    Strategy,
    default_tile,
    fused_logits,
)

NAN = float("nan")
W_VD = jnp.ones((6, 4))


REFUSED = [  # settings that only their own rules refuse: the rules are tested in test_checks.py
    (SLED, dict(rate=-1), "SLED.rate is -1, but must be a number in [0, inf); 0.5 to 3 is usual"),
    (SLED, dict(rate=10**400), "SLED.rate is 1000000"),
    (SLED, dict(scale=0), "SLED.scale is 0, but must be a whole number from 1 to 2147483647; 5, 10 or 20 is usual"),
    (SLED, dict(scale=2**40), "SLED.scale is 1099511627776"),
    (SLED, dict(scale=20, max_scale=16), "SLED.scale is 20, but must be a whole number from 1 to 16; max_scale"),
    (SLED, dict(scale=np.array([1, 2])), "SLED.scale is an array, whose entries need a static bound; give max_scale"),
    (SLED, dict(max_scale=0), "SLED.max_scale is 0"),
    (SLED, dict(steps=0), "SLED.steps is 0, but must be a whole number from 1 to 2147483647"),
    (SLED, dict(temperature=0), "SLED.temperature is 0, but must be a number in (0, inf)"),
    (SLED, dict(lower_bound=NAN), "SLED.lower_bound is nan, but must be a number in [-inf, inf)"),
    (SLED, dict(layers="low"), "SLED.layers is 'low', but must be None or 'all' or 'blocks' or a tuple"),
    (SLED, dict(log_softmax="no"), "SLED.log_softmax is 'no', but must be True or False"),
    (SLED, dict(norm_early=0), "SLED.norm_early is 0, but must be True or False"),
    (ClampOnly, dict(scale=0), "ClampOnly.scale is 0"),
    (ClampOnly, dict(log_softmax=1), "ClampOnly.log_softmax is 1, but must be True or False"),
    (DoLa, dict(relative_top=0), "DoLa.relative_top is 0, but must be a number in (0, 1]; 0.1 is usual"),
    (DoLa, dict(lower_bound="low"), "DoLa.lower_bound is 'low'"),
    (DoLa, dict(layers="middle"), "DoLa.layers is 'middle', but must be 'low' or 'high' or a tuple"),
    (DoLa, dict(layers=None), "DoLa.layers is None"),
    (DoLa, dict(norm_early="yes"), "DoLa.norm_early is 'yes'"),
    (ConfidentDecoding, dict(window=0), "ConfidentDecoding.window is 0, but must be a whole number of at least 1"),
    (ConfidentDecoding, dict(norm_early=None), "ConfidentDecoding.norm_early is None"),
    (LayerAverage, dict(weights=(1.0, -1.0)), "LayerAverage.weights[1] is -1.0, but must be a number in [0, inf)"),
    (LayerAverage, dict(weights=np.array([[1.0, -1]])), "LayerAverage.weights, an array, is -1.0"),
    (LayerAverage, dict(weights=(0.0, 0.0)), "LayerAverage.weights is (0.0, 0.0), but must not be all 0"),
    (LayerAverage, dict(weights=2.0), "LayerAverage.weights is 2.0, but must be a tuple of numbers"),
    (LayerAverage, dict(norm_early="no"), "LayerAverage.norm_early is 'no'"),
    (SharedHead, dict(w_VD=W_VD, tile=0), "SharedHead.tile is 0, but must be a whole number of at least 1"),
    (SharedHead, dict(w_VD=W_VD, shards=0), "SharedHead.shards is 0, but must be a whole number of at least 1"),
    (SharedHead, dict(w_VD=W_VD, shards=4), "SharedHead.shards is 4, but does not divide the vocabulary of 6 rows; "),
]


@pytest.mark.parametrize(("kind", "wrong", "says"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_a_setting_out_of_range_is_refused_by_name(kind, wrong, says):
    with pytest.raises(SettingError, match="^" + re.escape(says)):
        kind(**wrong)


@pytest.mark.parametrize(("ask", "says"), [
    (lambda: SLED.preset("unknown"), "SLED.preset('unknown') is unknown; the presets are official-code, paper"),
    (lambda: SLED(layers=(3, 12)).early_layers(12, tied=False), "SLED.layers is (3, 12), but 12 is no early layer"),
    (lambda: SLED(layers="blocks").early_layers(1, tied=False), 'SLED(layers="blocks") finds no early layer'),
    (lambda: DoLa(layers=(40,)).early_layers(32, tied=False), "DoLa.layers is (40,), but 40 is no early layer"),
    (lambda: DoLa().early_layers(3, tied=True), 'DoLa(layers="low") finds none in a tied model of 3; use "high"'),
    (lambda: LayerAverage(weights=(1.0, 2.0)).logits(jnp.ones((1, 3, 4)), SharedHead(W_VD)),
     "LayerAverage got 2 weights for 3 candidate layers; "),
], ids=range(6))
def test_what_does_not_fit_the_model_is_refused(ask, says):
    with pytest.raises(SettingError, match="^" + re.escape(says)):
        ask()


def test_max_scale_is_settled():
    assert [SLED(scale=s).max_scale for s in (1, 16, 17, 75, 300)] == [16, 16, 32, 128, 512]
    assert SLED(scale=5, max_scale=100).max_scale == 100


def test_presets():
    assert SLED.preset("official-code") == SLED()
    assert SLED.preset("paper").lower_bound == -1000.0
    assert SLED.preset("paper").early_layers(4, tied=False) == (1, 2, 3)
    factor, truthfulqa = SLED.preset("factor"), SLED.preset("truthfulqa", scale=100)
    assert (factor.steps, factor.lower_bound, factor.log_softmax) == (1, -2500.0, True)
    assert (truthfulqa.steps, truthfulqa.lower_bound, truthfulqa.log_softmax) == (10, -100.0, False)
    assert (truthfulqa.scale, truthfulqa.max_scale) == (100, 128)


def test_early_layers():
    assert SLED().early_layers(4, tied=True) == (0, 1, 2, 3)  # the embeddings are a candidate
    assert SLED(layers=[6, 2]).early_layers(12, tied=False) == (2, 6)
    assert LayerAverage().early_layers(3, tied=False) == (0, 1, 2)
    assert FinalLayer().early_layers(3, tied=False) == ()


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (SLED(), [SLED(rate=1), SLED(rate=2), SLED(scale=16), SLED(temperature=3), SLED(steps=5)]),
        (SLED(), [SLED(np.float32(1.5), lower_bound=-7), SLED(max_scale=16)]),
        (ClampOnly(), [ClampOnly(3), ClampOnly(lower_bound=-5)]),
        (DoLa(), [DoLa(relative_top=1), DoLa(relative_top=0.5, lower_bound=-9)]),
        (LayerAverage((1, 2, 3)), [LayerAverage((3.0, 2, 0)), LayerAverage([1, 1, 1])]),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)
def test_tuning_never_recompiles(first, others):
    traces = []

    @jax.jit
    def fuse(strategy, h_BCD, head):
        traces.append(strategy)
        return strategy.logits(h_BCD, head)

    h_BCD, head = jnp.ones((1, 3, 4)), SharedHead(jnp.eye(4))
    for strategy in (first, *others):
        fuse(strategy, h_BCD, head)
    assert len(traces) == 1


def test_a_vocabulary_smaller_than_max_scale():
    logits_BCV = jnp.asarray([[[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]])
    for strategy in (SLED(2.0, 10), ClampOnly(10)):
        out_BV = jax.jit(lambda s: s.logits(logits_BCV, SharedHead(jnp.eye(3))))(strategy)
        assert out_BV.shape == (1, 3) and (out_BV > -1000).all()


def test_static_fields_separate_traces_and_leaves_do_not():
    leaves, structure = jax.tree.flatten(SLED(1.0, 5, layers=(0, 3)))
    assert leaves == [1.0, 5, 1, 1.0, -1000.0]
    assert structure == jax.tree.structure(SLED(2.0, 9, layers=(3, 0)))
    assert structure != jax.tree.structure(SLED(1.0, 5))
    assert jax.tree.unflatten(structure, leaves) == SLED(1.0, 5, layers=(0, 3))
    # A transformation may fill the leaves with anything, even what no user may set.
    assert jax.tree.map(lambda _: 0, SLED()).temperature == 0


@pytest.mark.parametrize("strategy", [SLED(), ClampOnly(), DoLa(), ConfidentDecoding(), LayerAverage(), FinalLayer()])
def test_interface(strategy):
    assert isinstance(strategy, Strategy)
    assert dataclasses.is_dataclass(strategy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.rate = 1.0
    early = strategy.early_layers(8, tied=False)
    assert list(early) == sorted(set(early)) and all(0 <= n < 8 for n in early)


def test_the_tile_is_that_of_the_platform_the_computation_is_lowered_for():
    h_BCD, w_VD = jax.ShapeDtypeStruct((64, 33, 4), "float32"), jax.ShapeDtypeStruct((128_256, 4), "float32")
    fuse = jax.jit(lambda h_BCD, w_VD: fused_logits(LayerAverage(), h_BCD, SharedHead(w_VD)))
    for platform, tile, other in (("cpu", 1024, 8192), ("cuda", 8192, 1024)):
        program = fuse.trace(h_BCD, w_VD).lower(lowering_platforms=(platform,)).as_text()
        assert f"tensor<{tile}x4xf32>" in program and f"tensor<{other}x4xf32>" not in program


def test_default_tile():
    assert default_tile(33, 32_000, "cpu") is None
    assert default_tile(33, 128_256, "cpu") is None
    assert default_tile(8 * 33, 32_000, "cpu") == 1024
    assert default_tile(33, 128_256, "gpu") is None
    assert default_tile(64 * 33, 128_256, "tpu") == 8192
