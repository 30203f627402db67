"""Lossless means lossless: 200 held-out problems on the bundled model, guessed and verified, token for token.

By default with one exit; `--exhaustive` takes every exit of the model, every batch size, and drafts without the ending
token (some ten minutes).
"""

import numpy as np
import pytest

import sled
from sled.demo.problems import problems, prompt

COUNT = 200
MOST = dict(max_new_tokens=96)


@pytest.fixture(scope="module")
def lm():
    return sled.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def questions(lm):
    return [lm.text.encode(prompt(p.question)) for p in problems("heldout", COUNT, seed=7)]


@pytest.fixture(scope="module")
def plain(lm, questions):
    """`plain(fusion)`: what plain decoding with it says, made once."""
    made = {}

    def say(fusion):
        if fusion not in made:
            made[fusion] = lm.generate(questions, fusion=fusion, batch_size=8, **MOST).tokens
        return made[fusion]

    return say


CASES = [(2, sled.SLED(), 8, True)]
EVERY = [(layer, fusion, batch, ends) for layer in range(1, 8) for fusion in (sled.FinalLayer(), sled.SLED())
         for batch in (1, 3, 8) for ends in (True, False)]


@pytest.mark.parametrize(("layer", "fusion", "batch", "ends"), [
    *CASES, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in EVERY if case not in CASES)], ids=str)
def test_guessing_changes_no_token(lm, questions, plain, layer, fusion, batch, ends):
    rng = np.random.default_rng(0)
    order = rng.permutation(COUNT)  # strangers share a batch
    vocabulary = None if ends else np.setdiff1d(np.arange(lm.config.vocab_size), lm.config.eos_ids)
    said, accepted = {}, 0
    for begin in range(0, COUNT, batch):
        rows = order[begin:begin + batch]
        rows = np.concatenate([rows, order[:batch - len(rows)]])
        out = lm.generate([questions[i] for i in rows], fusion=fusion, batch_size=batch, **MOST,
                          exits=sled.SelfSpeculation(layer, draft=rng.integers(1, 9, size=batch), max_draft=8,
                                                     vocabulary=vocabulary))
        said.update(zip(rows, out.tokens, strict=True))
        accepted += out.stats.accepted
    assert [said[i] for i in range(COUNT)] == plain(fusion)
    assert accepted > COUNT
