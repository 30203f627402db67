"""Layer dropout: probabilities as published, draws that keep to them, strategies that agree, and work really saved."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sled.errors import SettingError
from sled.models.config import DecoderConfig
from sled.models.decoder import Decoder
from sled.models.layers import LayerContext
from sled.train.objective.forward import exit_states
from sled.train.objective.layer_dropout import (
    ExponentialProfile,
    Falling,
    FixedRows,
    LayerDropout,
    LinearProfile,
    Masked,
    WholeBatch,
    dont_drop_dropout,
    layerskip,
)

LAYERS, BATCH, STEPS = 4, 6, 3000
FOREVER = 2**31 - 1  # a schedule that does not move within a test
KEY = jax.random.key(3)
# As users compile: without these passes, one product of matrices rounds otherwise within a conditional (jax 0.12).
USUAL = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@jax.jit
def scales_of(dropout, key, first):
    """What every layer's change is multiplied by at 3,000 steps: [steps, L, B]."""
    draw = lambda step: dropout.draw(key, step, BATCH, LAYERS).scale_LB  # noqa: E731
    return jnp.broadcast_to(jax.vmap(draw)(first + jnp.arange(STEPS)), (STEPS, LAYERS, BATCH))


@pytest.fixture(scope="module", params=[Masked(), FixedRows(shards=2), WholeBatch()], ids=repr)
def strategy(request):
    return request.param


@pytest.fixture(scope="module")
def drawn(strategy):
    """Draws of 3,000 steps at constant probabilities 0, .1, .2, .3."""
    return np.asarray(scales_of(dont_drop_dropout(0.3, steps=FOREVER, strategy=strategy), KEY, 0))


def test_probabilities_are_the_papers():
    steps, rate, layers = 50, 0.2, 7
    for t in (0, 1, 20, 49, 60):
        past = min(t, steps - 1) / (steps - 1)
        skip = [(math.exp(past * math.log(2)) - 1) * (math.exp(i * math.log(2) / (layers - 1)) - 1) * rate
                for i in range(layers)]
        later = [(1 - past) * rate * i / (layers - 1) for i in range(layers)]
        np.testing.assert_allclose(layerskip(rate, steps=steps).rates(t, layers), skip, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(dont_drop_dropout(rate, steps=steps).rates(t, layers), later, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(layerskip(rate).rates(7, 3), [0, rate * (2**0.5 - 1), rate], rtol=1e-6)
    assert ExponentialProfile().shares(1).tolist() == LinearProfile().shares(1).tolist() == [0]
    assert not layerskip(0.1).rescale and dont_drop_dropout(0.1, steps=9).rescale


def test_layers_are_dropped_as_often_as_said(strategy):
    """By a falling schedule: in all and in each third, every row's drops are within 4.5 standard deviations of their
    sum, over draws that are independent."""
    scales = np.asarray(scales_of(dont_drop_dropout(0.5, steps=STEPS, strategy=strategy), KEY, 0))
    rates = 0.5 * (1 - np.arange(STEPS) / (STEPS - 1))[:, None, None] * np.linspace(0, 1, LAYERS)[:, None]
    for when in (slice(STEPS), slice(1000), slice(1000, 2000), slice(2000, STEPS)):
        dropped, p = scales[when] == 0, rates[when]
        assert (abs((dropped - p).sum(0)) <= 4.5 * np.sqrt((p * (1 - p)).sum(0)) + 1e-6).all()
    kept = scales != 0
    np.testing.assert_allclose(scales[kept], np.broadcast_to(1 / (1 - rates), scales.shape)[kept], rtol=1e-5)


def test_rows_of_a_layer_are_independent_layers_too(strategy, drawn):
    """Except where the strategy says otherwise: all rows alike, or a count that varies by less than one."""
    dropped = drawn == 0
    assert abs(np.corrcoef(dropped[:, 2, 0], dropped[:, 3, 0])[0, 1]) < 0.08
    counts = dropped.reshape(STEPS, LAYERS, getattr(strategy, "shards", 1), -1).sum(-1)
    if isinstance(strategy, FixedRows):
        expected = 0.1 * np.arange(LAYERS)[None, :, None] * BATCH / strategy.shards
        assert (abs(counts - expected) < 1).all()
    elif strategy == WholeBatch():
        assert np.isin(counts, [0, BATCH]).all()
    else:
        assert abs(np.corrcoef(dropped[:, 3, 0], dropped[:, 3, 1])[0, 1]) < 0.08


def test_draws_depend_on_key_and_step_alone(strategy, drawn):
    dropout = dont_drop_dropout(0.3, steps=FOREVER, strategy=strategy)
    np.testing.assert_array_equal(scales_of(dropout, KEY, 1700)[:1300] == 0, drawn[1700:] == 0)
    assert (scales_of(dropout, jax.random.key(4), 0) != drawn).any()
    assert len({step.tobytes() for step in drawn}) > 10


CONFIG = DecoderConfig("llama", vocab_size=20, width=16, mlp_width=24, num_layers=LAYERS, num_heads=2,
                       num_kv_heads=1, head_dim=8, max_positions=16, tied_head=True)
TOKENS_BT = np.random.RandomState(0).randint(1, 20, (BATCH, 7))
SEGMENTS_BT = np.repeat([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2]], BATCH // 2, axis=0)


@pytest.fixture(scope="module")
def model():
    return Decoder.init(CONFIG, rngs=nnx.Rngs(0)).stack()


@pytest.fixture(scope="module")
def pass_of(model):
    """`pass_of(dropout, step)`: the exits' states, and the gradient of their squares; of packed rows."""
    graph, weights = nnx.split(model)

    @jax.jit(compiler_options=USUAL)
    def run(weights, dropout, step):
        drops = None if dropout is None else dropout.draw(KEY, step, BATCH, LAYERS)

        def loss(weights):
            states = exit_states(nnx.merge(graph, weights), TOKENS_BT, (2, LAYERS), segments_BT=SEGMENTS_BT,
                                 drops=drops)
            return jnp.sum(states**2), states

        gradient, states = jax.grad(loss, has_aux=True)(weights)
        return states, gradient

    return lambda dropout, step=0: run(weights, dropout, step)


def test_a_rate_of_zero_changes_no_bit(pass_of, strategy):
    jax.tree.map(np.testing.assert_array_equal, pass_of(LayerDropout(0.0, strategy=strategy)), pass_of(None))


def test_a_dropped_layer_passes_its_input_on_and_counts_nothing(strategy):
    h_BTD = jax.random.normal(KEY, (BATCH, 2, 3))

    @jax.jit
    def run(step):
        drops = jax.tree.map(lambda leaf: leaf[-1], LayerDropout(0.6, strategy=strategy).draw(KEY, step, BATCH, LAYERS))
        layer = lambda h, rows: (h + jnp.sin(h), {"counts": jnp.ones((len(h), 2))})  # noqa: E731
        out, counted = strategy.apply(layer, h_BTD, {}, drops, LAYERS - 1)
        return out, counted["counts"], jnp.broadcast_to(drops.scale_LB, BATCH)

    dropped = 0
    for out, counts, scale in map(run, range(6)):
        np.testing.assert_array_equal(counts, np.tile(scale[:, None] > 0, 2))
        np.testing.assert_array_equal(out[scale == 0], h_BTD[scale == 0])
        np.testing.assert_allclose(out, h_BTD + scale[:, None, None] * jnp.sin(h_BTD), rtol=1e-5, atol=1e-6)
        dropped += int((scale == 0).sum())
    assert 0 < dropped < 6 * BATCH


def test_saved_rows_change_nothing_but_the_work(pass_of):
    """With rows packed, so that positions and documents are left out with them."""
    plain = LayerDropout(0.6, strategy=FixedRows(shards=2))
    saving = plain.saving(BATCH, LAYERS, 0, 10)
    assert saving.strategy.saved == (0, 0, 1, 1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, pass_of(plain, 5), pass_of(saving, 5))


def test_saved_rows_fit_every_step_of_their_stretch():
    """And counts made for other steps are not used in silence."""
    dropout = dont_drop_dropout(0.7, steps=STEPS, strategy=FixedRows())
    saving = dropout.saving(BATCH, LAYERS, 0, 500)
    assert saving.strategy.saved == dropout.saving(BATCH, LAYERS, 500, 0).strategy.saved == (0, 1, 2, 3)
    scales = scales_of(saving, KEY, 0)
    assert jnp.isfinite(scales[:501]).all() and ((scales[:501] == 0).sum(-1) >= jnp.array(saving.strategy.saved)).all()
    assert jnp.isnan(scales[2000:, 1:]).all() and jnp.isfinite(scales[:, 0]).all()
    assert Masked().saving(np.ones(2), 3) == Masked() and WholeBatch().saving(np.ones(2), 3) == WholeBatch()


def test_rows_left_out_cost_no_arithmetic(model):
    graph, layers = nnx.split(model.layers)
    block = jax.tree.map(lambda leaf: leaf[0], layers)
    h_BTD = jnp.ones((BATCH, 8, CONFIG.width))
    context = LayerContext.of(CONFIG, jnp.arange(8)[None])

    def flops(saved):
        strategy = FixedRows((saved,))

        def loss(weights, h_BTD, drops):
            run = lambda h, rows: (nnx.merge(graph, weights)(h, rows, None)[0], None)  # noqa: E731
            return strategy.apply(run, h_BTD, context, drops, 0)[0].sum()

        drops = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], LayerDropout(0.0, strategy=strategy).draw(
            KEY, 0, BATCH, 1)))
        return jax.jit(jax.grad(loss)).lower(block, h_BTD, drops).compile().cost_analysis()["flops"]

    assert flops(3) / flops(0) == pytest.approx(0.5, abs=0.03)


def test_a_batch_that_drops_a_layer_does_not_run_it():
    """Neither forward nor backward: the layers that ran, counted as they run."""
    ran = {"forward": 0, "backward": 0}

    def count(which):
        jax.debug.callback(lambda: ran.__setitem__(which, ran[which] + 1))

    @jax.custom_vjp
    def block(h):
        count("forward")
        return 2 * h

    block.defvjp(lambda h: (block(h), None), lambda _, g: (count("backward"), (2 * g,))[1])

    @jax.jit
    @jax.grad
    def gradient(h_BTD, drops):
        body = lambda h, drop: drop.strategy.apply(lambda h, rows: (block(h), None), h, {}, drop, 0)  # noqa: E731
        return jax.lax.scan(body, h_BTD, drops)[0].sum()

    h_BTD, kept = jnp.ones((2, 1, 1)), []
    for step in range(6):
        drops = LayerDropout(0.6, rescale=False, strategy=WholeBatch()).draw(KEY, step, 2, LAYERS)
        kept.append(int((drops.scale_LB > 0).sum()))
        assert (gradient(h_BTD, drops) == 2 ** kept[-1]).all()
    jax.effects_barrier()
    assert ran == {"forward": sum(kept), "backward": sum(kept)} and LAYERS < sum(kept) < 6 * LAYERS


def test_rates_and_schedules_compile_nothing_anew():
    run = jax.jit(lambda dropout, step: dropout.draw(KEY, step, BATCH, LAYERS).scale_LB)
    for number in (1, 2):
        run(dont_drop_dropout(number / 10, steps=100 * number), number)
    assert run._cache_size() == 1


@pytest.mark.parametrize(("make", "says"), [
    (lambda: layerskip(1.0), "rate is 1.0"),
    (lambda: layerskip(-0.1), "rate is -0.1"),
    (lambda: layerskip(0.1, steps=1), "steps is 1"),
    (lambda: Falling(1), "steps is 1"),
    (lambda: LayerDropout(0.1, "linear"), "profile is 'linear'"),
    (lambda: LayerDropout(0.1, strategy="mask"), "strategy is 'mask'"),
    (lambda: LayerDropout(0.1, rescale=None), "rescale is None"),
    (lambda: FixedRows((1, -1)), r"saved\[1\] is -1"),
    (lambda: FixedRows(3), "saved is 3"),
    (lambda: FixedRows(shards=0), "shards is 0"),
    (lambda: LayerDropout(0.1, strategy=FixedRows(shards=4)).draw(KEY, 0, 6, 2), "does not divide a batch of 6"),
    (lambda: FixedRows((0, 1)).stretches(3), "2 counts for 3 layers"),
])
def test_impossible_settings_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()
