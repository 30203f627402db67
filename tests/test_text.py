"""Where a prompt ends and its continuation begins, by the bundled tokenizer and by ones made for the purpose."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

import sled
from sled.errors import PromptError
from sled.text.tokenizer import Tokenizer

DEMO = Path(sled.__file__).parent / "demo" / "model"


@pytest.fixture(scope="module")
def lm(demo):
    return demo


def harness_pair(text, context, continuation):
    """`_encode_pair` of lm-evaluation-harness, for decoders."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    own = text.encode(context)
    return own, text.encode(context + continuation)[len(own):]


@pytest.mark.parametrize(("prompt", "continuation"), [
    ("Question: What is 2 times 3?\nAnswer:", " 2*3=6"),
    ("Question: What is 2 times 3?\nAnswer: ", "2*3=6"),
    ("Question: What is 2 times 3?\n", "Answer:"),
    ("Ash buys 6 toys \n ", "at 10"),
    ("a", ""),
    ("", "a"),
])
def test_without_a_straddling_token_it_is_the_harness_pair(lm, prompt, continuation):
    expected = harness_pair(lm.text, prompt, continuation)
    assert lm.text.encode_continuation(prompt, continuation) == expected
    assert lm.text.encode_continuations([("a", "b"), (prompt, continuation)])[1] == expected


@pytest.mark.parametrize(("prompt", "continuation", "before", "scored"), [
    ("How m", "any", "How", " many"),  # the harness is left with nothing to score
    ("Ash buys 6 toy", "s at 10", "Ash buys 6", " toys at 10"),  # the harness scores " 10" after "Ash buys 6 toy"
    ("Ash buys 6 toy  ", "s", "Ash buys 6 toy", "  s"),
])
def test_a_straddling_token_belongs_to_the_continuation(lm, prompt, continuation, before, scored):
    ids = lm.text.encode_continuation(prompt, continuation)
    assert tuple(map(lm.text.decode, ids)) == (before, scored)
    assert ids[0] + ids[1] == lm.text.encode(prompt + continuation)
    scores = lm.score(prompt, continuation)
    assert scores.tokens == [ids[1]]
    assert scores.totals == pytest.approx(lm.score(*ids).totals, abs=1e-4)


def test_special_tokens_stay_where_the_whole_text_has_them():
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                             special_tokens=[("<s>", 0), ("</s>", 1)])
    assert Tokenizer(tokenizer, "test").encode_continuation("a", " b a") == ([0, 2], [3, 2, 1])


@pytest.mark.parametrize(("prompt", "continuation", "says"), [
    ("T", "he lamp", "no token of the prompt 'T' stands before the continuation 'he lamp'"),
    (" \n", "a", "white space"),
    ("", "a", "the prompt is empty"),
    ("a", "", "the continuation is empty"),
])
def test_a_part_without_tokens_is_named(lm, prompt, continuation, says):
    with pytest.raises(PromptError, match=says):
        lm.score(prompt, continuation)


def test_truncation_and_padding_left_in_the_file_change_nothing(lm, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Tokenizer.from_folder(tmp_path)
    for words in ("Ash", "Ash buys 6 toys at 10 euros each"):
        assert text.encode(words) == lm.text.encode(words)
    assert text.digest == lm.text.digest
