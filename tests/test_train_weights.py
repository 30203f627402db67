"""Weights of the exits over time, against the papers' formulas in plain Python."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sled.errors import SettingError
from sled.train.objective.exit_weights import (
    AllExits,
    FixedExits,
    Gradual,
    LastOnly,
    LayerSkipWeights,
    ProportionalWeights,
    Rotational,
    UniformWeights,
    WeightedExits,
    exit_counter,
)

STEPS = 1000


def layerskip(scale):
    """e(i) of the LayerSkip paper, i = 0..L-1."""
    return lambda i, num_layers: scale * sum(range(i + 1)) if i < num_layers - 1 else (
        num_layers - 1 + scale * sum(range(num_layers - 1)))


def uniform(i, num_layers):
    return 1


def proportional(i, num_layers):
    return i + 1


def rotational(every):
    return lambda t, i, num_layers: i % every == t % every


def gradual(steps):
    return lambda t, i, num_layers: t >= Fraction(steps, 2 * num_layers) * (num_layers - 1 - i)


def always(t, i, num_layers):
    return True


def published(e, curriculum, num_layers, steps):
    """e~(t, i) as [step, l]; the last layer is always on."""
    table = []
    for t in steps:
        on = [i == num_layers - 1 or curriculum(t, i, num_layers) for i in range(num_layers)]
        weights = [e(i, num_layers) if on[i] else 0 for i in range(num_layers)]
        table.append([float(w / sum(weights)) for w in weights])
    return np.array(table)


SKIP = LayerSkipWeights(0.2)
CASES = {
    "rotational": (WeightedExits(SKIP, Rotational(8)), 12, layerskip(0.2), rotational(8)),
    "rotational, last layer's turn": (WeightedExits(SKIP, Rotational(3)), 7, layerskip(0.2), rotational(3)),
    "rotational, one early exit": (WeightedExits(SKIP, Rotational(11)), 12, layerskip(0.2), rotational(11)),
    "rotational, more than layers": (WeightedExits(SKIP, Rotational(9)), 5, layerskip(0.2), rotational(4)),
    "gradual": (WeightedExits(LayerSkipWeights(1.0), Gradual(900)), 7, layerskip(1.0), gradual(900)),
    "all": (WeightedExits(SKIP, AllExits()), 12, layerskip(0.2), always),
    "chosen": (WeightedExits(ProportionalWeights(), AllExits((2, 4))), 6, proportional,
               lambda t, i, num_layers: i + 1 in (2, 4)),
    "CALM": (WeightedExits(ProportionalWeights(), AllExits()), 5, proportional, always),
    "uniform": (WeightedExits(UniformWeights(), Rotational(2)), 5, uniform, rotational(2)),
    "one layer": (WeightedExits(SKIP, Rotational(8)), 1, uniform, always),
}


@pytest.fixture(scope="module")
def exits():
    """Every case's exits and weights at every step."""

    @jax.jit
    def run(steps):
        return {case: jax.vmap(lambda step, plan=plan, depth=num_layers: plan.exits_at(step, depth))(steps)
                for case, (plan, num_layers, *_) in CASES.items()}

    return jax.tree.map(np.asarray, run(jnp.arange(STEPS)))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_papers(exits, case):
    _, num_layers, e, curriculum = CASES[case]
    layers, weights = exits[case]
    assert (np.diff(layers) > 0).all() and (layers[:, 0] >= 1).all() and (layers[:, -1] == num_layers).all()
    dense = np.zeros((STEPS, num_layers))
    np.put_along_axis(dense, layers - 1, weights, axis=1)
    np.testing.assert_allclose(dense, published(e, curriculum, num_layers, range(STEPS)), rtol=1e-5)
    assert (weights[:, -1] > 0).all()


def test_a_rotation_computes_no_more_exits_than_a_turn_has():
    for num_layers, every, count in ((32, 8, 5), (32, 31, 2), (40, 39, 2), (12, 1, 12), (7, 3, 3), (1, 4, 1)):
        plan = WeightedExits(SKIP, Rotational(every))
        layers, _ = jax.eval_shape(lambda plan=plan, n=num_layers: plan.exits_at(5, n))
        assert layers.shape == (count,)


def test_exits_are_counted_over_steps():
    turning = exit_counter(WeightedExits(UniformWeights(), Rotational(3)), 6)  # l = 0, 3 | 1, 4 | 2, and last 5
    assert (turning(0, 3), turning(2, 3), turning(3, 3)) == (pytest.approx(5 / 3), 1, 0)
    assert exit_counter(WeightedExits(SKIP, AllExits()), 6)(0, 10) == 4  # the first counts nothing
    assert exit_counter(LastOnly(), 6)(5, 9) == 0


def test_long_runs_of_deep_models_do_not_overflow():
    steps, num_layers = 2**31 - 1, 80
    times = [0, 13_421_772, 13_421_773, 2**30, 2**31 - 2]
    _, on = jax.jit(jax.vmap(lambda t: Gradual(steps).early_exits(t, num_layers)))(jnp.array(times))
    assert on.tolist() == [[gradual(steps)(t, i, num_layers) for i in range(num_layers - 1)] for t in times]


@pytest.mark.parametrize("course, way", [
    ("linear", lambda r: r), ("cosine", lambda r: 0.5 * (math.cos(math.pi * (r + 1)) + 1))])
@pytest.mark.parametrize("initial", [0.02, (0.3, 0.0)])  # one number, or one above and one below
def test_fixed_weights_warm_up_as_in_ee_llm(course, way, initial):
    plan = FixedExits((2, 5), (0.1, 0.4), initial=initial, warmup=200, course=course)
    layers, weights = map(np.asarray, jax.jit(jax.vmap(lambda step: plan.exits_at(step, 8)))(jnp.arange(STEPS)))
    assert (layers == [2, 5, 8]).all()
    ends = list(zip(np.broadcast_to(initial, 2), (0.1, 0.4), strict=True))
    want = [[*(way(min(t / 200, 1)) * (w - w0) + w0 for w0, w in ends), 1] for t in range(STEPS)]
    np.testing.assert_allclose(weights, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(FixedExits((2, 5), (0.1, 0.4)).exits_at(0, 8)[1], [0.1, 0.4, 1])


def test_the_last_layers_share_is_the_papers_and_not_torchtunes():
    """The figures of docs/training.md: 32 layers, all learning, scale 0.2."""
    share = float(WeightedExits(LayerSkipWeights(0.2), AllExits()).exits_at(0, 32)[1][-1])
    torchtunes = np.cumsum(np.arange(1, 33)) * np.where(np.arange(32) < 31, 0.2, 1)
    assert round(share, 3) == 0.111 and round(torchtunes[-1] / torchtunes.sum(), 3) == 0.326


def test_what_users_tune_compiles_nothing_anew():
    run = jax.jit(lambda plans, step: [plan.exits_at(step, 6) for plan in plans])
    for number in (1, 2):
        run((WeightedExits(LayerSkipWeights(number / 10), Gradual(100 * number)),
             FixedExits((2,), (number / 10,), initial=0.1 * number, warmup=number)), number)
    assert run._cache_size() == 1


@pytest.mark.parametrize(("make", "says"), [
    (lambda: LayerSkipWeights(-1), "scale is -1"),
    (lambda: Rotational(0), "every is 0"),
    (lambda: Gradual(0), "steps is 0"),
    (lambda: AllExits("all"), "layers is 'all'"),
    (lambda: WeightedExits("layerskip"), "profile is 'layerskip'"),
    (lambda: WeightedExits(SKIP, Rotational), "curriculum is"),
    (lambda: WeightedExits(SKIP, AllExits((3, 9))).exits_at(0, 8), "names 9, .* 1 to 8"),
    (lambda: WeightedExits(SKIP, AllExits((0, 3))).exits_at(0, 8), "names 0"),
    (lambda: FixedExits((4, 2), (0.1, 0.2)), "ascending"),
    (lambda: FixedExits((2, 4), (0.1,)), "1 entries for 2 layers"),
    (lambda: FixedExits((2, 4), (0.1, 0.2), initial=(0.1,)), "initial has 1 entries for 2 layers"),
    (lambda: FixedExits((2,), (0.1,), initial=-1), "initial is -1"),
    (lambda: FixedExits((2,), (0.1,), course="step"), "course is 'step'"),
    (lambda: FixedExits((2,), 0.1), "tuple of numbers"),
    (lambda: FixedExits((2,), (-0.1,)), r"weights\[0\] is -0.1"),
    (lambda: FixedExits((2, 8), (0.1, 0.1)).exits_at(0, 8), "the last one"),
    (lambda: FixedExits((2, 9), (0.1, 0.1)).exits_at(0, 8), "names 9"),
])
def test_impossible_plans_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()
