"""`LM.tune`: what it tries, and what it chooses from what was measured."""

import pytest
from flax import nnx

import sled
from sled.calibration import tune as tuning
from sled.errors import PromptError, SettingError
from sled.exits import FullDepth
from sled.lm import LM
from sled.models import Decoder, DecoderConfig
from sled.timing import Times

CONFIG = DecoderConfig(family="llama", vocab_size=61, width=32, mlp_width=48, num_layers=3, num_heads=4,
                       num_kv_heads=2, head_dim=8, max_positions=64)
EARLY, GUESSES = sled.EarlyExit(1, threshold=0.01), sled.SelfSpeculation(1)
PROMPTS = [[7, 8], [9], [10], [11, 12]]


@pytest.fixture(scope="module")
def lm():
    return LM(Decoder.init(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)`: every way takes as long as it says, in the order they are tried."""

    def set_to(*seconds):
        def interleave(calls, rounds, bar):
            for call in calls.values():
                call()
            return {way: Times([seconds[way], 9.0]) for way in calls}

        monkeypatch.setattr(tuning, "interleave", interleave)

    return set_to


def test_the_fastest_way_is_chosen(lm, clock):
    clock(3, 2, 1, 4, 5, 6, 7, 8)
    tuned = sled.tune(lm, PROMPTS, exits=[EARLY, GUESSES], batch_size=4, max_new_tokens=4, progress=False)
    tried = [(trial.exits, trial.schedule) for trial in sorted(tuned.trials, key=lambda trial: trial.exits == GUESSES)]
    assert (FullDepth(), sled.Immediate()) in tried and len(tried) == 8
    assert [schedule for exits, schedule in tried if exits == EARLY] == [
        sled.Gather(2), sled.Immediate(), sled.Gather(4)]
    assert [schedule for exits, schedule in tried if exits == GUESSES] == [
        sled.Lockstep(), sled.Immediate(), sled.Gather(2), sled.Gather(4)]
    assert (tuned.exits, tuned.schedule) == (EARLY, sled.Gather(2))
    best = tuned.trials[0]
    assert (best.seconds, best.new_tokens, best.tokens_per_second) == (1, 16, 16) and best.mean_depth < 3
    guessed = tuned.trials[-1]
    assert guessed.exits == GUESSES and guessed.same_texts == 1
    table = tuned.table().splitlines()
    assert len(table) == 9 and "EarlyExit(layers=(1,), threshold=0.01), Gather(rows=2)" in table[1]
    assert table[3].split()[1] == "1.00" and table[3].endswith("no early exit")


def test_leaving_early_is_declined_where_it_does_not_pay(lm, clock):
    clock(1, 2)
    tuned = sled.tune(lm, PROMPTS[:1], exits=EARLY, max_new_tokens=4, progress=False)
    assert tuned.exits == FullDepth() and len(tuned.trials) == 2  # one row: no schedule differs from another
    assert lm.generate(PROMPTS, exits=tuned.exits, schedule=tuned.schedule, max_new_tokens=2).stats.mean_depth == 3


def test_the_real_clock(lm):
    tuned = sled.tune(lm, PROMPTS, exits=EARLY, batch_size=1, rounds=1, max_new_tokens=4, progress=False)
    assert all(trial.seconds > 0 for trial in tuned.trials)


@pytest.mark.parametrize(("settings", "error", "says"), [
    (dict(exits=[]), SettingError, "exits is empty"), (dict(exits=EARLY, rounds=0), SettingError, "rounds is 0"),
    (dict(exits=sled.EarlyExit(3)), SettingError, "no early exit of a model of 3"),
    (dict(exits=["early"]), SettingError, "exits is 'early'"),
    (dict(exits=EARLY, prompts=[]), PromptError, "no prompt"),
], ids=str)
def test_what_cannot_be_tuned(lm, settings, error, says):
    with pytest.raises(error, match=says):
        sled.tune(lm, **{"prompts": PROMPTS, "progress": False, **settings})
