"""Training examples: what is read from where, what becomes of it, and every way in which it can be unusable."""

import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pytest
from training_data import CONFIG, END, ROWS, TEXT, documents_of, one_epoch, tokens_of, write

from sled.demo.problems import problems, prompt
from sled.errors import DataError, DownloadError, SettingError, TokenizerError
from sled.text.tokenizer import Tokenizer
from sled.train.data.documents import tokenise
from sled.train.data.packing import Layout
from sled.train.data.sources import Source

pytest_plugins = ["training_data"]
LONG = "Ben buys toys. " * 40  # beyond the context


@pytest.mark.parametrize("kind", ["json", "jsonl", "txt", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_same_examples(load, tmp_path, kind):
    path = write(tmp_path, kind)
    expected = tokens_of(load(ROWS))
    assert tokens_of(load(path)) == tokens_of(load(str(path))) == tokens_of(load([path])) == expected


def test_folders_and_globs_are_read_in_the_order_of_names(load, tmp_path):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, line in {"b/1.txt": "two", "a.txt": "one", ".hidden/x.txt": "no", "README.md": "no"}.items():
        (folder / name).write_text(line)
    one, two = [*TEXT.encode("one"), END], [*TEXT.encode("two"), END]
    documents = tokenise(Source(folder), TEXT, CONFIG, cache=tmp_path / "cache", progress=False)
    assert documents.tokens_M.tolist() == one + two
    assert tokens_of(load(str(folder / "**" / "1.txt"))) == [two]
    assert tokens_of(load([folder / "a.txt", str(folder / "b" / "*.txt")], limit=1)) == [one]


def test_rows_may_be_an_iterator_or_a_data_set(load):
    source = Source(iter(ROWS), limit=2)
    assert [e.body for e in source.open()] == [e.body for e in source.open()] == [r["text"] for r in ROWS[:2]]
    whole = datasets.Dataset.from_list(ROWS)
    for rows in (whole, whole.to_iterable_dataset()):
        assert tokens_of(load(rows, limit=2)) == tokens_of(load(ROWS[:2]))


def test_a_hub_data_set_is_asked_for_by_all_its_names(load, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: (
        asked.append((args, more)) or datasets.Dataset.from_list(ROWS)))
    assert tokens_of(load("owner/name", subset="main", split="test", revision="v1")) == tokens_of(load(ROWS))
    assert asked == [(("owner/name", "main"), {"split": "test", "revision": "v1"})]


# What an example becomes


def test_text_ends_with_the_end_of_text_and_all_but_its_first_token_count(load):
    [batch] = one_epoch(load([{"text": "Ash buys 6 toys."}]), 1)
    ids = [*TEXT.encode("Ash buys 6 toys."), END]
    assert documents_of(batch) == [(ids, [0.0] + [1.0] * (len(ids) - 1))]
    assert [array.dtype for array in batch] == [np.int32, np.float32, np.int32]
    beyond = batch.segments_BT == 0
    assert (batch.tokens_BT[beyond] == 7).all() and not batch.weights_BT[beyond].any()


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["packed", "padded"])
def test_prompt_and_completion_are_those_of_the_demo_model(load, weight, shape):
    rows = load("demo", Layout(256, shape=shape, prompt_weight=weight), limit=30)
    found = [d for batch in one_epoch(rows) for d in documents_of(batch)]
    expected = []
    for p in problems("train", 30):  # both parts apart, as the bundled model was trained
        asked, told = TEXT.encode(prompt(p.question)), [*TEXT.encode(f" {p.solution}"), END]
        weights = [0.0, *np.full(len(asked) - 1, weight, np.float32).tolist()] + [1.0] * len(told)
        expected.append((asked + told, weights))
    assert sorted(found) == sorted(expected)


def test_templates_fill_in_columns_and_a_token_that_straddles_both_is_learned(load):
    [batch] = one_epoch(load([{"p": "How m", "c": "any"}], prompt="p", completion="c"), 1)
    before, after = TEXT.encode_continuation("How m", "any")
    assert documents_of(batch)[0] == ([*before, *after, END], [0.0] * len(before) + [1.0] * (len(after) + 1))
    row = {"question": "6 x {10}?", "hint": None, "answer": 60}
    rows = load([row], prompt="{{Q}} {question}{hint}\n", completion="A: {answer}")
    before, after = TEXT.encode_continuation("{Q} 6 x {10}?\n", "A: 60")
    assert tokens_of(rows) == [[*before, *after, END]]
    rows = load([{"prompt": None, "completion": "six"}], prompt="prompt", completion="completion")
    assert tokens_of(rows) == [[*TEXT.encode("six"), END]]


@pytest.mark.parametrize("ids", [[3, 4, 5], (3, 4, 5), np.array([3, 4, 5]), [3, 4, 5, END]])
def test_token_ids_need_no_tokenizer_and_are_ended_once(load, ids):
    rows = load([{"ids": ids}], tokens="ids", tokenizer=Tokenizer(None, "nowhere"))
    assert tokens_of(rows) == [[3, 4, 5, END]]


# What is skipped, counted and reported


def test_the_report_counts_what_became_of_every_example(load):
    data = [{"text": t} for t in ["Ash", "", " \n\t", None, LONG, "Cleo buys toys."]]
    report = load(data).report
    count = sum(map(len, tokens_of(load(data))))
    assert (report.examples, report.rows, report.tokens, report.fill) == (2, 1, count, count / 64)
    assert report.skipped == {"blank text": 3, "too long": 1} and report.truncated == 0
    assert str(report) == (f"2 examples of {count} tokens in 1 rows, {count / 64:.1%} full; "
                           "truncated: 0; skipped: 3 blank text, 1 too long")
    rows = load([{"text": LONG}, {"text": "Ash"}], Layout(64, too_long="truncate"))
    assert rows.report.truncated == 1 and rows.report.skipped == {}
    assert TEXT.encode(LONG)[:64] in tokens_of(rows)


def test_an_example_without_a_target_is_skipped(load):
    data = [{"p": LONG, "c": "yes"}, {"p": "a", "c": " "}, {"p": "a", "c": "b"}]
    report = load(data, Layout(64, too_long="truncate"), prompt="p", completion="c").report
    assert report.examples == 1
    assert report.skipped == {"blank completion": 1, "without a target in the context": 1}
    rows = load([{"ids": [END]}, {"ids": []}, {"ids": [3]}], tokens="ids")
    assert rows.report.skipped == {"no tokens": 1, "without a target in the context": 1}


# Errors, one by one


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.jsonl", '{"text": "x"}\n\n{"text": \n{"text": "y"}\n', r"a\.jsonl, line 3, cannot be read as json"),
    ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl, line 2,"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2,"),
    ("a.json", '[{"text": "x"},\n {"text": }]', r"a\.json, line 2, cannot be read as json"),
    ("a.json", b'[{"text": "x"},\n\n {"text": "\xff"}]', r"a\.json, line 3,"),
    ("a.txt", b"\xff\xfe", r"a\.txt cannot be read as text"),
    ("a.parquet", "nonsense", r"a\.parquet cannot be read as parquet"),
    ("a.arrow", "nonsense", r"a\.arrow cannot be read as arrow"),
    ("a.jsonl", "", r"a\.jsonl is empty; remove it"),
    ("a.jsonl", '{"txt": "x", "n": 1}\n', r"a\.jsonl, example 1, has no column 'text'; .* that it has: 'txt', 'n'"),
    ("a.jsonl", '{"text": [1, 2]}\n', r"a\.jsonl, example 1, holds list in its column 'text'"),
    ("a.csv", 'text,n\nx,1\n"y\n",2,3\n', r"a\.csv, line 3, cannot be read as csv \(it has 3 cells, .* 2 columns"),
    ("a.csv", "text,text\nx,y\n", r"a\.csv, line 1, .* must name each column once"),
    ("a.csv", 'text\n"x', r"a\.csv, line 2, cannot be read as csv \(unexpected end of data"),
    ("a.csv", b"text\n\xff\n", r"a\.csv cannot be read as csv"),
    ("a.json", "[1, 2]", r"a\.json cannot be read as json \(entry 1 is '1', no object such as"),
    ("a.jsonl", '{"text": "\\ud83d"}\n', r"a\.jsonl, line 1, .* is half a character"),
    ("a.jsonl", '{"text": "x"}\n{"text": ' + "[" * 99_999, r"a\.jsonl, line 2, .* nested too deep"),
    ("a.tsv", "text\nx\n", r"a\.tsv ends in '\.tsv', but only \.json, .* convert it"),
    ("a", "x", r"a ends in '', but only"),
])
def test_a_file_that_cannot_be_used_is_named(load, tmp_path, name, content, says, caplog):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        load(path)
    assert not caplog.records


def test_a_folder_must_hold_one_kind_of_file(load, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        load(tmp_path / "data")
    (tmp_path / "data" / "a.tsv").touch()
    with pytest.raises(DataError, match=r"holds \.tsv files, .*; convert them"):
        load(tmp_path / "data")
    write(tmp_path / "data", "json")
    write(tmp_path / "data", "txt")
    with pytest.raises(DataError, match=r"holds \.json and \.txt files, .* give a glob"):
        load(tmp_path / "data")


@pytest.mark.parametrize(("data", "how", "says"), [
    *((path, {}, "there is no file at .*; give a file, a folder") for path in (
        "no.jsonl", "no/such.jsonl", "./no", "no", "/no/such", "no/*", Path("no/such"), ["a/b"])),
    ([{"txt": "x"}], {}, "the source, example 1, has no column 'text'; by Source.text name one that it has: 'txt'"),
    ([{"q": "x"}], dict(prompt="{q} {hint}", completion="q"), "no column 'hint'; by Source.prompt name one"),
    ([["x"]], {}, r"example 1, is \"\['x'\]\", but must be a mapping"),
    ([{"ids": "x"}], dict(tokens="ids"), "holds 'x' in its column 'ids', but Source.tokens must be a list"),
    ([{"ids": [1.5]}], dict(tokens="ids"), "but Source.tokens must be a list of token ids"),
    ([{"ids": [3, 1000]}], dict(tokens="ids"), "example 1, has token id 1000, but the model's vocabulary is 0 to 999"),
    ([{"ids": [-1, 3]}], dict(tokens="ids"), "has token id -1"),
    (5, {}, "the source is 5, which holds no rows; give"),
    ([], {}, "no example is left"),
    ([{"text": " "}, {"text": ""}], {}, r"no example is left \(skipped: 2 blank text\)"),
    ([{"text": LONG}], {},
     r"no example is left \(skipped: 1 too long\); truncate those .* larger context"),
    ([{"text": "Ash"}, {"text": LONG}], dict(layout=Layout(64, too_long="error")),
     "1 examples are longer than the context of 64 .* number 2 .* give a larger"),
    (ROWS, dict(config=dataclasses.replace(CONFIG, eos_ids=())), "names no end-of-text token"),
])
def test_data_that_cannot_be_used_are_named(load, data, how, says):
    with pytest.raises(DataError, match=says):
        load(data, **how)


@pytest.mark.parametrize(("error", "kind", "says"), [
    (datasets.exceptions.DatasetNotFoundError("gone"), DownloadError, "nor on the hub, or it is private or gated"),
    (OSError("disk full"), DownloadError, r"could not be fetched \(disk full\)"),
    (ValueError('Unknown split "x".\nMore'), DataError, r"with split 'x' and subset None: Unknown split \"x\"\.$"),
    (RuntimeError("Dataset scripts are no longer supported"), DataError, "scripts are no longer supported"),
])
def test_a_hub_data_set_that_cannot_be_had_is_named(load, monkeypatch, error, kind, says):
    def refuse(*args, **more):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(kind, match=says):
        load("owner/name", split="x")


def test_a_hub_name_without_a_network_is_named(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"'sled-jax/no-such-data' .* or HF_HUB_OFFLINE is set .*; go online"):
        load("sled-jax/no-such-data")


@pytest.mark.parametrize(("make", "wrong", "says"), [
    (Source, dict(limit=0), "Source.limit is 0"),
    (Source, dict(prompt="a"), "columns are named by Source.prompt alone; give Source.text, or"),
    (Source, dict(text="a", tokens="b"), "columns are named by Source.text and Source.tokens"),
    (Source, dict(text=""), "must be the name of a column"),
    (Source, dict(prompt="{a", completion="b"), "is no template"),
    (Source, dict(prompt="{a!r}", completion="b"), "must be just the name of a column"),
    (Source, dict(prompt="{}", completion="b"), "must be just the name of a column"),
    (Layout, dict(context=1), "Layout.context is 1"),
    (Layout, dict(shape="wide"), "Layout.shape is 'wide', but must be one of 'packed', 'padded'"),
    (Layout, dict(too_long="cut"), "Layout.too_long is 'cut'"),
    (Layout, dict(prompt_weight=-1), "Layout.prompt_weight is -1"),
    (Layout, dict(buckets=0), "Layout.buckets is 0"),
])
def test_wrong_settings_are_refused(make, wrong, says):
    with pytest.raises(SettingError, match=says):
        make(**{Source: dict(data=[]), Layout: dict(context=64)}[make] | wrong)


def test_what_the_model_cannot_take_is_refused(load):
    with pytest.raises(SettingError, match=r"Layout\.context is 257, but the model's context holds 256"):
        load(ROWS, Layout(257))
    with pytest.raises(TokenizerError):
        load(ROWS, tokenizer=Tokenizer(None, "nowhere"))
    with pytest.raises(SettingError, match="split is 'test'"):
        load("demo", split="test")
