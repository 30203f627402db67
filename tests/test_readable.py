"""What a person sees of results: a repr that fits the screen, tables that fit the terminal."""

import dataclasses
import re

import numpy as np
import pytest
from lens_samples import LENS, made
from tiny_lm import talking_lm

import sled
from sled.calibration.tune import Trial, Tuned
from sled.errors import PromptError
from sled.eval.questions import Questions
from sled.exits import Immediate
from sled.lens.lens import cells
from sled.results import Chunk, Output, Scores, Stats
from sled.settings.brief import FEW, abridged, brief

MANY, STATS = list(range(1000)), Stats(5, 1000, 1.0, 1.0, 8.0)
TRIAL = Trial(sled.EarlyExit(2), Immediate(), 1.0, 1.0, 5, 2.0, 1.0)


@pytest.mark.parametrize(("result", "says"), [
    (LENS, "best=int64[6, 30, 5]"), (made(tokens=600), "float32[6, 600]"),
    (Output(["long " * 500] * 50, [MANY] * 50, ["eos"] * 50, [MANY] * 50, STATS), "... 1000 in all"),
    (Chunk(["long " * 500], [MANY], [MANY], STATS), "texts=['long long"),
    (Scores([MANY], [[0.5] * 1000], [1.0], [True], [[False] * 1000]), "greedy=[True]"),
    (Tuned((TRIAL,) * 30), "... 30 in all"),
    (Questions(("Why? " * 99,) * 500, (1,) * 500, "questions"), "source='questions'"),
])
def test_a_result_shows_itself_in_a_few_lines(result, says):
    said = repr(result)
    assert says in said and said.startswith(f"{type(result).__name__}(") and len(said) < 1200
    assert all(f"{field.name}=" in said for field in dataclasses.fields(result))


@pytest.mark.parametrize(("value", "says"), [
    ([], "[]"), ((), "()"), ((1,), "(1)"), ([1] * FEW, "[1, 1, 1, 1]"), ([1] * 5, "[1, 1, 1, 1, ... 5 in all]"),
    ({"a": [1] * 9}, "{'a': [1, 1, 1, 1, ... 9 in all]}"), (np.float32(2), "np.float32(2.0)"), (None, "None"),
    (np.zeros((0, 3), np.int8), "int8[0, 3]"), (np.zeros(()), "float64[]"), ("é" * 500, "'ééé"),
])
def test_values_are_cut(value, says):
    @brief
    @dataclasses.dataclass(frozen=True)
    class Result:
        value: object

    assert abridged(value).startswith(says) and repr(Result(value)) == f"Result(value={abridged(value)})"
    assert len(abridged(value)) <= 60


@pytest.mark.parametrize("width", [40, 60, 80, 133, 200, 10_000])
def test_a_table_is_cut_into_tables_of_the_terminals_width(width):
    plain, cut = LENS.table(count=30), LENS.table(count=30, width=width)
    longest = max(2 + cells(cell) for row in plain.split("\n") for cell in re.split("  +", row))
    assert max(map(cells, cut.split("\n"))) <= max(width, 9 + longest)
    parts = [part.split("\n") for part in cut.split("\n\n")]
    assert (len(parts) == 1) == (width == 10_000)
    for row, whole in enumerate(plain.split("\n")):  # nothing is lost, and the order stays
        assert [cell for part in parts for cell in re.split("  +", part[row])[1:]] == re.split("  +", whole)[1:]


def test_columns_stand_below_each_other_whatever_the_script():
    """Of `ODD`, "日本語" takes six columns, and a combining mark none."""
    assert [cells(text) for text in ("日本語", "e\u0301", "◌\u0301", "😀", "ab", "")] == [6, 1, 1, 2, 2, 0]
    table = LENS.table(count=30).split("\n")
    starts = [[cells(row[:match.end()]) for match in re.finditer("  +", row)] for row in table]
    assert all(row == starts[0] for row in starts)


@pytest.mark.parametrize("continuation", ["", [], np.array([], int), [""], ["", "A"]])
def test_an_empty_continuation_is_told_as_one(continuation):
    with pytest.raises(PromptError, match="continuation") as error:
        prompt = [6, 7] if isinstance(continuation, np.ndarray) or continuation == [] else "FG"
        talking_lm().score(prompt, [continuation] if len(continuation) == 0 else continuation)
    assert "BOS" not in str(error.value)
