"""Rows of documents: nothing is lost, nothing invented, little is wasted."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from training_data import END, LAYOUT, documents_of, loader, one_epoch

from sled.errors import DataError
from sled.train.data import packing
from sled.train.data.packing import Layout, arrange, best_fit, bucket_lengths


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path / "cache")


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
