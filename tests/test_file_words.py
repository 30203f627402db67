"""Data keep their words: texts and numbers are the characters of the file, wherever data are read."""

import json
import logging
from datetime import date
from decimal import Decimal

import datasets
import numpy as np
import pytest

from sled.errors import DataError
from sled.eval.questions import read_questions
from sled.train.data.file_rows import Word, rows_of
from sled.train.data.sources import Source

# What stands in a JSON file, and the text that it is.
VALUES = {
    "4": "4", "3.5": "3.5", "4.0": "4.0", "1.10": "1.10", "1e3": "1e3", "1E-7": "1E-7", "0.00001": "0.00001",
    "-0": "-0", "-0.0": "-0.0", "9007199254740993": "9007199254740993", "12345678901234567890123": None,
    "0.1000000000000000055511151231257827": None, "7" * 5000: None, "1e999": "1e999", "true": "true", "false": "false",
    "NaN": "NaN", "null": "", '"null"': "null", '"NaN"': "NaN", '"true"': "true", '"4"': "4", '"00123"': "00123",
    '"2024-01-05"': "2024-01-05", '"2024-01-05T10:00:00Z"': "2024-01-05T10:00:00Z", '"12:30"': "12:30", '"1/2"': "1/2",
    '"\u0664\u0662"': "\u0664\u0662", '"  x \\t"': "  x \t", '"a\\r\\nb"': "a\r\nb", '"\\u00e9\\ud83d\\ude00"': "é😀",
    '"\u2028\u0085"': "\u2028\u0085", '"\ufeff"': "\ufeff", '"1,234"': "1,234", '"$5"': "$5", '"None"': "None"}


def texts(path):
    return [example.body for example in Source(path).open()]


@pytest.mark.parametrize("form", ["lines", "crlf", "list", "indented", "bom"])
def test_json_is_read_word_for_word(form, tmp_path):
    rows = [f'{{"text": {value}, "n": {n}}}' for n, value in enumerate(VALUES)]
    written = {"list": "[" + ",\n".join(rows) + "]", "crlf": "\r\n".join(rows) + "\r\n",
               "bom": "\ufeff" + "\n\n".join(rows), "indented": "[\n  " + ",\n  ".join(rows) + "\n]\n"}
    path = tmp_path / "a.jsonl"
    path.write_bytes(written.get(form, "\n".join(rows)).encode())
    assert texts(path) == [value if says is None else says for value, says in VALUES.items()]
    [*_, last] = rows_of(path)
    assert last == {"text": "None", "n": len(VALUES) - 1} and type(last["n"]) is int


def test_files_that_are_read_at_once_leave_the_level_of_the_log(tmp_path):
    datasets.Dataset.from_list([{"text": str(n)} for n in range(250)]).to_parquet(tmp_path / "a.parquet")
    level = logging.getLogger("datasets").level
    one, other = rows_of(tmp_path / "a.parquet"), rows_of(tmp_path / "a.parquet")
    assert next(one) == next(other) == {"text": "0"} and logging.getLogger("datasets").level == level
    assert [row["text"] for row in one] == [row["text"] for row in other] == [str(n) for n in range(1, 250)]
    assert logging.getLogger("datasets").level == level


def test_one_object_over_several_lines_is_a_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "x", "ids": [1, [2, {"a": None}]]}, indent=1))
    assert list(rows_of(path)) == [{"text": "x", "ids": [1, [2, {"a": None}]]}]


CELLS = ["00123", "4", "3.5", "1e3", "-0", "2024-01-05", "NA", "null", "nan", "None", "True", "false", " x ", "1,234",
         "a\nb", 'say "x"', "٤", "9007199254740993", "inf", "1/2"]


@pytest.mark.parametrize("end, mark", [("\n", ""), ("\r\n", "\ufeff")])
def test_csv_is_read_word_for_word(end, mark, tmp_path):
    quoted = ['"' + cell.replace('"', '""') + '"' if set(cell) & set(',"\n') else cell for cell in CELLS]
    path = tmp_path / "a.csv"
    lines = ["text,n", *(f"{cell},{n}" for n, cell in enumerate(quoted)), ",0", ""]
    path.write_bytes((mark + end.join(lines)).encode())
    assert texts(path) == [*CELLS, ""] and list(rows_of(path))[-1]["text"] is None
    long = "x" * 200_000
    path.write_text(f"text\n{long}\n")
    assert texts(path) == [long]


@pytest.mark.parametrize("lines", [",text\n0,a\n", "text,\na,0\n", ",,text\n0,0,a\n", ",text,\n,a,\n"])
def test_columns_without_a_name_are_passed_over(tmp_path, lines):
    path = tmp_path / "a.csv"
    path.write_text(lines)
    assert list(rows_of(path)) == [{"text": "a"}]


def test_lines_of_text_are_not_stripped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff 4.0 \r\n\t00123\n\u2028x\x0cy".encode())
    assert texts(path) == [" 4.0 ", "\t00123", "\u2028x\x0cy"]


def test_parquet_has_the_words_that_its_types_have(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"text": ["00123", None], "whole": [9007199254740993, 4], "short": np.float32([0.1, 3e38]),
               "exact": [Decimal("1.10"), None], "day": [date(2024, 1, 5), None], "yes": [True, False]}
    datasets.Dataset.from_dict(columns).to_parquet(path)
    read = lambda column: [e.body for e in Source(path, text=column).open()]  # noqa: E731
    assert read("text") == ["00123", ""] and read("whole") == ["9007199254740993", "4"]
    assert read("short") == ["0.1", "3e+38"] and read("exact") == ["1.10", ""] and read("yes") == ["true", "false"]
    with pytest.raises(DataError, match="holds date in its column 'day'"):
        read("day")


def test_numbers_as_they_are_written_are_right_answers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": 4, "a": 9007199254740993}\n{"q": 1.50, "a": 1e3}\n{"q": "2024-01-05", "a": 0.1}\n')
    found = read_questions(path, prompt="{q}?", answer="a")
    assert found.prompts == ("4?", "1.50?", "2024-01-05?")
    assert [str(answer) for answer in found.answers] == ["9007199254740993", "1000", "1/10"]


@pytest.mark.parametrize("values, expected", [
    ([1, None, 2], None), ([1, 2.5], None), ([1.5, 2.5], None), ([2**53 + 1], None), ([2**53 + 1, 0.5], None),
    ([True, False], None), ([True, 1, "1"], ["true", "1", "1"]), (["1", "2"], None), ([None], None), ([], None),
    ([2**63, 1], [str(2**63), "1"]), ([Word("1.10"), 2.5], ["1.10", "2.5"]), ([Word("00"), Word("12")], ["00", "12"]),
    ([Word("0"), None, Word("12")], [0, None, 12]), ([Word("True"), Word("False")], [True, False]),
    ([Word("4"), Word("3.5")], ["4", "3.5"]), ([Word("nan"), Word("inf")], ["nan", "inf"]), ([Word("-0")], ["-0"]),
    ([Word("true")], ["true"]), ([[1, "a", Word("1e3")], None, [2.5]], [[1, "a", "1e3"], None, [2.5]]),
    ([[1, 2.5], [3]], None), ([["1"], ["2.0"]], None), ([[], "x", {"a": [{"b": None}]}], None)])
def test_the_values_of_a_column_stay_what_they_are(values, expected):
    tables = pytest.importorskip("sled.eval.typed_rows", exc_type=ImportError)
    found, of = tables.typed(values)
    table = datasets.Dataset.from_dict({"a": found}, features=datasets.Features(a=of))
    kept = table["a"][:]
    expected = values if expected is None else expected
    assert table.map(lambda row: row)["a"][:] == kept
    assert kept == expected and list(map(type, kept)) == list(map(type, expected))


# Data of one's own for tasks


@pytest.fixture
def target(tmp_path):
    """`target(name, content)`: what the harness takes the answers to be, and the first question."""
    harness = pytest.importorskip("sled.eval.harness.tasks", exc_type=ImportError)
    task = dict(task="words", output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{answer}}",
                dataset_path="nobody/nothing", test_split="test")
    (tmp_path / "words.yaml").write_text(json.dumps(task))

    def target(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        loaded = harness.load_tasks(["words"], include_path=[tmp_path], data=path)["tasks"]["words"]
        return [(loaded.doc_to_text(doc), loaded.doc_to_target(doc)) for doc in loaded.eval_docs]

    return target


@pytest.mark.parametrize("name, content, expected", [
    ("a.jsonl", '{"question": 4, "answer": "2019-03-04"}\n{"question": 3.5, "answer": "2019-03-05"}\n',
     [("4", "2019-03-04"), ("3.5", "2019-03-05")]),
    ("a.json", '[{"question": 1.10, "answer": 9007199254740993}, {"question": 1, "answer": 3.5}]',
     [("1.10", "9007199254740993"), ("1", "3.5")]),
    ("a.csv", "question,answer\n00123,2024-01-05T10:00:00Z\nNA,12:30\n",
     [("00123", "2024-01-05T10:00:00Z"), ("NA", "12:30")]),
    ("a.csv", "question,answer\n1e3,-0\nnull,7\n", [("1e3", "-0"), ("null", "7")]),
    ("a.jsonl", '{"question": [1, "a"], "answer": "1/2"}\n{"question": ["b"], "answer": " x "}\n',
     [("[1, 'a']", "1/2"), ("['b']", " x ")]),
    ("a.jsonl", '{"question": ["a"], "answer": 7}\n{"question": "a", "answer": "b"}\n', [("['a']", "7"), ("a", "b")]),
    ("a.jsonl", '{"question": 123456789012345678901234, "answer": "x"}\n', [("123456789012345678901234", "x")]),
])
def test_tasks_read_data_word_for_word(target, name, content, expected):
    assert target(name, content) == expected


def test_dates_of_parquet_are_refused(target, tmp_path):
    datasets.Dataset.from_dict({"question": ["a"], "answer": [date(2024, 1, 5)]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"values of type date32 in its column 'answer'.*store them as text"):
        target("a.parquet", (tmp_path / "a.parquet").read_bytes())


@pytest.mark.parametrize("kind, content, expected", [
    ("csv", "completion,label\nNA,1\n1990,0\n", [("NA", 1), ("1990", 0)]),
    ("json", '[{"completion": 1990.0, "label": true}, {"completion": 4, "label": false}]',
     [(1990.0, True), (4, False)]),
])
def test_a_protocols_own_file_is_read_word_for_word(kind, content, expected, tmp_path):
    tables = pytest.importorskip("sled.eval.typed_rows", exc_type=ImportError)
    (tmp_path / "cached").write_text(content)  # under a name without its ending, as downloads are kept
    rows = tables.fetched(kind, data_files={"test": str(tmp_path / "cached")})["test"]
    assert [tuple(row.values()) for row in rows] == expected
