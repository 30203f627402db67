"""The multi-exit loss against its plain form in float64: value, parts, gradients. test_train_mesh.py has it split."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from plain_loss import plain_loss

from sled.errors import SettingError
from sled.fusion import SharedHead
from sled.train.objective.cross_entropy import Split, exit_cross_entropy

EXITS, BATCH, TOKENS, WIDTH, VOCABULARY = 4, 2, 9, 8, 21


def example(seed=0, dtype=np.float64):
    """h, w, targets (masked ones -100), mask and weights, of which the second is 0."""
    random = np.random.RandomState(seed)
    mask_BT = random.rand(BATCH, TOKENS) * (random.rand(BATCH, TOKENS) < 0.7) + np.eye(BATCH, TOKENS)
    targets_BT = np.where(mask_BT == 0, -100, random.randint(0, VOCABULARY, mask_BT.shape))
    return (random.standard_normal((EXITS, BATCH, TOKENS, WIDTH)).astype(dtype),
            random.standard_normal((VOCABULARY, WIDTH)).astype(dtype), targets_BT, mask_BT.astype(dtype),
            np.array([0.5, 0, 0.3, 1], dtype))


def graded(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.fixture(scope="module")
def ours():
    """Value and gradient with every term on, five tokens (of 18) at a time."""

    def loss(h_EBTD, w_VD, targets_BT, mask_BT, weights_E, z_loss, distill, temperature):
        return exit_cross_entropy(h_EBTD, SharedHead(w_VD), targets_BT, mask_BT, weights_E, z_loss=z_loss,
                                  distill=distill, temperature=temperature, chunk=5)

    return graded(loss)


@pytest.fixture(scope="module")
def plain():
    return graded(plain_loss)


def assert_close(got, want, tolerance):
    """Every leaf within `tolerance` of the scale of the one it should be."""
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (got, want)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(initial=0))


def test_any_exits_mask_and_coefficients_give_the_plain_loss_in_one_program(ours, plain):
    before = ours._cache_size()

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6), st.lists(st.sampled_from([0.0, 0.4, 1.0]), min_size=EXITS, max_size=EXITS),
           st.sampled_from([0.0, 1e-2]), st.sampled_from([0.0, 0.5]), st.floats(0.5, 4))
    def check(seed, weights, z_loss, distill, temperature):
        *batch, _ = example(seed)
        weights_E, coefficients = np.array(weights), (z_loss, distill, temperature)
        (loss, metrics), gradients = ours(*batch, weights_E, *coefficients)
        (plain_value, parts), plain_gradients = plain(*batch, weights_E, *coefficients)
        assert_close((loss, gradients), (plain_value, plain_gradients), 1e-10)
        measured = weights_E != 0
        assert_close([x[measured] for x in metrics[:3]], [x[measured] for x in parts[:3]], 1e-10)
        np.testing.assert_allclose(metrics.distillation_E[measured], parts[3][measured], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(metrics.targets, batch[3].sum())
        for x in (*metrics[:4], gradients[0].any((1, 2, 3))):  # an exit that is off: not measured, not taught
            assert all(np.isnan(x[~measured]) if x.dtype != bool else ~x[~measured])

    with jax.enable_x64(True):
        check()
    assert ours._cache_size() == before + 1


def test_float32(ours, plain):
    args = (*example(dtype=np.float32), 1e-2, 0.5, 2.0)
    (loss, _), gradients = ours(*args)
    (plain_value, _), plain_gradients = plain(*args)
    assert loss.dtype == gradients[0].dtype == gradients[1].dtype == jnp.float32
    assert_close((loss, gradients), (plain_value, plain_gradients), 1e-5)


def test_one_exit_with_its_own_projection_is_plain_cross_entropy(plain):
    h_EBTD, w_VD, targets_BT, mask_BT, _ = example()
    with jax.enable_x64(True):
        alone = h_EBTD[:1], w_VD, targets_BT, mask_BT > 0, [1.0]
        (loss, metrics), gradients = graded(lambda h, w: exit_cross_entropy(h, SharedHead(w), *alone[2:]))(*alone[:2])
        (plain_value, _), expected = plain(h_EBTD[:1], w_VD, targets_BT, (mask_BT > 0) * 1.0, np.ones(1), 0.0, 0.0, 1.0)
        assert_close((loss, gradients), (plain_value, expected), 1e-10)
    assert metrics.distillation_E is None and float(metrics.targets) == (mask_BT > 0).sum()


def test_what_does_not_count_may_be_infinite(ours):
    h_EBTD, w_VD, targets_BT, mask_BT, weights_E = example(dtype=np.float32)
    terms = (1e-2, 0.5, 2.0)
    (want, _), (dh, dw) = ours(h_EBTD, w_VD, targets_BT, mask_BT, weights_E, *terms)
    broken = np.where(mask_BT[..., None] == 0, np.inf, h_EBTD)
    broken[1] = np.nan
    (loss, _), gradients = ours(broken, w_VD, targets_BT, mask_BT, weights_E, *terms)
    assert_close((loss, gradients), (want, (dh, dw)), 0)
    assert not dh[1].any() and not dh[:, mask_BT == 0].any()


def test_targets_that_are_none_and_no_targets(ours):
    h_EBTD, w_VD, targets_BT, mask_BT, weights_E = example(dtype=np.float32)
    nothing = np.zeros_like(mask_BT)
    (loss, metrics), gradients = ours(h_EBTD, w_VD, targets_BT, nothing, weights_E, 0.0, 0.5, 1.0)
    assert loss == metrics.targets == 0 and not any(x.any() for x in gradients)
    for unknown in (-1, VOCABULARY):
        wrong_BT = np.where(np.eye(*mask_BT.shape), unknown, targets_BT)
        assert np.isnan(ours(h_EBTD, w_VD, wrong_BT, mask_BT, weights_E, 0.0, 0.5, 1.0)[0][0])


def test_bfloat16_sums_in_float32(ours):
    batch = example(dtype=np.float32)
    h_EBTD, w_VD = (jnp.asarray(x, jnp.bfloat16) for x in batch[:2])
    (loss, _), gradients = ours(h_EBTD, w_VD, *batch[2:], 1e-2, 0.5, 2.0)
    exact = ours(h_EBTD.astype(jnp.float32), w_VD.astype(jnp.float32), *batch[2:], 1e-2, 0.5, 2.0)
    assert loss.dtype == jnp.float32 and all(x.dtype == jnp.bfloat16 for x in gradients)
    np.testing.assert_allclose(loss, exact[0][0], rtol=1e-5)
    assert_close([x.astype(jnp.float32) for x in gradients], exact[1], 2**-7)


def test_products_and_memory_are_no_more_than_asked_for():
    *batch, weights_E = example(dtype=np.float32)
    loss = lambda h, w: exit_cross_entropy(h, SharedHead(w), *batch[2:], weights_E, chunk=7)[0]  # noqa: E731
    asked = {loss: 1, jax.grad(loss): 2, jax.grad(loss, 1): 2, jax.grad(loss, (0, 1)): 3}
    for function, products in asked.items():
        program = str(jax.make_jaxpr(function)(*batch[:2]))
        assert program.count("dot_general[") == products
        sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w+\d+\[([\d,]+)\]", program)]
        assert max(sizes) == max(batch[0].size, batch[1].size, 7 * VOCABULARY)


def test_tokens_that_do_not_count_are_not_projected(monkeypatch):
    h_EBTD, w_VD, targets_BT, _, weights_E = example(dtype=np.float32)
    projected, project_vjp = [], SharedHead.project_vjp

    def counted(self, h_CD):
        jax.debug.callback(lambda: projected.append(len(h_CD)))
        return project_vjp(self, h_CD)

    monkeypatch.setattr(SharedHead, "project_vjp", counted)
    loss = jax.jit(lambda mask_BT: exit_cross_entropy(
        h_EBTD, SharedHead(w_VD), targets_BT, mask_BT, weights_E, distill=1.0, chunk=6)[0])
    for count, chunks in ((0, 0), (6, 1), (7, 2), (18, 3)):
        projected.clear()
        jax.block_until_ready(loss((np.random.RandomState(1).permutation(18) < count).reshape(BATCH, TOKENS) * 1.0))
        jax.effects_barrier()
        assert projected == [6] * chunks * 3  # the exits that are on


def test_metrics_are_constants_to_differentiation():
    h_EBTD, *rest = example(dtype=np.float32)
    assert not jax.grad(lambda h: exit_cross_entropy(h, SharedHead(rest[0]), *rest[1:])[1].z_E[0])(h_EBTD).any()


def test_settings_are_refused_by_name():
    h_EBTD, w_VD, targets_BT, mask_BT, weights_E = batch = example(dtype=np.float32)
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    for message, args, how in (
            ("hidden states are of shape", (h_EBTD[0], *batch[1:]), {}),
            ("w_VD is of shape", (h_EBTD, w_VD[:, 1:], *batch[2:]), {}),
            ("targets_BT is of shape", (h_EBTD, w_VD, targets_BT[:, 1:], mask_BT, weights_E), {}),
            ("mask_BT is of shape", (h_EBTD, w_VD, targets_BT, mask_BT[0], weights_E), {}),
            ("weights_E is of shape", (*batch[:4], weights_E[1:]), {}),
            ("chunk is 0", batch, dict(chunk=0)), ("temperature is 0", batch, dict(distill=1.0, temperature=0)),
            ("z_loss is -1", batch, dict(z_loss=-1)), ("distill is nan", batch, dict(distill=float("nan"))),
            ("only the last exit", (h_EBTD[:1], *batch[1:4], weights_E[:1]), dict(distill=0.5))):
        with pytest.raises(SettingError, match=message):
            exit_cross_entropy(args[0], SharedHead(args[1]), *args[2:], **how)
    with pytest.raises(SettingError, match=r"Split.tensor names \['model'\]"):
        Split(mesh, tensor="model")
