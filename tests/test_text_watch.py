"""Regular expressions of tokenizers: which may take time without end, and what becomes of one that does."""

import json
import os
import time

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from sled.errors import TokenizerError
from sled.text import watch
from sled.text.tokenizer import Tokenizer as TextTokenizer

STEEP = [r"(a+)+b", r"(a|a)*b", r"(?:a{1,3})+b", r"a*a*a*b", r"x|(\w|\d){2,}y", r"\s*\s+\s*$"]
PUBLISHED = [
    r"(?i:'s|'t|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", r"\p{N}{1,3}", r"[()*+|]+", r"\(\+\)\+|\\+",
]


def folder_with(expression: str, folder):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(expression), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("expression", STEEP + PUBLISHED)
def test_an_expression_that_may_run_away_is_told_from_others(expression):
    assert watch.may_run_away(json.dumps({"x": {"Regex": expression}})) == (expression in STEEP)


def test_a_watched_tokenizer_gives_the_same_and_ends_in_time(tmp_path, monkeypatch):
    text = TextTokenizer.from_folder(folder_with(r"(a|b)+c", tmp_path))
    assert text._watched and text.encode("abc a") == text._get().encode("abc a").ids
    monkeypatch.setattr(watch, "SECONDS", 0.1)
    with pytest.raises(TokenizerError, match=r"(retry-limit|took more than).*token ids"):
        text.encode("ab" * 8000)
    monkeypatch.setattr(watch, "SECONDS", 0.05)
    with pytest.raises(TokenizerError, match=r"took more than 0 s for a text of 9 characters; fetch"):
        watch.in_time(lambda: time.sleep(0.5), 9)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path),
                                  lambda path: os.symlink("gone", path), lambda path: path.write_bytes(b"\xff\xfe")])
def test_a_tokenizer_that_is_no_regular_file_is_refused(make, tmp_path):
    make(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json (is|cannot be read).*fetch it again"):
        TextTokenizer.from_folder(tmp_path)
