"""Settings of the fusion strategies: what is refused, what is traced, which layers are asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    fuse = jax.jit(lambda h_BCD, w_VD: fused_logits(LayerAverage(), h_BCD, w_VD))
    for platform, tile, other in (("cpu", 1024, 8192), ("cuda", 8192, 1024)):
        program = fuse.trace(h_BCD, w_VD).lower(lowering_platforms=(platform,)).as_text()
        assert f"tensor<{tile}x4xf32>" in program and f"tensor<{other}x4xf32>" not in program


def test_default_tile():
    assert default_tile(33, 32_000, "cpu") is None
    assert default_tile(33, 128_256, "cpu") is None
    assert default_tile(8 * 33, 32_000, "cpu") == 1024
    assert default_tile(33, 128_256, "gpu") is None
    assert default_tile(64 * 33, 128_256, "tpu") == 8192
