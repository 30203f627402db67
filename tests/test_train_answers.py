"""A model's own answers as training data: what the model says, once, and gone on with after a kill."""

import json

import pytest
from tiny_lm import EOS, PROMPTS, generate, tiny_lm
from training_data import documents_of

from sled.errors import SettingError
from sled.train.data.answers import own_answers
from sled.train.data.packing import Layout
from sled.train.data.rows import read_rows
from sled.train.data.sources import Source

ROWS = [{"ids": prompt} for prompt in (*PROMPTS, [], *PROMPTS[::-1])]


class Counting:
    """The tiny model, which counts the batches that it answers, and dies at the one of number `fails`."""

    def __init__(self, fails=None):
        self._lm, self.batches, self._fails = tiny_lm(), 0, fails

    def __getattr__(self, name):
        return getattr(self._lm, name)

    def generate(self, prompts, **settings):
        self.batches += 1
        if self.batches == self._fails:
            raise KeyboardInterrupt
        return self._lm.generate(prompts, **settings)


def answers(lm, cache, **settings):
    settings = {"max_new_tokens": 48, "batch_size": 4, **settings}
    return own_answers(lm, Source(ROWS, tokens="ids"), **settings, cache=cache, progress=False)


def test_answers_are_what_the_model_says_and_made_once(tmp_path):
    lm = Counting()
    made = answers(lm, tmp_path)
    said, rows = generate().tokens, [json.loads(line) for line in made.data.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["ids"] for row in ROWS]
    assert [row["answer"] for row in rows] == [*said, [], *said[::-1]]
    assert lm.batches == 3 and answers(lm, tmp_path) == made and lm.batches == 3
    answers(lm, tmp_path, max_new_tokens=2)  # other settings are answered anew
    assert lm.batches == 6
    # As rows of training: the answers count, and one that was cut does not end.
    config = tiny_lm().config
    read = read_rows(made, tiny_lm().text, config, Layout(48, shape="padded", buckets=1), cache=tmp_path / "rows",
                     progress=False)
    assert read.report.skipped == {"no tokens": 1}
    found = documents_of(read.batch(range(len(read)), len(read), 48))
    assert found[:4] == [(prompt + text, [0.0] * len(prompt) + [1.0] * len(text))
                         for prompt, text in zip(PROMPTS, said, strict=True)]
    assert any(text[-1] != EOS for text in said)


def test_killed_at_any_moment_they_go_on_after_the_last_whole_batch(tmp_path):
    whole = answers(Counting(), tmp_path / "whole").data.read_bytes()
    for fails in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            answers(Counting(fails), tmp_path / "killed")
        [part] = (tmp_path / "killed").glob("*.part")
        assert part.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4 * (fails - 1)])
        with open(part, "ab") as file:
            file.write(b'{"prompt": [1, 2')  # part of a row, of a process that was killed as it wrote
        lm = Counting()
        assert answers(lm, tmp_path / "killed").data.read_bytes() == whole and lm.batches == 4 - fails
        for file in (tmp_path / "killed").iterdir():
            file.unlink()


def test_wrong_settings_are_named(command, tmp_path):
    with pytest.raises(SettingError, match="max_new_tokens is 0"):
        answers(tiny_lm(), tmp_path, max_new_tokens=0)
    for given, says in ((["--answers", "8", "--text", "a"], "--text was given beside --answers"),
                        (["--answers", "8"], "nothing names what is asked"),
                        (["--answer-sampling", "checkpoint"], "--answer-sampling was given without --answers"),
                        (["--answers", "8", "--prompt", "a", "--model", "new"], "--model new has none yet")):
        status, _, told = command("train", "--data", "x.jsonl", "--out", str(tmp_path / "run"), *given)
        assert status != 0 and says in " ".join(told.split())
