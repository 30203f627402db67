"""Training data: what is read, tokenised, kept, packed and drawn; and every way in which it can be unusable."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tokenizers import normalizers

from sled.demo.problems import problems, prompt
from sled.errors import DataError, DownloadError, SettingError, TokenizerError
from sled.models.config import DecoderConfig
from sled.text import Text
from sled.train import packing
from sled.train.batches import Batches
from sled.train.documents import default_cache, tokenise
from sled.train.packing import Layout, arrange, best_fit, bucket_lengths
from sled.train.rows import read
from sled.train.sources import Source

DEMO = Path(__file__).parents[1] / "sled" / "demo" / "model"
END = 0
CONFIG = DecoderConfig("llama", vocab_size=1000, width=8, mlp_width=8, num_layers=2, num_heads=2, num_kv_heads=2,
                       head_dim=4, max_positions=256, eos_ids=(END,), pad_id=7)
LAYOUT = Layout(64)


@pytest.fixture(scope="module")
def text():
    return Text.from_folder(DEMO)


@pytest.fixture
def load(text, tmp_path):
    """`load(data, layout, **columns)`: rows of a source, with a cache that only this test uses."""

    def load(data, layout=LAYOUT, *, config=CONFIG, tokenizer=text, **columns):
        return read(Source(data, **columns), tokenizer, config, layout, cache=tmp_path / "cache", progress=False)

    return load


@pytest.fixture
def encoded(monkeypatch):
    """A list that grows by every text that is tokenised."""
    calls, encode_all = [], Text.encode_all
    monkeypatch.setattr(Text, "encode_all", lambda self, texts: calls.extend(texts) or encode_all(self, texts))
    return calls


def documents_of(batch):
    """Tokens, weights and positions of each document of a batch, row after row."""
    found = []
    for row in zip(*batch, strict=True):
        tokens, weights, segments, positions = row
        found += [(tokens[segments == s].tolist(), weights[segments == s].tolist(), positions[segments == s].tolist())
                  for s in range(1, segments.max() + 1)]
    return found


def one_epoch(rows, size=4, **options):
    return list(Batches(rows, size, epochs=1, process_index=0, process_count=1, **options))


def tokens_of(rows):
    return sorted(tokens for batch in one_epoch(rows) for tokens, _, _ in documents_of(batch))


# What an example becomes


def test_text_ends_with_the_end_of_text_and_all_but_its_first_token_count(load, text):
    [batch] = one_epoch(load([{"text": "Ash buys 6 toys."}]), 1)
    ids = [*text.encode("Ash buys 6 toys."), END]
    assert documents_of(batch) == [(ids, [0.0] + [1.0] * (len(ids) - 1), list(range(len(ids))))]
    assert [array.dtype for array in batch] == [np.int32, np.float32, np.int32, np.int32]
    beyond = batch.segments_BT == 0
    assert (batch.tokens_BT[beyond] == 7).all() and not batch.weights_BT[beyond].any()


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("shape", ["packed", "padded"])
def test_prompt_and_completion_are_those_of_the_demo_model(load, text, weight, shape):
    rows = load("demo", Layout(128, shape=shape, prompt_weight=weight), limit=30)
    found = [d for batch in one_epoch(rows) for d in documents_of(batch)]
    expected = []
    for p in problems("train", 30):  # both parts apart, as the bundled model was trained
        asked, told = text.encode(prompt(p.question)), [*text.encode(f" {p.solution}"), END]
        weights = [0.0, *np.full(len(asked) - 1, weight, np.float32).tolist()] + [1.0] * len(told)
        expected.append((asked + told, weights, list(range(len(weights)))))
    assert sorted(found) == sorted(expected)


def test_a_token_that_straddles_prompt_and_completion_is_learned(load, text):
    [batch] = one_epoch(load([{"p": "How m", "c": "any"}], prompt="p", completion="c"), 1)
    before, after = text.encode_continuation("How m", "any")
    assert documents_of(batch)[0][:2] == ([*before, *after, END], [0.0] * len(before) + [1.0] * (len(after) + 1))


def test_templates_fill_in_columns_and_missing_values_are_empty(load, text):
    row = {"question": "6 x {10}?", "hint": None, "answer": 60}
    rows = load([row], prompt="{{Q}} {question}{hint}\n", completion="A: {answer}")
    before, after = text.encode_continuation("{Q} 6 x {10}?\n", "A: 60")
    assert tokens_of(rows) == [[*before, *after, END]]


def test_a_missing_prompt_leaves_the_completion(load, text):
    rows = load([{"prompt": None, "completion": "six"}], prompt="prompt", completion="completion")
    assert tokens_of(rows) == [[*text.encode("six"), END]]


@pytest.mark.parametrize("ids", [[3, 4, 5], (3, 4, 5), np.array([3, 4, 5]), [3, 4, 5, END]])
def test_token_ids_need_no_tokenizer_and_are_ended_once(load, ids):
    rows = load([{"ids": ids}], tokens="ids", tokenizer=Text(None, "nowhere"))
    assert tokens_of(rows) == [[3, 4, 5, END]]


# Where examples come from

ROWS = [{"text": f"{name} buys {n} toys.", "n": n} for n, name in enumerate(["Ash", "Ben", "Cleo", "Dan"])]


def write(folder, kind):
    path = folder / f"a[1] {kind}.{kind}"  # brackets: a name is no pattern
    match kind:
        case "json":
            path.write_text(json.dumps(ROWS))
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
        case "txt":
            path.write_text("\n".join(row["text"] for row in ROWS))
        case "parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(path)
        case "arrow":
            with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
                for row in ROWS:
                    writer.write(row)
                writer.finalize()
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "txt", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_same_examples(load, tmp_path, kind):
    path = write(tmp_path, kind)
    expected = tokens_of(load(ROWS))
    assert tokens_of(load(path)) == tokens_of(load(str(path))) == tokens_of(load([path])) == expected


def test_folders_and_globs_are_read_in_the_order_of_names(load, tmp_path, text):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, line in {"b/1.txt": "two", "a.txt": "one", ".hidden/x.txt": "no", "README.md": "no"}.items():
        (folder / name).write_text(line)
    one, two = [*text.encode("one"), END], [*text.encode("two"), END]
    documents = tokenise(Source(folder), text, CONFIG, cache=tmp_path / "cache", progress=False)
    assert documents.tokens_M.tolist() == one + two
    assert tokens_of(load(str(folder / "**" / "1.txt"))) == [two]
    assert tokens_of(load([folder / "a.txt", str(folder / "b" / "*.txt")], limit=1)) == [one]


def test_rows_may_be_an_iterator_or_a_data_set(load):
    expected = tokens_of(load(ROWS[:2]))
    source = Source(iter(ROWS), limit=2)
    assert [e.body for e in source.open()] == [e.body for e in source.open()] == [r["text"] for r in ROWS[:2]]
    whole = datasets.Dataset.from_list(ROWS)
    assert tokens_of(load(whole, limit=2)) == tokens_of(load(whole.to_iterable_dataset(), limit=2)) == expected


def test_a_hub_data_set_is_asked_for_by_all_its_names(load, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: (
        asked.append((args, more)) or datasets.Dataset.from_list(ROWS)))
    assert tokens_of(load("owner/name", subset="main", split="test", revision="v1")) == tokens_of(load(ROWS))
    assert asked == [(("owner/name", "main"), {"split": "test", "revision": "v1"})]


# What is skipped, counted and reported


def test_the_report_counts_what_became_of_every_example(load):
    data = [{"text": t} for t in ["Ash", "", " \n\t", None, "Ben buys toys. " * 40, "Cleo buys toys."]]
    report = load(data).report
    lengths = [len(tokens) for tokens in tokens_of(load(data))]
    assert (report.examples, report.rows, report.tokens) == (2, 1, sum(lengths))
    assert report.skipped == {"blank text": 3, "too long": 1} and report.truncated == 0
    assert report.fill == sum(lengths) / 64
    assert str(report) == (f"2 examples of {sum(lengths)} tokens in 1 rows, {sum(lengths) / 64:.1%} full; "
                           "truncated: 0; skipped: 3 blank text, 1 too long")


def test_too_long_examples_are_truncated_if_asked(load, text):
    long = "Ben buys toys. " * 40
    rows = load([{"text": long}, {"text": "Ash"}], Layout(64, too_long="truncate"))
    assert rows.report.truncated == 1 and rows.report.skipped == {}
    assert text.encode(long)[:64] in tokens_of(rows)


def test_too_long_examples_are_an_error_if_asked(load):
    with pytest.raises(DataError, match=r"1 examples are longer than the context of 64 .* number 2 .* give a larger"):
        load([{"text": "Ash"}, {"text": "Ben buys toys. " * 40}], Layout(64, too_long="error"))


def test_an_example_without_a_target_is_skipped(load):
    data = [{"p": "Ben buys toys. " * 40, "c": "yes"}, {"p": "a", "c": " "}, {"p": "a", "c": "b"}]
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
    ("a.jsonl", '{"txt": "x", "n": 1}\n', r"a\.jsonl, example 1, has no column 'text', .* it has 'txt', 'n'"),
    ("a.jsonl", '{"text": [1, 2]}\n', r"a\.jsonl, example 1, holds list in its column 'text'"),
    ("a.csv", "text\nx\n", r"a\.csv ends in '\.csv', but only \.json, .* convert it"),
    ("a", "x", r"a ends in '', but only"),
])
def test_a_file_that_cannot_be_used_is_named(load, tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        load(path)


@pytest.mark.parametrize("data", ["no.jsonl", "no/such.jsonl", "./no", "no", "/no/such", "no/*", Path("no/such"),
                                  ["a/b"]])
def test_a_path_without_a_file_is_named(load, data):
    with pytest.raises(DataError, match=r"there is no file at .*; give a file, a folder"):
        load(data)


def test_a_folder_must_hold_one_kind_of_file(load, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        load(tmp_path / "data")
    write(tmp_path / "data", "json")
    write(tmp_path / "data", "txt")
    with pytest.raises(DataError, match=r"holds \.json and \.txt files, .* give a glob"):
        load(tmp_path / "data")


@pytest.mark.parametrize(("data", "columns", "says"), [
    ([{"txt": "x"}], {}, "the source, example 1, has no column 'text', which text needs; it has 'txt'"),
    ([{"q": "x"}], dict(prompt="{q} {hint}", completion="q"), "has no column 'hint', which prompt needs; it has 'q'"),
    ([["x"]], {}, r"example 1, is \"\['x'\]\", but must be a mapping"),
    ([{"ids": "x"}], dict(tokens="ids"), "holds 'x' in its column 'ids', but tokens must be a list"),
    ([{"ids": [1.5]}], dict(tokens="ids"), "but tokens must be a list of token ids"),
    ([{"ids": [3, 1000]}], dict(tokens="ids"), "example 1, has token id 1000, but the model's vocabulary is 0 to 999"),
    ([{"ids": [-1, 3]}], dict(tokens="ids"), "has token id -1"),
    (5, {}, "the source is 5, which holds no rows; give"),
    ([], {}, "no example is left"),
    ([{"text": " "}, {"text": ""}], {}, r"no example is left \(skipped: 2 blank text\)"),
    ([{"text": "Ben buys toys. " * 40}], {}, r"no example is left \(skipped: 1 too long\); .* larger context"),
])
def test_rows_that_cannot_be_used_are_named(load, data, columns, says):
    with pytest.raises(DataError, match=says):
        load(data, **columns)


@pytest.mark.parametrize(("error", "kind", "says"), [
    (datasets.exceptions.DatasetNotFoundError("gone"), DownloadError, "nor on the hub, or it is private or gated"),
    (ConnectionError("no route"), DownloadError, r"out of reach or HF_HUB_OFFLINE is set \(no route\); go online"),
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
    with pytest.raises(DownloadError, match=r"'sled-jax/no-such-data' is neither .* go online"):
        load("sled-jax/no-such-data")


@pytest.mark.parametrize(("wrong", "says"), [
    (dict(limit=0), "Source.limit is 0"),
    (dict(prompt="a"), "Source names prompt; name text, or tokens, or prompt with completion"),
    (dict(text="a", tokens="b"), "Source names text and tokens"),
    (dict(text=""), "must be the name of a column"),
    (dict(prompt="{a", completion="b"), "is no template"),
    (dict(prompt="{a!r}", completion="b"), "must be just the name of a column"),
    (dict(prompt="{}", completion="b"), "must be just the name of a column"),
])
def test_a_wrong_source_is_refused(wrong, says):
    with pytest.raises(SettingError, match=says):
        Source([], **wrong)


@pytest.mark.parametrize(("wrong", "says"), [
    (dict(context=1), "Layout.context is 1"),
    (dict(shape="wide"), "Layout.shape is 'wide', but must be one of 'packed', 'padded'"),
    (dict(too_long="cut"), "Layout.too_long is 'cut'"),
    (dict(prompt_weight=-1), "Layout.prompt_weight is -1"),
    (dict(buckets=0), "Layout.buckets is 0"),
])
def test_a_wrong_layout_is_refused(wrong, says):
    with pytest.raises(SettingError, match=says):
        Layout(**dict(context=64) | wrong)


def test_what_the_model_cannot_take_is_refused(load):
    with pytest.raises(SettingError, match=r"Layout\.context is 257, but the model's context holds 256"):
        load(ROWS, Layout(257))
    with pytest.raises(DataError, match="names no end-of-text token"):
        load(ROWS, config=dataclasses.replace(CONFIG, eos_ids=()))
    with pytest.raises(TokenizerError):
        load(ROWS, tokenizer=Text(None, "nowhere"))
    with pytest.raises(SettingError, match="split is 'test'"):
        load("demo", split="test")


# The cache


def test_a_second_run_tokenises_nothing(load, tmp_path, encoded):
    path = write(tmp_path, "jsonl")
    first = load(path)
    assert len(encoded) == 4
    again = load(path)
    assert len(encoded) == 4 and again.report == first.report and again.digest == first.digest
    np.testing.assert_equal(one_epoch(again), one_epoch(first))
    load(path, Layout(32, shape="padded", prompt_weight=1))  # rows are other ones, their documents are not
    assert len(encoded) == 4


def test_the_rows_are_kept_too(load, monkeypatch):
    first = load(ROWS)
    monkeypatch.setattr("sled.train.rows.arrange", None)
    np.testing.assert_equal(one_epoch(load(ROWS)), one_epoch(first))
    with pytest.raises(TypeError):
        load(ROWS, Layout(63))


def test_other_data_or_settings_are_tokenised_anew(load, tmp_path, encoded):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "b": "two"}\n')
    other = Text.from_folder(DEMO)
    other._get().normalizer = normalizers.Lowercase()
    load(path)
    for change in (dict(text="b"), dict(limit=1), dict(prompt="b", completion="text"), dict(tokenizer=other),
                   dict(config=dataclasses.replace(CONFIG, eos_ids=(1,)))):
        before = len(encoded)
        load(path, **change)
        assert len(encoded) > before, change
    before = len(encoded)
    path.write_text('{"text": "six", "b": "two"}\n')  # of the same size
    load(path)
    load([{"text": "six", "b": "two"}])
    load([{"text": "ten", "b": "two"}])
    assert encoded[before:] == ["six", "six", "ten"]


@pytest.mark.parametrize("damage", [
    lambda f: (f / "tokens.bin").write_bytes(b"\0" * 8), lambda f: (f / "about.json").unlink(),
    lambda f: (f / "documents.npz").write_bytes(b"PK\x03\x04"), lambda f: (f / "about.json").write_text("{"),
    lambda f: [p.write_bytes(b"") for p in f.glob("*.npz")]])
def test_what_is_damaged_is_made_anew(load, tmp_path, damage):
    expected = tokens_of(load(ROWS))
    [folder] = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    damage(folder)
    assert tokens_of(load(ROWS)) == expected


def test_an_error_leaves_nothing_behind(load, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"ids": [3]}\n{"ids": [1000]}\n')
    with pytest.raises(DataError, match="example 2, has token id 1000"):
        load(path, tokens="ids")
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_who_asks_at_once_waits_for_the_first(load, encoded):
    found, at_once = [], threading.Barrier(4)
    ask = lambda: (at_once.wait(), found.append(load(ROWS).report))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(encoded) == len(ROWS) and len(set(map(str, found))) == 1


KILLED = """
import sys, time
from pathlib import Path
from sled.models.config import DecoderConfig
from sled.text import Text
from sled.train import documents
from sled.train.sources import Source

documents.TOGETHER = 2  # two examples are written, then comes a long wait

def rows():
    yield {"text": "Ash buys 0 toys."}
    yield {"text": "Ben buys 1 toys."}
    print("half", flush=True)
    time.sleep(60)

class Slow:
    def __iter__(self):
        return rows()

source = Source(Slow())
documents.Reading.digest = lambda self: "same"
config = DecoderConfig("llama", 1000, 8, 8, 2, 2, 2, 4, 256, eos_ids=(0,))
documents.tokenise(source, Text.from_folder(Path(sys.argv[1])), config, cache=sys.argv[2], progress=False)
"""


def test_a_killed_run_leaves_nothing_that_counts(load, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(DEMO), str(cache)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert len(list(cache.glob("*.partial"))) == 1
    monkeypatch.setattr("sled.train.sources.Reading.digest", lambda self: "same")  # so it is the same entry
    assert load(ROWS).report.examples == 4
    assert list(cache.glob("*.partial")) == []


def test_the_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "sled" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "sled" / "data"


# Rows: nothing is lost, nothing invented


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.lists(st.integers(1, 999), max_size=20), min_size=1, max_size=40), context=st.integers(2, 24),
       shape=st.sampled_from(["packed", "padded"]), too_long=st.sampled_from(["skip", "truncate"]),
       size=st.integers(1, 5), buckets=st.integers(1, 4))
def test_an_epoch_has_every_document_once_and_nothing_else(load, data, context, shape, too_long, size, buckets):
    layout = Layout(context, shape=shape, too_long=too_long, buckets=buckets)
    expected = [[*ids, END][:context] for ids in data if ids and (too_long == "truncate" or len(ids) < context)]
    if not expected:
        with pytest.raises(DataError, match="no example is left"):
            load([{"ids": ids} for ids in data], layout, tokens="ids")
        return
    rows = load([{"ids": ids} for ids in data], layout, tokens="ids")
    batches = one_epoch(rows, size, threads=0)
    found = [d for batch in batches for d in documents_of(batch)]
    assert sorted(tokens for tokens, _, _ in found) == sorted(expected)
    for tokens, weights, positions in found:
        assert weights == [0.0] + [1.0] * (len(tokens) - 1) and positions == list(range(len(tokens)))
    held = sum((batch.segments_BT > 0).sum() for batch in batches)
    assert held == rows.report.tokens == sum(map(len, expected)) and rows.report.examples == len(expected)
    assert len({batch.tokens_BT.shape[1] for batch in batches}) <= (1 if shape == "packed" else buckets)
    assert all(len(batch.tokens_BT) == size for batch in batches)
    for batch in batches:  # segments stand in order, and padding only at the end
        for row in batch.segments_BT:
            ends = np.flatnonzero(np.diff(row))
            assert row[0] in (0, 1) and np.isin(np.diff(row)[ends], [1, -row.max()]).all()


@given(st.lists(st.integers(1, 10), min_size=1, max_size=60))
def test_best_fit_takes_the_fullest_row_with_room(lengths):
    rows, filled = best_fit(np.array(lengths), 10), []
    for length, row in zip(lengths, rows.tolist(), strict=True):
        fits = [n for n, held in enumerate(filled) if held + length <= 10]
        if row == len(filled):
            assert not fits
            filled.append(0)
        assert not fits or filled[row] == max(filled[n] for n in fits)
        filled[row] += length
    assert max(filled) <= 10


def test_few_rows_are_open_at_a_time(monkeypatch):
    monkeypatch.setattr(packing, "OPEN_ROWS", 2)
    assert best_fit(np.array([7, 6, 5, 3, 4, 5]), 10).tolist() == [0, 1, 2, 1, 2, 3]  # the third closed row 0


def test_most_rows_are_full():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 5000).astype(int) + 2, 1024)
    assert lengths.sum() / (1024 * (1 + best_fit(lengths, 1024).max())) > 0.99


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 4))
def test_bucket_lengths_waste_least(lengths, count):
    found = bucket_lengths(np.array(lengths), 100, count)
    padded = lambda ends: sum(min(e for e in ends if e >= n) for n in lengths)  # noqa: E731
    possible = sorted({min(-(-n // 16) * 16, 100) for n in lengths})
    least = min(padded((*inner, possible[-1])) for k in range(min(count, len(possible)))
                for inner in itertools.combinations(possible[:-1], k))
    assert len(found) <= count and list(found) == sorted(set(found)) and padded(found) == least


def test_no_document_leaves_no_row():
    assert arrange(np.array([70]), np.array([0]), LAYOUT).starts_R.tolist() == [0]


# Batches


@pytest.fixture(scope="module", params=["packed", "padded"])
def rows(request, text, tmp_path_factory):
    """90 documents: neither they nor the packed rows are a multiple of a batch."""
    return read(Source("demo", limit=90), text, CONFIG, Layout(96, shape=request.param, buckets=2),
                cache=tmp_path_factory.mktemp("cache"), progress=False)


def draw(rows, count, index=0, processes=1, state=None, threads=0):
    """The next batches and the state after them."""
    batches = Batches(rows, 8, seed=3, process_index=index, process_count=processes, threads=threads)
    if state is not None:
        batches.set_state(json.loads(json.dumps(state)))
    return list(itertools.islice(batches, count)), batches.get_state()


@pytest.fixture(scope="module")
def alone(rows):
    """What one process draws: 2 epochs and some batches."""
    return draw(rows, 2 * Batches(rows, 8, process_index=0, process_count=1).per_epoch + 3)[0]


def joined(parts):
    return [type(batch[0])(*map(np.concatenate, zip(*batch, strict=True))) for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(rows, alone, processes):
    parts = [draw(rows, len(alone), i, processes)[0] for i in range(processes)]
    assert all(batch.tokens_BT.shape[0] == 8 // processes for part in parts for batch in part)
    np.testing.assert_equal(joined(parts), alone)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 15])
def test_a_resumed_run_draws_the_following_batches(rows, alone, at, threads):
    before, state = draw(rows, at, threads=threads)
    after, _ = draw(rows, len(alone) - at, state=state, threads=threads)
    np.testing.assert_equal(before + after, alone)


def test_the_number_of_processes_may_change_on_the_way(rows, alone):
    first, state = draw(rows, 7, 1, 4)
    parts = [draw(rows, 6, i, 2, state) for i in range(2)]
    then, _ = draw(rows, len(alone) - 13, state=parts[0][1])
    assert parts[0][1] == parts[1][1]
    np.testing.assert_equal(joined([p[0] for p in parts]) + then, alone[7:])
    np.testing.assert_equal([batch.tokens_BT for batch in first], [batch.tokens_BT[2:4] for batch in alone[:7]])


def test_every_epoch_has_every_document_in_another_order(rows, alone):
    size = Batches(rows, 8, process_index=0, process_count=1).per_epoch
    epochs = [[d for batch in alone[e * size:(e + 1) * size] for d in documents_of(batch)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(epochs[0]) == 90 and epochs[0] != epochs[1]
    together = [{tuple(tokens) for tokens, _, _ in documents_of(batch)} for batch in alone]
    assert not all(batch in together[size:] for batch in together[:size])  # batch-mates change, too


def test_epochs_end_and_the_seed_decides(rows, alone):
    size = Batches(rows, 8, process_index=0, process_count=1).per_epoch
    batches = Batches(rows, 8, seed=3, epochs=2, process_index=0, process_count=1, threads=1)
    np.testing.assert_equal(list(batches), alone[:2 * size])
    assert next(batches, None) is None
    other = next(Batches(rows, 8, seed=4, process_index=0, process_count=1))
    assert other.tokens_BT.shape != alone[0].tokens_BT.shape or (other.tokens_BT != alone[0].tokens_BT).any()


def test_padded_rows_go_with_others_of_their_length(load):
    rows = load("demo", Layout(256, shape="padded", buckets=3), limit=100)
    shapes = {batch.tokens_BT.shape for batch in one_epoch(rows, 8)}
    assert shapes == {(8, length) for length in rows.buckets} and len(shapes) == 3
    assert rows.report.fill > 0.8


def test_by_default_jax_says_which_process_this_is(rows, alone):
    np.testing.assert_equal(next(Batches(rows, 8, seed=3)), alone[0])


@pytest.mark.parametrize(("change", "says"), [
    (dict(seed=4), "saved with seed 3, but seed is 4 now"), (dict(batch_size=16), "saved with batch_size 8"),
])
def test_a_state_of_another_run_is_refused(rows, change, says):
    _, state = draw(rows, 2)
    with pytest.raises(DataError, match=says):
        Batches(rows, **dict(batch_size=8, seed=3, process_index=0, process_count=1) | change).set_state(state)


def test_a_state_of_other_data_is_refused(rows, load):
    with pytest.raises(DataError, match=r"saved with rows .* give what the run was started with"):
        draw(load(ROWS), 1, state=draw(rows, 2)[1])


@pytest.mark.parametrize(("wrong", "says"), [
    (dict(batch_size=0), "batch_size is 0"), (dict(batch_size=9, process_count=2), "which 2 processes cannot share"),
    (dict(process_index=2), "process_index is 2"), (dict(process_count=0), "process_count is 0"),
    (dict(seed=-1), "seed is -1"), (dict(epochs=0), "epochs is 0"), (dict(threads=-1), "threads is -1"),
])
def test_wrong_numbers_are_refused(rows, wrong, says):
    with pytest.raises(SettingError, match=says):
        Batches(rows, **dict(batch_size=8, process_index=0, process_count=2) | wrong)
