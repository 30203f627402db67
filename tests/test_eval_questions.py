"""Questions with one right number each: the demo's, and those of files, with solved ones before them."""

import dataclasses
import json
from fractions import Fraction

import pytest

from sled.errors import DataError, SettingError, SledError
from sled.eval.questions import Questions, demo_questions, next_question, read_questions


def test_questions_of_the_demo_and_from_a_file(tmp_path):
    assert demo_questions(3).prompts[0].startswith("Question: ") and len(demo_questions(3).answers) == 3
    with pytest.raises(SettingError, match="2 prompts and 1 answers"):
        Questions(("a", "b"), (1,), "x")
    path = tmp_path / "asked.jsonl"
    rows = [{"q": "1+1?", "a": "2", "s": "so\n#### 1,002"}, {"q": "a half?", "a": "0.5", "s": "#### $7"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = read_questions(str(path), prompt="Question: {q}\nAnswer:", answer="a")
    assert asked.prompts == ("Question: 1+1?\nAnswer:", "Question: a half?\nAnswer:")
    assert asked.answers == (2, Fraction(1, 2)) and asked.right(["#### 2.0", "#### 0.5 or so"]) == [True, True]
    last = dataclasses.replace(asked, extract="flexible-extract")  # not of a question that the text goes on with
    assert last.right([" 2\n\nQuestion: 1+2?\nAnswer: 3", " 0.5"]) == [True, True]
    both = dataclasses.replace(last, stop=["Q:", "!"])
    assert both.found(["2 ! 3 Q: 4", "5 Q: 6 ! 7", "Q: 8"]) == [2, 5, None]
    assert dataclasses.replace(last, stop="5").found(["1 2 5 3"]) == [2]
    with pytest.raises(SettingError, match="at least one character"):
        dataclasses.replace(last, stop=("",))
    first = read_questions(path, prompt="q", answer="s", limit=1)
    assert (first.prompts, first.answers, first.source) == (("1+1?",), (1002,), "questions of asked.jsonl")
    with pytest.raises(DataError, match=r"asked\.jsonl, example 1, has the answer '1\+1\?', in which no number"):
        read_questions(path, prompt="s", answer="q")
    path.write_text('{"q": "1?", "a": 1}\n{"q": "2?", "a": 0.00001}\n')
    assert read_questions(path, prompt="q", answer="a").answers == (1, Fraction(1, 100_000))
    path.write_text('{"q": "1?", "a": 1}\n{"q": "2?", "a": "s\\n#### 1 or 2"}\n')
    with pytest.raises(DataError, match=r"example 2, has the answer '1 or 2', .*give one such as 54, .* 3/4"):
        read_questions(path, prompt="q", answer="a")


SOLVED = "".join(json.dumps(row) + "\n" for row in [
    {"q": "1+1?", "a": "so\n#### 2"}, {"q": "2+2?", "a": "4"}, {"q": "3+3?", "a": "#### 6 apples"},
    {"q": "9?", "a": "9"}])


@pytest.mark.parametrize(("how", "prompts", "answers"), [
    (dict(num_fewshot=1), ["Q: 1+1?\nA: so\n#### 2\n\nQ: 2+2?\nA:", "Q: 1+1?\nA: so\n#### 2\n\nQ: 3+3?\nA:", ...],
     (4, 6, 9)),
    (dict(num_fewshot=2, limit=1), ["Q: 1+1?\nA: so\n#### 2\n\nQ: 2+2?\nA: #### 4\n\nQ: 3+3?\nA:"], (6,)),
    (dict(num_fewshot=1, fewshot=True, limit=2), ["Q: 1+1?\nA: so\n#### 2\n\nQ: 1+1?\nA:", ...], (2, 4)),
    (dict(num_fewshot=1, extract="answer-is", limit=1), ["Q: 1+1?\nA: so\nThe answer is 2.\n\nQ: 2+2?\nA:"], (4,)),
    (dict(num_fewshot=2, extract="boxed", limit=1),
     ["Q: 1+1?\nA: so\n\\boxed{2}\n\nQ: 2+2?\nA: \\boxed{4}\n\nQ: 3+3?\nA:"], (6,)),
    (dict(num_fewshot=1, extract="flexible-extract", prompt="{q} ", limit=1), ["1+1? so\n#### 2\n\n2+2? "], (4,)),
])
def test_solved_questions_are_shown_as_answers_are_found(tmp_path, how, prompts, answers):
    path = tmp_path / "solved.jsonl"
    path.write_text(SOLVED)
    how = {"prompt": "Q: {q}\nA:", "answer": "a", **how}
    asked = read_questions(path, **(how | {"fewshot": path} if "fewshot" in how else how))
    assert asked.answers == answers and all(p in (..., q) for p, q in zip(prompts, asked.prompts, strict=False))
    assert f"behind {how['num_fewshot']} solved ones" in asked.source


@pytest.mark.parametrize(("how", "says"), [
    (dict(num_fewshot=-1), "num_fewshot is -1"), (dict(num_fewshot=5), "holds 4 rows, but num_fewshot is 5"),
    (dict(num_fewshot=4), "holds no questions beside the 4 that are shown"), (dict(fewshot="x"), "num_fewshot is 0"),
    (dict(limit=0), "limit is 0"), (dict(extract="loose"), "extract is 'loose'"),
    (dict(num_fewshot=1, fewshot="none.jsonl"), "none.jsonl"),
])
def test_solved_questions_that_cannot_be_shown(tmp_path, how, says):
    path = tmp_path / "solved.jsonl"
    path.write_text(SOLVED)
    with pytest.raises(SledError, match=says):
        read_questions(path, prompt="{q}", answer="a", **how)


@pytest.mark.parametrize(("template", "stop"), [
    ("Question: {q}\nAnswer:", ("Question:",)), ("q", ()), ("{q}", ()), ("{q}\nAnswer:", ()), ("\n\n{q}", ()),
    ("Think.\n\nQ: {q}\nA:", ("Q:",)), ("### Task\n{q}", ("### Task",)), ("Think.\n- {q}", ("Think.",)),
    ("{{Q}}: {q}", ("{Q}:",)), ("\u95ee\uff1a{q}", ("\u95ee\uff1a",)),
])
def test_what_a_next_question_would_begin_with(template, stop):
    assert next_question(template) == stop
