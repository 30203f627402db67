"""The authors' evaluation protocols without the harness: arithmetic, rows, answers and demonstrations."""

import math
import pickle
import subprocess
import sys

import pytest

from sled.cli.options import FusionOptions
from sled.errors import DataError, SettingError
from sled.eval.protocols import factor, gsm8k, strategyqa, truthfulqa
from sled.eval.protocols.choices import Scored, first_wins, multiple_choice
from sled.eval.protocols.primers import read_primer

INF, NAN = math.inf, math.nan
PUBLISHED = {"at": "https://example.org/demo.py", "sha256": "0"}


# Arithmetic

@pytest.mark.parametrize("scores, wins", [
    ((-1.0, -2.0, -3.0, -1.5), True),
    ((-2.0, -1.0, -3.0, -4.0), False),
    ((-2.0, -2.0, -2.0, -2.0), True),  # a tie is a win, as published
    ((-2.0, -INF, -INF, -INF), True),
    ((-INF, -INF, -INF, -INF), False),
    ((NAN, -2.0, -3.0, -4.0), False),
    ((-2.0, -3.0, NAN, -4.0), False),
])
def test_factor_takes_the_highest_score(scores, wins):
    assert first_wins(scores) == wins


@pytest.mark.parametrize("true, false, best, expected", [
    # exp: 0.5 and 0.125 of 0.5 + 0.125 + 0.25 + 0.125 = 1
    ([math.log(0.5), math.log(0.125)], [math.log(0.25), math.log(0.125)], 0, (1, 0.625, 0.5)),
    ([math.log(0.5), math.log(0.125)], [math.log(0.25), math.log(0.125)], 1, (0, 0.625, 0.5)),
    ([-1.0], [-1.0], 0, (0, 0.5, 0)),  # above means above, not level with
    ([-3.0, -2.0, -1.0], [-4.0], 0, (1, (math.exp(-3) + math.exp(-2) + math.exp(-1)) /
                                     (math.exp(-3) + math.exp(-2) + math.exp(-1) + math.exp(-4)), 1)),
    # Both vanish in double precision: -1000 becomes -500, and -1600 becomes -400 in two halvings of its own.
    ([-1000.0], [-1600.0], 0, (1, math.exp(-500) / (math.exp(-500) + math.exp(-400)), 1)),
    ([-1000.0], [-1.0], 0, (0, math.exp(-500) / (math.exp(-500) + math.exp(-1)), 0)),
    ([2000.0], [1.0], 0, (1, 0, 1)),  # overflow: no number, counted as nothing, as published
    ([1.0], [2000.0], 0, (0, 0, 0)),
    ([-INF], [-1.0], 0, (0, 0, 0)),
    ([-1.0], [-INF, -INF], 0, (1, 1, 1)),
    ([-INF], [-INF], 0, (0, 0, 0)),
    ([NAN], [-1.0], 0, (0, 0, 0)),
    ([-1.0], [-2.0, NAN], 0, (0, 0, 0)),
])
def test_mc_scores_by_hand(true, false, best, expected):
    assert multiple_choice(true, false, best) == pytest.approx(expected, rel=1e-12)


def test_a_score_with_its_number_of_tokens_is_the_harness_pair():
    scored = pickle.loads(pickle.dumps(Scored(-3.5, True, tokens=7)))
    logp, greedy = scored
    assert (logp, greedy, scored.tokens, len(scored)) == (-3.5, True, 7, 2)


# Reading answers

@pytest.mark.parametrize("text, number", [
    ("3 + 2 = 5. The answer is 5.", "5"),
    ("the ANSWER IS $1,234.50 in all", "1234.50"),
    ("The answer is -3.", "-3"),
    ("The answer is 5 x 3 = 15.", "5"),  # the first number behind the words
    ("7. The answer is none.", None),  # not a number before them
    ("The answer is 4. The answer is 9.", "4"),
    ("so 3 of 4 are 12.", "12"),  # without the words, the last number
    ("18.0", "18.0"),
    (".", None),
    ("", None),
])
def test_gsm8k_number(text, number):
    assert gsm8k.stated_number(text) == number


@pytest.mark.parametrize("text, yes, said", [
    ("It floats. So the answer is yes.", True, "yes"),
    ("So the ANSWER IS No.", False, "no"),
    ("So the answer is yes\n\nQ", False, "yes\n\nq"),  # neither yes nor no: no
    ("The answer is unclear. So the answer is yes.", False, "unclear"),  # the first counts
    ("Thus, yes.", True, None),  # nothing stated: no "no" in it
    ("I do not know.", False, None),
    ("", True, None),
])
def test_strategyqa_yes_or_no(text, yes, said):
    assert strategyqa.is_yes(text) == yes
    assert strategyqa.stated(text) == said


# Rows

FACTOR_ROW = {"full_prefix": "All. ", "turncated_prefixes": "Cut. ", "completion": "T", "contradiction_0": "A",
              "contradiction_1": "B", "contradiction_2": "C"}
QUESTION = {"question": "Why?", "best_answer": "Because", "correct_answers": ["Because", "So. "],
            "incorrect_answers": ["Never."]}
GSM_ROW = {"question": "How many?", "answer": "1+1=<<1+1=2>>2 twice\n2000*1=<<2000*1=2000>>2,000\n#### 2,000"}
STRATEGY_ROW = {"question": "Is it?", "answer": False, "facts": ["It was.", "It is not."]}


def test_factor_row():
    assert factor.truncated(FACTOR_ROW, "row 1") == dict(prefix="Cut. ", choices=["T", "A", "B", "C"])
    assert factor.full(FACTOR_ROW, "row 1")["prefix"] == "All. "


def test_truthfulqa_row_of_the_hub_and_of_the_file():
    expected = dict(question="Why?", choices=["Because.", "So.", "Never."], true=2, best=0)
    of_file = {"Question": "Why?", "Best Answer": " Because ", "Correct Answers": "Because; So.;", "Incorrect Answers":
               "Never."}
    assert truthfulqa.row(QUESTION, "row 1") == truthfulqa.row(of_file, "row 1") == expected


def test_rows_to_reason_about():
    assert strategyqa.row({"question": "Is it?", "answer": True}, "row 1") == dict(question="Is it?", answer=True)
    assert strategyqa.row_with_facts(STRATEGY_ROW, "row 1")["solution"] == "It was. It is not. So the answer is no."
    assert gsm8k.row(GSM_ROW, "row 1") == dict(
        question="How many?", number="2000", solution="1+1=2 twice 2000*1=2,000 The answer is 2000.")


@pytest.mark.parametrize("make, row, message", [
    (factor.truncated, {"prefix": "x"}, "row 7 has no column 'turncated_prefixes', but 'prefix'; .*AI21Labs/factor"),
    (factor.full, {**FACTOR_ROW, "contradiction_1": None}, "holds nothing in its column 'contradiction_1'.*text"),
    (truthfulqa.row, {"Question": "Why?"}, "no column 'Best Answer'"),
    (truthfulqa.row, {**QUESTION, "best_answer": "Else"}, "'Else.', which is none of its true answers: 'Because.'"),
    (truthfulqa.row, {**QUESTION, "incorrect_answers": [" "]}, "no answer in its column 'incorrect_answers'"),
    (truthfulqa.row, {**QUESTION, "correct_answers": [1]}, "a list of texts"),
    (strategyqa.row, {**STRATEGY_ROW, "answer": "yes"}, r"holds 'yes' \(str\) in its column 'answer'.*true or false"),
    (strategyqa.row_with_facts, {**STRATEGY_ROW, "facts": []}, "holds nothing in its column 'facts'"),
    (gsm8k.row, {**GSM_ROW, "answer": "2000"}, "without a number behind ####"),
])
def test_wrong_rows_are_named(make, row, message):
    with pytest.raises(DataError, match=message):
        make(row, "row 7")


# Demonstrations

SCRIPT = '''
import not_installed
ANSWER_TRIGGER = "So it is"
def create_demo_text(n=2):
    question, chain, answer = [], [], []
    question.append("One" "?")
    chain.append("It " + "is.")
    answer.append("1")
    question.append("Two?")
    chain.append("Count.")
    answer.append("2")
    demo_text = ""
'''


def primer(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return read_primer("some_task", tmp_path / name, PUBLISHED)


def test_demonstrations_as_text_end_with_one_blank_line(tmp_path):
    text, record = primer(tmp_path, "demo.txt", "Q: a\nA: b\n")
    assert text == primer(tmp_path, "demo.txt", "Q: a\nA: b\n\n\n")[0] == "Q: a\nA: b\n\n"
    assert record["as_published"] is False
    assert read_primer("some_task", record["file"], dict(PUBLISHED, sha256=record["sha256"]))[1]["as_published"] is True


def test_demonstrations_in_a_script_are_read_without_running_it(tmp_path):
    text, _ = primer(tmp_path, "demo.py", SCRIPT)
    assert text == "Q: One?\nA: It is. So it is 1.\n\nQ: Two?\nA: Count. So it is 2.\n\n"
    plain = "\n".join(line for line in SCRIPT.splitlines() if "chain.append" not in line)
    plain = plain.replace('demo_text = ""', 'demo_text = "Be brief." + "\\n\\n"')
    assert primer(tmp_path, "demo.py", plain)[0] == "Be brief.\n\nQ: One?\nA: 1\n\nQ: Two?\nA: 2\n\n"


@pytest.mark.parametrize("name, text, message", [
    ("demo.txt", "\n", "is empty"),
    ("demo.py", "def (", "no Python file"),
    ("demo.py", "x = 1", "no function create_demo_text"),
    ("demo.py", SCRIPT.replace('answer.append("2")', ""), "as many strings to answer as to question"),
    ("demo.py", SCRIPT.replace('"Count."', "count()"), "as many strings"),
    ("demo.py", SCRIPT.replace('chain.append("Count.")', ""), "as many strings"),
])
def test_unusable_demonstrations_are_named(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        primer(tmp_path, name, text)


def test_demonstrations_must_be_named_and_there(tmp_path):
    with pytest.raises(SettingError, match=r"download https://example.org/demo.py.*primer_file.*some_task_rows"):
        read_primer("some_task", None, PUBLISHED)
    with pytest.raises(DataError, match=r"gone.txt.*cannot be read"):
        read_primer("some_task", tmp_path / "gone.txt", PUBLISHED)


def test_arithmetic_and_reading_need_no_harness():
    code = ("import sys; from sled.eval.protocols import choices, factor, gsm8k, primers, strategyqa, truthfulqa; "
            "sys.exit('lm_eval' in sys.modules or 'datasets' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


# Commands

@pytest.mark.parametrize("fusion", ["sled", "clamp", "dola"])
def test_scoring_can_have_the_authors_lower_bound(fusion):
    assert FusionOptions(fusion=fusion, lower_bound=-2500.0).strategy().lower_bound == -2500.0
    with pytest.raises(SettingError, match="--lower-bound has no meaning"):
        FusionOptions(lower_bound=-2500.0).strategy()
