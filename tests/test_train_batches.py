"""Rows of documents lose nothing and waste little; batches are the same for any processes and after any pause."""

import itertools
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from training_data import CONFIG, END, LAYOUT, ROWS, TEXT, documents_of, one_epoch

from sled.errors import DataError, SettingError
from sled.train.data import packing
from sled.train.data.batches import Batches, some_batches
from sled.train.data.packing import Layout, arrange, best_fit, bucket_lengths
from sled.train.data.rows import read_rows
from sled.train.data.sources import Source

pytest_plugins = ["training_data"]


# Documents in rows

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
    assert sorted(tokens for tokens, _ in found) == sorted(expected)
    for tokens, weights in found:
        assert weights == [0.0] + [1.0] * (len(tokens) - 1)
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


def test_most_rows_are_full_and_few_are_open_at_a_time(monkeypatch):
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 5000).astype(int) + 2, 1024)
    assert lengths.sum() / (1024 * (1 + best_fit(lengths, 1024).max())) > 0.99
    assert arrange(np.array([70]), np.array([0]), LAYOUT).starts_R.tolist() == [0]  # no document leaves no row
    monkeypatch.setattr(packing, "OPEN_ROWS", 2)
    assert best_fit(np.array([7, 6, 5, 3, 4, 5]), 10).tolist() == [0, 1, 2, 1, 2, 3]  # the third closed row 0


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 4))
def test_bucket_lengths_waste_least(lengths, count):
    found = bucket_lengths(np.array(lengths), 100, count)
    padded = lambda ends: sum(min(e for e in ends if e >= n) for n in lengths)  # noqa: E731
    possible = sorted({min(-(-n // 16) * 16, 100) for n in lengths})
    least = min(padded((*inner, possible[-1])) for k in range(min(count, len(possible)))
                for inner in itertools.combinations(possible[:-1], k))
    assert len(found) <= count and list(found) == sorted(set(found)) and padded(found) == least


# Batches of rows

@pytest.fixture(scope="module", params=["packed", "padded"])
def rows(request, tmp_path_factory):
    """90 documents: neither they nor the packed rows are a multiple of a batch."""
    return read_rows(Source("demo", limit=90), TEXT, CONFIG, Layout(240, shape=request.param, buckets=2),
                cache=tmp_path_factory.mktemp("cache"), progress=False)


def draw(rows, count, index=None, processes=None, state=None, threads=0):
    """The next batches and the state after them; by default jax says which process this is."""
    batches = Batches(rows, 8, seed=3, process_index=index, process_count=processes, threads=threads)
    if state is not None:
        batches.set_state(json.loads(json.dumps(state)))
    return list(itertools.islice(batches, count)), batches.get_state()


@pytest.fixture(scope="module")
def alone(rows):
    """What one process draws: 2 epochs and some batches."""
    return draw(rows, 2 * Batches(rows, 8).per_epoch + 3)[0]


def joined(parts):
    return [type(batch[0])(*map(np.concatenate, zip(*batch, strict=True))) for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(rows, alone, processes):
    parts = [draw(rows, len(alone), i, processes)[0] for i in range(processes)]
    assert all(batch.tokens_BT.shape[0] == 8 // processes for part in parts for batch in part)
    np.testing.assert_equal(joined(parts), alone)


def held(batches):
    """The tokens of every row that is not empty, in an order of their own."""
    return sorted(tuple(tokens[segments > 0]) for batch in batches
                  for tokens, segments in zip(batch.tokens_BT, batch.segments_BT, strict=True) if segments.any())


def test_some_rows_are_the_same_whatever_the_size_of_a_batch(rows):
    chosen = held(some_batches(rows, 7, 8, seed=3))
    assert len(chosen) == 7 and chosen != held(some_batches(rows, 7, 8, seed=4))
    assert all(held(some_batches(rows, 7, size, seed=3)) == chosen for size in (1, 2, 5))
    whole = list(some_batches(rows, 10_000, 8))
    assert len(held(whole)) == len(rows) and {batch.tokens_BT.shape[1] for batch in whole} <= set(rows.buckets)
    parts = [list(some_batches(rows, 10_000, 8, process_index=i, process_count=2)) for i in range(2)]
    np.testing.assert_equal(joined(parts), whole)


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
    size = Batches(rows, 8).per_epoch
    epochs = [[d for batch in alone[e * size:(e + 1) * size] for d in documents_of(batch)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(epochs[0]) == 90 and epochs[0] != epochs[1]
    together = [{tuple(tokens) for tokens, _ in documents_of(batch)} for batch in alone]
    assert not all(batch in together[size:] for batch in together[:size])  # batch-mates change, too


def test_epochs_end_and_the_seed_decides(rows, alone):
    batches = Batches(rows, 8, seed=3, epochs=2, threads=1)
    np.testing.assert_equal(list(batches), alone[:2 * batches.per_epoch])
    assert next(batches, None) is None
    other = next(Batches(rows, 8, seed=4))
    assert other.tokens_BT.shape != alone[0].tokens_BT.shape or (other.tokens_BT != alone[0].tokens_BT).any()


def test_padded_rows_go_with_others_of_their_length(load):
    rows = load("demo", Layout(256, shape="padded", buckets=3), limit=100)
    shapes = {batch.tokens_BT.shape for batch in one_epoch(rows, 8)}
    assert shapes == {(8, length) for length in rows.buckets} and len(shapes) == 3
    assert rows.report.fill > 0.75


def test_a_state_of_another_run_or_of_other_data_is_refused(rows, load):
    _, state = draw(rows, 2)
    for other, how, says in ((rows, dict(batch_size=8, seed=4), "saved with seed 3, but seed is 4 now"),
                             (rows, dict(batch_size=16, seed=3), "saved with batch_size 8"),
                             (load(ROWS), dict(batch_size=8, seed=3), "with rows .* give what the run was started")):
        with pytest.raises(DataError, match=says):
            Batches(other, **how).set_state(state)


@pytest.mark.parametrize(("wrong", "says"), [
    (dict(batch_size=0), "batch_size is 0"), (dict(batch_size=9, process_count=2), "which 2 processes cannot share"),
    (dict(process_index=2), "process_index is 2"), (dict(process_count=0), "process_count is 0"),
    (dict(seed=-1), "seed is -1"), (dict(epochs=0), "epochs is 0"), (dict(threads=-1), "threads is -1"),
])
def test_wrong_numbers_are_refused(rows, wrong, says):
    with pytest.raises(SettingError, match=says):
        Batches(rows, **dict(batch_size=8, process_index=0, process_count=2) | wrong)
