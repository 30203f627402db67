"""Lossless means lossless: held-out problems on the bundled model, guessed and verified, token for token.

By default 32 problems with one exit; `--exhaustive` takes 200, every exit of the model, every batch size, and drafts
without the ending token (some ten minutes).
"""

import functools

import numpy as np
import pytest

import sled
from sled.demo.problems import problems, prompt

MOST = dict(max_new_tokens=96)


@pytest.fixture(scope="module")
def questions(demo):
    return [demo.text.encode(prompt(p.question)) for p in problems("heldout", 200, seed=7)]


@pytest.fixture(scope="module")
def plain(demo, questions):
    """`plain(fusion, count)`: what plain decoding with it says to so many, made once."""
    return functools.cache(lambda fusion, count: demo.generate(
        questions[:count], fusion=fusion, batch_size=8, **MOST).tokens)


EVERY = [(200, layer, fusion, batch, ends) for layer in range(1, 8) for fusion in (sled.FinalLayer(), sled.SLED())
         for batch in (1, 3, 8) for ends in (True, False)]


@pytest.mark.parametrize(("count", "layer", "fusion", "batch", "ends"), [
    (32, 2, sled.SLED(), 8, True), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in EVERY)], ids=str)
def test_guessing_changes_no_token(demo, questions, plain, count, layer, fusion, batch, ends):
    rng = np.random.default_rng(0)
    order = rng.permutation(count)  # strangers share a batch
    vocabulary = None if ends else np.setdiff1d(np.arange(demo.config.vocab_size), demo.config.eos_ids)
    said, accepted = {}, 0
    for begin in range(0, count, batch):
        rows = order[begin:begin + batch]
        rows = np.concatenate([rows, order[:batch - len(rows)]])
        out = demo.generate([questions[i] for i in rows], fusion=fusion, batch_size=batch, **MOST,
                            exits=sled.SelfSpeculation(layer, draft=rng.integers(1, 9, size=batch), max_draft=8,
                                                       vocabulary=vocabulary))
        said.update(zip(rows, out.tokens, strict=True))
        accepted += out.stats.accepted
    assert [said[i] for i in range(count)] == plain(fusion, count)
    assert accepted > count
