"""Settings with an entry per row: each follows its prompt, whatever the batches; what is not per row stays whole."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_lm import CAPACITY, generate, tiny_lm
from tiny_lm import PROMPTS as FOUR

import sled
from sled.errors import SettingError
from sled.exits import FullDepth
from sled.settings.per_row import check_rows, take_rows

PROMPTS = [*FOUR, [7, 8]]  # not in the order of their lengths
SIX = np.arange(1, 7, dtype=np.float32)
FIRST = np.eye(5, dtype=np.float32)
BY_ROW = {
    "sampling, SLED and drafts": (
        dict(sampling=sled.Sampling(temperature=np.array([0, 9, 3, 9, 0.0]), top_k=np.array([0, 0, 5, 0, 0])),
             fusion=sled.SLED(rate=jnp.array([0, 1, 2, 4, 1.0]), scale=np.array([3, 9, 1, 20, 4]), max_scale=32),
             exits=sled.SelfSpeculation(1, np.array([1, 4, 2, 3, 5]), max_draft=8, vocabulary=jnp.arange(30, 34))),
        lambda i: dict(sampling=sled.Sampling(temperature=[0, 9, 3, 9, 0][i], top_k=[0, 0, 5, 0, 0][i]),
                       fusion=sled.SLED(rate=[0, 1, 2, 4, 1][i], scale=[3, 9, 1, 20, 4][i], max_scale=32),
                       exits=sled.SelfSpeculation(1, [1, 4, 2, 3, 5][i], vocabulary=jnp.arange(30, 34)))),
    # As many weights as prompts: nothing tells them from rows but the settings themselves.
    "weights by row": (dict(fusion=sled.LayerAverage(FIRST[[4, 0, 1, 2, 3]])),
                       lambda i: dict(fusion=sled.LayerAverage(FIRST[[4, 0, 1, 2, 3][i]]))),
    "weights of all": (dict(fusion=sled.LayerAverage(FIRST[2])), lambda i: dict(fusion=sled.LayerAverage(FIRST[2]))),
    "thresholds": (
        dict(exits=sled.EarlyExit((1, 3), np.array([[1, 0], [0, 1], [1, 1], [0, 0.0], [1, 1]]), max_deferred=3)),
        lambda i: dict(exits=sled.EarlyExit((1, 3), [(1, 0), (0, 1), (1, 1), (0, 0), (1, 1)][i], max_deferred=3))),
}


@pytest.mark.parametrize("case", BY_ROW)
def test_each_row_keeps_its_own_whatever_the_batches(case):
    together, alone = BY_ROW[case]
    expected = [generate([prompt], seed=5 + i, **alone(i)) for i, prompt in enumerate(PROMPTS)]
    out = generate(PROMPTS, seed=5, batch_size=4, **together)  # three idle rows in the second
    assert out.tokens == [one.tokens[0] for one in expected]
    assert out.exit_layers == [one.exit_layers[0] for one in expected]


def test_rows_of_one_batch_keep_their_own():
    temperatures = [0, 9, 3, 9, 0.0]
    settings = dict(sampling=sled.Sampling(temperature=np.array(temperatures)), max_new_tokens=CAPACITY)
    expected = [generate(prompt, seed=i, sampling=sled.Sampling(temperature=temperatures[i])).tokens[0]
                for i, prompt in enumerate(PROMPTS)]
    assert generate(PROMPTS, **settings).tokens == expected
    pieces = list(tiny_lm().stream(PROMPTS, **settings))
    assert [[token for piece in pieces for token in piece.tokens[i]] for i in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("settings", [
    dict(sampling=sled.Sampling(temperature=SIX)),
    dict(sampling=sled.Sampling(top_p=np.ones((5, 1)))),
    dict(fusion=sled.SLED(rate=SIX)),
    dict(fusion=sled.LayerAverage(np.ones((6, 5)))),
    dict(exits=sled.EarlyExit((1, 2), threshold=np.ones((6, 2)))),
    dict(exits=sled.EarlyExit((1, 2), threshold=np.ones((5, 1, 2)))),
    dict(exits=sled.SelfSpeculation(1, confidence=SIX / 9)),
], ids=str)
def test_rows_that_are_not_the_prompts_are_refused(settings):
    for call in (tiny_lm().generate, tiny_lm().stream):
        with pytest.raises(SettingError, match=r"B is 1 or 5 here; .* prompts"):
            call(PROMPTS, **settings)


def test_score_and_lens_take_no_rows():
    lm = tiny_lm()
    for fusion in (sled.SLED(rate=SIX), sled.LayerAverage(np.ones((2, 5)))):
        with pytest.raises(SettingError, match=r"B is 1 here; .*score"):
            lm.score([[1], [2]], [[3], [4]], fusion=fusion)
        with pytest.raises(SettingError, match=r"B is 1 here; .*lens"):
            lm.lens([1, 2], fusion=fusion)
    one = lm.score([1], [[2, 3]], fusion=sled.SLED(rate=np.array([2.0])))
    assert one.totals == lm.score([1], [[2, 3]], fusion=sled.SLED(rate=2.0)).totals


def test_an_array_for_one_exit_after_another_is_no_array_of_rows():
    with pytest.raises(SettingError, match="4 numbers for 2 exits"):
        sled.EarlyExit((1, 2), threshold=np.ones(4))
    for build in (lambda x: sled.EarlyExit((1, 2), threshold=(x, x)), lambda x: sled.LayerAverage((x, x))):
        build(np.float32(1)), build(np.array(1.0))
        with pytest.raises(SettingError):
            build(np.ones(2))


def test_rows_are_taken_from_what_has_rows_only():
    policy = sled.EarlyExit((1, 2), threshold=np.array([[1.0], [0.0]]), min_layer=np.array([1]))
    check_rows(policy, 2, hint="")
    taken = take_rows(policy, [1, 1, 0])
    assert taken.threshold.tolist() == [[0], [0], [1]] and taken.min_layer.tolist() == [1]
    assert take_rows(sled.SLED(), [1, 0]) == sled.SLED() and take_rows(FullDepth(), [0]) == FullDepth()
    check_rows(object(), 2, hint="")  # a strategy of one's own may know nothing of rows
