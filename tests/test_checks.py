"""Rules of settings: what passes, what it becomes, and what an error says."""

import dataclasses
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sled.errors import SettingError
from sled.settings.decorator import settings
from sled.settings.field import setting
from sled.settings.rules import Each, Layers, Number, OneOf, Whole

NAN, INF = float("nan"), float("inf")
CHANCE = Number(0, 1, open_low=True, open_high=True, hint="h")
SHARE, RATE, BOUND = Number(0, 1, hint="h"), Number(0, open_low=True, hint="h"), Number(hint="h")
COUNT, FEW = Whole(1, hint="h"), Whole(0, 4, hint="h")
WORDS = Layers((None, "all"))


@pytest.mark.parametrize(("rule", "value", "clean"), [
    (SHARE, 0, 0.0), (SHARE, 1, 1.0), (SHARE, np.float32(0.5), 0.5), (SHARE, Fraction(1, 4), 0.25),
    (RATE, 1e-9, 1e-9), (RATE, np.int64(3), 3.0), (BOUND, -INF, -INF), (BOUND, -1000, -1000.0),
    (COUNT, 1, 1), (COUNT, 2.0, 2), (COUNT, np.int8(7), 7), (COUNT, 10**400, 10**400), (FEW, 0, 0), (FEW, 4.0, 4),
    (WORDS, None, None), (WORDS, "all", "all"), (WORDS, [6, 2, 6], (2, 6)), (WORDS, np.array([3, 1]), (1, 3)),
    (WORDS, range(2), (0, 1)), (Each(SHARE), [0, 1], (0.0, 1.0)), (Each(COUNT), (), ()),
    (Each(SHARE, one=True), 1, 1.0), (Each(SHARE, one=True), [1, 0], (1.0, 0.0)),
    (Each(COUNT), [np.array(2), jnp.array(3)], (2, 3)), (OneOf(("on", "off")), "off", "off"),
])
def test_what_fits_becomes_one_type(rule, value, clean):
    found = rule("name", value)
    assert found == clean and type(found) is type(clean)


@pytest.mark.parametrize("value", [NAN, INF, np.float32(NAN), np.float32(INF), True, np.True_, "1", None, 1j, (1,),
                                   np.array(1), jnp.array(1), ...], ids=repr)
@pytest.mark.parametrize("rule", [SHARE, RATE, BOUND, COUNT, FEW], ids=repr)
def test_what_is_no_number_is_refused(rule, value):
    with pytest.raises(SettingError):
        rule("name", value)


@pytest.mark.parametrize(("rule", "value", "says"), [
    (SHARE, 1.5, "name is 1.5, but must be a number in [0, 1]; h"),
    (SHARE, -INF, "name is -inf, but must be a number in [0, 1]; h"),
    (RATE, 0, "name is 0, but must be a number in (0, inf); h"),
    (CHANCE, 1, "name is 1, but must be a number in (0, 1); h"),
    (CHANCE, 0, "name is 0, but must be a number in (0, 1); h"),
    (BOUND, INF, "name is inf, but must be a number in [-inf, inf); h"),
    (COUNT, 0, "name is 0, but must be a whole number of at least 1; h"),
    (SHARE, 10**400, "name is 10000000000"),
    (COUNT, 1.5, "name is 1.5, but must be a whole number of at least 1; h"),
    (FEW, 5, "name is 5, but must be a whole number from 0 to 4; h"),
    (Each(COUNT), (1, 0), "name[1] is 0, but must be a whole number of at least 1; h"),
    (Each(SHARE), (0.5, np.array(7.0)), "name[1] is 7.0, but must be a number in [0, 1]; h"),
    (Each(COUNT), "12", "name is '12', but must be a tuple of numbers; h"),
    (Each(COUNT, one=True), 0, "name is 0, but must be a whole number of at least 1; h"),
    (OneOf(("on", "off"), hint="h"), "of", "name is 'of', but must be one of 'on', 'off'; h"),
    (OneOf(("on", "off"), hint="h"), ["on"], "name is ['on'], but must be one of 'on', 'off'; h"),
    (WORDS, "low", "name is 'low', but must be None or 'all' or a tuple of layer indices such as (0, 8, 16); "),
])
def test_an_error_says_value_reason_and_remedy(rule, value, says):
    with pytest.raises(SettingError, match="^" + re.escape(says)):
        rule("name", value)


@pytest.mark.parametrize("value", [(), 3, (-1,), (True,), (1.0,), "", np.array(3), (NAN,), ("all",)], ids=repr)
def test_what_is_no_layers_is_refused(value):
    with pytest.raises(SettingError):
        WORDS("name", value)


def test_none_is_refused_where_it_is_no_word():
    with pytest.raises(SettingError, match="'low' or a tuple"):
        Layers(("low",))("name", None)


@settings
class Policy:
    threshold: float = setting(Number(0, 1, hint="it is a probability"), traced=True)
    patience: int = setting(COUNT, default=1)


def test_a_refusal_names_class_and_field_and_cleans():
    assert Policy(1, 2.0) == Policy(1.0, 2)
    assert [type(x) for x in dataclasses.astuple(Policy(1, 2.0))] == [float, int]
    with pytest.raises(SettingError, match=r"Policy\.threshold is 1\.1, .* it is a probability"):
        Policy(1.1)


def test_arrays_and_tracers_pass_in_traced_fields_only():
    threshold_B = np.array([0.5, 1.0])
    assert Policy(threshold_B).threshold is threshold_B
    for wrong in ([0.5, 7.0], [NAN, 0.5], ["a"], [0.5j]):
        with pytest.raises(SettingError, match=r"Policy\.threshold, an array"):
            Policy(np.array(wrong))
    assert jax.jit(lambda x: Policy(x).threshold)(2.0) == 2.0
    with pytest.raises(SettingError, match=r"Policy\.patience"):
        Policy(0.5, np.array(3))


def test_whole_and_broken_spellings_share_a_trace():
    traces = []
    jitted = jax.jit(lambda policy: traces.append(policy) or policy.threshold)
    assert [float(jitted(Policy(x, n))) for x, n in ((1, 3), (1.0, 3.0), (0.5, 3))] == [1, 1, 0.5]
    assert len(traces) == 1
    assert math.isnan(jax.tree.map(lambda _: NAN, Policy(1)).threshold)
