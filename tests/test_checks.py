"""Rules and classes of settings: what passes, what it becomes, what an error says, what is traced."""

import dataclasses
import itertools
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sled.errors import SettingError
from sled.settings.decorator import bound_of, declared, setting, settings
from sled.settings.rules import Each, Flag, Instance, Layers, Number, OneOf, OrNone, Several, Whole

NAN, INF = float("nan"), float("inf")
CHANCE = Number(0, 1, open_low=True, open_high=True, hint="h")
SHARE, RATE, BOUND = Number(0, 1, hint="h"), Number(0, open_low=True, hint="h"), Number(hint="h")
WARM = Number(0, 10, least=1e-3, hint="h")
COUNT, FEW = Whole(1, hint="h"), Whole(0, 4, hint="h")
NAMES = Several(str, "names", hint="h")
WORDS, WEIGHTS, SWITCH = Layers((None, "all")), OrNone(Each(BOUND)), Flag(hint="h")


@pytest.mark.parametrize(("rule", "value", "clean"), [
    (SHARE, 0, 0.0), (SHARE, 1, 1.0), (SHARE, np.float32(0.5), 0.5), (SHARE, Fraction(1, 4), 0.25),
    (RATE, 1e-9, 1e-9), (RATE, np.int64(3), 3.0), (BOUND, -INF, -INF), (BOUND, -1000, -1000.0),
    (RATE, 3.4e38, 3.4e38), (RATE, 1.2e-38, 1.2e-38), (BOUND, -3.4e38, -3.4e38), (SHARE, 1 - 1e-12, 1 - 1e-12),
    (WARM, 0, 0.0), (WARM, 1e-3, 1e-3),
    (COUNT, 1, 1), (COUNT, 2.0, 2), (COUNT, np.int8(7), 7), (COUNT, 10**400, 10**400), (FEW, 0, 0), (FEW, 4.0, 4),
    (WORDS, None, None), (WORDS, "all", "all"), (WORDS, [6, 2, 6], (2, 6)), (WORDS, np.array([3, 1]), (1, 3)),
    (WORDS, range(2), (0, 1)), (Each(SHARE), [0, 1], (0.0, 1.0)), (Each(COUNT), (), ()),
    (Each(SHARE, one=True), 1, 1.0), (Each(SHARE, one=True), [1, 0], (1.0, 0.0)),
    (Each(COUNT), [np.array(2), jnp.array(3)], (2, 3)), (OneOf(("on", "off")), "off", "off"),
    (WEIGHTS, None, None), (WEIGHTS, [1], (1.0,)), (SWITCH, True, True), (SWITCH, np.False_, False),
    (Instance(list, traced=False, hint="h"), [], []), (NAMES, "ab", ["ab"]), (NAMES, ("ab", "c"), ["ab", "c"]),
    (NAMES, iter("ab"), ["a", "b"]), (NAMES, [], []), (Several(int, "layers", hint="h"), 3, [3]),
    (Several(object, "things", one=False, hint="h"), range(2), [0, 1]),
])
def test_what_fits_becomes_one_type(rule, value, clean):
    found = rule("name", value)
    assert found == clean and type(found) is type(clean)


NO_NUMBERS = (NAN, INF, np.float32(NAN), np.float32(INF), True, np.True_, "1", None, 1j, (1,), np.array(1),
              jnp.array(1), ...)
NO_LAYERS = ((), 3, (-1,), (True,), (1.0,), "", "04", b"04", np.array(3), (NAN,), ("all",))
NO_NAMES = (None, 5, b"ab", {"a": 1}, {"a"}, [5], ["a", None], [["a"]])


@pytest.mark.parametrize(("rule", "value"), [
    *itertools.product((SHARE, RATE, BOUND, COUNT, FEW), NO_NUMBERS), *itertools.product([WORDS], NO_LAYERS),
    *itertools.product([NAMES], NO_NAMES), (Several(str, "texts", one=False, hint="h"), "ab")], ids=repr)
def test_what_is_of_another_kind_is_refused(rule, value):
    with pytest.raises(SettingError):
        rule("name", value)


@pytest.mark.parametrize(("rule", "value", "says"), [
    (SHARE, 1.5, "name is 1.5, but must be a number in [0, 1]; h"),
    (SHARE, -INF, "name is -inf, but must be a number in [0, 1]; h"),
    (RATE, 0, "name is 0, but must be a number in (0, inf); h"),
    (CHANCE, 1, "name is 1, but must be a number in (0, 1); h"),
    (CHANCE, 0, "name is 0, but must be a number in (0, 1); h"),
    (BOUND, INF, "name is inf, but must be a number in [-inf, inf); h"),
    # What is another number in float32.
    (RATE, 1e39, "name is 1e+39, which is inf in float32, but must be a number in (0, inf) there too; h"),
    (RATE, 1e-40, "name is 1e-40, which is 0 in float32, but must be a number in (0, inf) there too; h"),
    (RATE, 1e-300, "name is 1e-300, which is 0 in float32"), (SHARE, 1e-46, "name is 1e-46, which is 0 in float32"),
    (BOUND, -1e39, "name is -1e+39, which is -inf in float32, but"), (BOUND, 10**300, "name is 1000000000"),
    (CHANCE, 1 - 1e-12, "name is 0.999999999999, which is 1 in float32, but must be a number in (0, 1) there too; h"),
    (Each(RATE), (1, 5e-324), "name[1] is 5e-324, which is 0 in float32"),
    (WARM, 1e-4, "name is 0.0001, but must be 0 or a number in [0.001, 10]; h"), (WARM, -1, "name is -1, but must be"),
    (SHARE, "a" * 10**6, "name is 'aaaaa"),
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
    (OneOf(("on", "off")), "of", "name is 'of', but must be one of 'on', 'off'; choose one of them"),
    (WEIGHTS, (NAN,), "name[0] is nan, but must be a number in [-inf, inf); h"),
    (SWITCH, "no", "name is 'no', but must be True or False; h"),
    (SWITCH, 1, "name is 1, but must be True or False; h"),
    (Instance(list, hint="h"), list, "name is <class 'list'>, but must be an instance, not its class or name; h"),
    (Instance(list, hint="h"), 3, "name is 3, which is no list; h"),
    (Instance(Fraction, hint="h"), Fraction(1),
     "name is Fraction(1, 1), but must be an instance that jax can trace (its class "
     "decorated with sled.settings.decorator.settings); h"),
    (WORDS, "low", "name is 'low', but must be None or 'all' or a tuple of layer indices such as (0, 8, 16); "),
    (Layers(("low",)), None, "name is None, but must be 'low' or a tuple"),
])
def test_an_error_says_value_reason_and_remedy(rule, value, says):
    with pytest.raises(SettingError, match="^" + re.escape(says)):
        rule("name", value)


def test_a_value_that_cannot_be_written_down_is_refused_by_its_kind():
    with pytest.raises(SettingError, match=r"^name is a int, but must be a whole number of at least 1; h"):
        COUNT("name", -10**5000)


@settings
class Mine:
    """A class as a user writes one."""

    threshold: float = setting(SHARE, traced=True, help="how sure")
    patience: int = setting(COUNT, default=1, help="steps to wait")
    top: int = setting(COUNT, default=3, rows="B")
    weights: tuple[float, ...] | jax.Array | None = setting(WEIGHTS, default=None, rows="BC")
    nested: object = setting(default=None, traced=True)
    note: str = "anything"
    max_top: int | None = bound_of("top", least=4)
    constant = 7

    def __post_init__(self):
        assert isinstance(self.patience, int) and self.max_top, "the rules come first"
        if self.patience == 13:
            raise SettingError("no luck")


def test_a_class_of_settings_checks_and_cleans_its_fields():
    mine = Mine(1, 2.0)
    assert mine == Mine(1.0, 2, 3, None, None, "anything", 4) and Mine.constant == 7
    assert [type(x) for x in (mine.threshold, mine.patience)] == [float, int]
    assert dataclasses.replace(mine, top=9, max_top=None).max_top == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.patience = 3
    assert Mine.traced_fields == ("threshold", "top", "weights", "nested")
    assert Mine.row_axes == {"top": "B", "weights": "BC"}
    assert list(declared(Mine)) == ["threshold", "patience", "top", "weights", "nested", "max_top"]
    assert "as a user writes one" in Mine.__doc__
    assert "patience: steps to wait; h. It is a whole number from 1 to 2147483647. " in Mine.__doc__


@pytest.mark.parametrize(("wrong", "says"), [
    (dict(threshold=1.1), "Mine.threshold is 1.1, but must be a number in [0, 1]; h"),
    (dict(threshold=np.array([0.5, 7.0])), "Mine.threshold, an array, is 7.0, but"),
    (dict(threshold=np.array([NAN, 0.5])), "Mine.threshold, an array, is nan, but"),
    (dict(threshold=np.array(["a"])), "Mine.threshold, an array, is 'a', but"),
    (dict(threshold=np.array([0.5j])), "Mine.threshold, an array, is 0.5j, but"),
    (dict(weights=np.array([1, INF])), "Mine.weights, an array, is inf, but"),
    (dict(weights=np.array([1, 1e39])), "Mine.weights, an array, is 1e+39, which is inf in float32, but"),
    (dict(weights=np.array([[1], [1e-39]])), "Mine.weights, an array, is 1e-39, which is 0 in float32, but"),
    (dict(threshold=np.array([None, 0.5])), "Mine.threshold, an array, is None, but"),
    (dict(threshold=np.array([True])), "Mine.threshold, an array, is True, but"),
    (dict(top=np.array([2.5]), max_top=4), "Mine.top, an array, is 2.5, but must be a whole number"),
    (dict(top=[1, 2]), "Mine.top is [1, 2], but must be a whole number from 1 to 2147483647; h; numbers for the rows "
                       "are a NumPy array [B], as np.array([1, 2]) is one"),
    (dict(top=(1, 2)), "Mine.top is (1, 2), but must be a whole number"),
    (dict(weights=[[1.0], [2.0]]), "Mine.weights[0] is [1.0], but must be a number in [-inf, inf); h; numbers for the "
                                   "rows are a NumPy array [B, C], as np.array([[1.0], [2.0]]) is one"),
    (dict(weights=(1, "a")), "Mine.weights[1] is 'a', but"),
    (dict(patience=np.array(3)), "Mine.patience is array(3), but must be a whole number"),
    (dict(patience=13), "no luck"),
    (dict(top=2**31), "Mine.top is 2147483648, but must be a whole number from 1 to 2147483647; h"),
    (dict(top=5, max_top=4), "Mine.top is 5, but must be a whole number from 1 to 4; max_top is its bound"),
    (dict(top=np.array([1, 5]), max_top=4), "Mine.top, an array, is 5, but must be a whole number from 1 to 4"),
    (dict(top=np.array([1, 5])), "Mine.top is an array, whose entries need a static bound; give max_top too"),
    (dict(max_top=0), "Mine.max_top is 0, but must be a whole number from 1 to 2147483647; it is static, and None"),
])
def test_a_class_of_settings_refuses_by_class_and_field(wrong, says):
    with pytest.raises(SettingError, match="^" + re.escape(says)):
        Mine(**{"threshold": 0.5, **wrong})


def test_arrays_and_tracers_pass_in_traced_fields():
    threshold_B = np.array([0.5, 1.0])
    assert Mine(threshold_B).threshold is threshold_B
    for kind in ("uint8", "int64", "float32"):
        assert Mine(1, top=np.array([3], kind), max_top=4).top.dtype == np.int32
    assert jax.jit(lambda x: Mine(x, weights=(x, 1)).threshold)(2.0) == 2.0


def test_tuned_numbers_share_a_trace_and_static_ones_do_not():
    traces = []
    jitted = jax.jit(lambda mine: traces.append(mine) or mine.threshold * mine.top)
    assert [float(jitted(Mine(x, n, top))) for x, n, top in ((1, 3, 1), (1.0, 3.0, 2), (0.5, 3, 4))] == [1, 2, 2]
    assert len(traces) == 1
    jitted(Mine(1, 4)), jitted(Mine(1, 4, max_top=5)), jitted(Mine(1, 4, note="else"))
    assert len(traces) == 4


def test_rebuilding_from_leaves_checks_nothing_and_leaves_have_names():
    assert math.isnan(jax.tree.map(lambda _: NAN, Mine(1)).threshold)
    found = jax.tree_util.tree_flatten_with_path(Mine(0.5, weights=(1, 2), nested=Mine(1)))[0]
    assert [(jax.tree_util.keystr(path), leaf) for path, leaf in found] == [
        (".threshold", 0.5), (".top", 3), (".weights[0]", 1.0), (".weights[1]", 2.0),
        (".nested.threshold", 1.0), (".nested.top", 3)]


def test_a_class_of_settings_can_be_extended():
    @settings
    class More(Mine):
        patience: int = setting(FEW, default=2)
        extra: bool = setting(SWITCH, default=False)

    assert More(1).patience == 2 and More(1, top=20).max_top == 32
    for wrong in (dict(extra="no"), dict(patience=5), dict(threshold=2)):
        with pytest.raises(SettingError, match="More"):
            More(**{"threshold": 1, **wrong})
