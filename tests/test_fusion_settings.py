"""Settings of the fusion strategies: what is refused, what is traced, which layers are asked for."""

import dataclasses

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
)

NAN = float("nan")


@pytest.mark.parametrize(
    "build",
    [
        lambda: SLED(rate=-1),
        lambda: SLED(rate=NAN),
        lambda: SLED(rate=float("inf")),
        lambda: SLED(rate="2"),
        lambda: SLED(rate=True),
        lambda: SLED(scale=0),
        lambda: SLED(scale=2.5),
        lambda: SLED(scale=20, max_scale=16),
        lambda: SLED(max_scale=0),
        lambda: SLED(scale=np.array([1, 2])),
        lambda: SLED(steps=0),
        lambda: SLED(steps=2**40),
        lambda: SLED(scale=2**40),
        lambda: SLED(rate=10**400),
        lambda: SLED(steps=1.5),
        lambda: SLED(temperature=0),
        lambda: SLED(temperature=-1.0),
        lambda: SLED(lower_bound=NAN),
        lambda: SLED(lower_bound=float("inf")),
        lambda: SLED(layers=()),
        lambda: SLED(layers="low"),
        lambda: SLED(layers=(-1,)),
        lambda: SLED(layers=3),
        lambda: SLED.preset("unknown"),
        lambda: SLED(layers=(3, 12)).early_layers(12, tied=False),
        lambda: SLED(layers="blocks").early_layers(1, tied=False),
        lambda: ClampOnly(scale=0),
        lambda: DoLa(relative_top=0),
        lambda: DoLa(relative_top=1.1),
        lambda: DoLa(layers="middle"),
        lambda: DoLa(layers=None),
        lambda: DoLa(layers=(40,)).early_layers(32, tied=False),
        lambda: DoLa().early_layers(3, tied=True),
        lambda: ConfidentDecoding(window=0),
        lambda: LayerAverage(weights=(1.0, -1.0)),
        lambda: LayerAverage(weights=(0.0, 0.0)),
        lambda: LayerAverage("abc"),
        lambda: LayerAverage(2.0),
        lambda: LayerAverage(weights=(1.0, NAN)),
        lambda: LayerAverage(weights=(1.0, 2.0)).logits(jnp.ones((1, 3, 4)), SharedHead(jnp.ones((5, 4)))),
        lambda: SharedHead(jnp.ones((6, 4)), tile=0),
        lambda: SharedHead(jnp.ones((6, 4)), shards=0),
        lambda: SharedHead(jnp.ones((6, 4)), shards=4),
    ],
)
def test_bad_settings_are_refused_with_a_remedy(build):
    with pytest.raises(SettingError, match=r"[;:] .*\w") as caught:
        build()
    assert len(str(caught.value)) > 20


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


def test_default_tile():
    assert default_tile(33, 32_000, "cpu") is None
    assert default_tile(33, 128_256, "cpu") is None
    assert default_tile(8 * 33, 32_000, "cpu") == 1024
    assert default_tile(33, 128_256, "gpu") is None
    assert default_tile(64 * 33, 128_256, "tpu") == 8192
