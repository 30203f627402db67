"""`sled.tune`: what it tries, and what it chooses from what was measured."""

import pytest
from tiny_lm import PROMPTS, generate, tiny_lm

import sled
from sled.calibration import tune as tuning
from sled.exits import FullDepth
from sled.timing import Times

EARLY, GUESSES = sled.EarlyExit((1, 3), threshold=(0.08, 0.07), max_deferred=3), sled.SelfSpeculation(2)
COUNT = 20  # with the longest prompt, as much room as the other tests have


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


def test_the_fastest_way_is_chosen(clock):
    clock(3, 2, 1, 4, 5, 6, 7, 8)
    tuned = sled.tune(tiny_lm(), PROMPTS, exits=[EARLY, GUESSES], batch_size=4, max_new_tokens=COUNT, progress=False)
    tried = [(trial.exits, trial.schedule) for trial in sorted(tuned.trials, key=lambda trial: trial.exits == GUESSES)]
    assert (FullDepth(), sled.Immediate()) in tried and len(tried) == 8
    assert [schedule for exits, schedule in tried if exits == EARLY] == [
        sled.Gather(2), sled.Immediate(), sled.Gather(4)]
    assert [schedule for exits, schedule in tried if exits == GUESSES] == [
        sled.Lockstep(), sled.Immediate(), sled.Gather(2), sled.Gather(4)]
    assert (tuned.exits, tuned.schedule) == (EARLY, sled.Gather(2))
    best = tuned.trials[0]
    count = generate(exits=EARLY, max_new_tokens=COUNT).stats.new_tokens
    assert (best.seconds, best.new_tokens, best.tokens_per_second) == (1, count, count) and best.mean_depth < 4
    guessed = tuned.trials[-1]
    assert guessed.exits == GUESSES and guessed.same_texts == 1
    table = tuned.table().splitlines()
    assert len(table) == 9
    assert "EarlyExit(layers=(1, 3), threshold=(0.08, 0.07), max_deferred=3), Gather(rows=2)" in table[1]
    assert table[3].split()[1] == "1.00" and table[3].endswith("no early exit")


def test_leaving_early_is_declined_where_it_does_not_pay(clock):
    clock(1, 2)
    tuned = sled.tune(tiny_lm(), PROMPTS[2:3], exits=EARLY, max_new_tokens=COUNT, progress=False)
    assert tuned.exits == FullDepth() and len(tuned.trials) == 2  # one row: no schedule differs from another
    assert generate(exits=tuned.exits, schedule=tuned.schedule).stats.mean_depth == 4


def test_the_real_clock():
    tuned = sled.tune(tiny_lm(), PROMPTS[2:3], exits=EARLY, rounds=1, max_new_tokens=COUNT, progress=False)
    assert all(trial.seconds > 0 for trial in tuned.trials)
