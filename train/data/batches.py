"""Batches of rows, in an order that depends on the seed alone: not on processes, threads or interruptions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sled.errors import DataError, SettingError
from sled.settings.rules import Whole
from sled.train.data.rows import TrainingBatch, TrainingRows


class Batches(Iterator[TrainingBatch]):
    """Endless batches of shuffled rows, or those of some epochs. One process has its part of each.

    An epoch holds every row once, in `per_epoch` batches. All rows of a batch are of one length: packed rows have
    the context's, padded ones go with others of their bucket (what is left of a bucket goes to the next longer one).
    The last batch of the longest rows is filled up with rows of weight and segment 0.

    rows: from `sled.train.data.rows.read_rows`. batch_size: rows of a batch, over all processes; each gets an equal
        part of consecutive rows.
    seed: of the shuffling, anew for every epoch; 0 to 2^32 - 1. epochs: None for no end.
    process_index, process_count: whose part; by default as jax counts processes.
    threads: that make batches ahead; 0 to make each when it is asked for.

    Raises SettingError.
    """

    def __init__(self, rows: TrainingRows, batch_size: int, *, seed: int = 0, epochs: int | None = None,
                 process_index: int | None = None, process_count: int | None = None, threads: int = 2):
        import grain  # imported where it is needed: it is slow

        count = jax.process_count() if process_count is None else process_count
        count = Whole(1, hint="it counts processes")("process_count", count)
        index = jax.process_index() if process_index is None else process_index
        index = Whole(0, count - 1, hint="each process has its own")("process_index", index)
        size = Whole(1, hint="it counts rows")("batch_size", batch_size)
        seed = Whole(0, 2**32 - 1, hint="any will do")("seed", seed)
        threads = Whole(0, hint="0 makes batches when they are asked for")("threads", threads)
        if epochs is not None:
            epochs = Whole(1, hint="None is endless")("epochs", epochs)
        if size % count:
            raise SettingError(f"batch_size is {size}, which {count} processes cannot share equally; "
                               f"give a multiple of {count}")
        groups = _groups(rows, size)
        seeds = np.random.SeedSequence(seed).generate_state(len(groups) + 1).tolist()
        numbers = [grain.MapDataset.source(group).shuffle(seed=s).batch(size)
                   .map(lambda numbers, length=length: (numbers, length))
                   for (length, group), s in zip(groups, seeds[1:], strict=True)]
        epoch = grain.MapDataset.concatenate(numbers).shuffle(seed=seeds[0])
        part = size // count
        batches = epoch.repeat(epochs).map(
            lambda chosen: rows.batch(chosen[0][index * part:(index + 1) * part], part, chosen[1]))
        self.per_epoch = len(epoch)
        self._made_of = dict(rows=rows.digest, lengths=list(rows.buckets), batch_size=size, seed=seed)
        self._iterator = iter(batches.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))

    def __next__(self) -> TrainingBatch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position of the iteration, to be kept as JSON. It is the same in every process."""
        return {**self._made_of, "position": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, whatever the number of processes was.

        Raises DataError where it belongs to other data, or to another batch size, seed or layout.
        """
        for name, value in self._made_of.items():
            if state.get(name) != value:
                raise DataError(f"the data's position was saved with {name} {state.get(name)!r}, but {name} is "
                                f"{value!r} now, so the order is another one; give what the run was started with, or "
                                "start a new run")
        self._iterator.set_state(state["position"])


def some_batches(rows: TrainingRows, count: int, batch_size: int, *, seed: int = 0, process_index: int = 0,
                 process_count: int = 1) -> Iterator[TrainingBatch]:
    """`count` of the rows, or all, chosen at random; they do not depend on the size of a batch. Each once, shortest
    first; the last batch is filled up as in `Batches`. One process has its part of each."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    chosen = chosen[np.argsort(rows.lengths_R[chosen], kind="stable")]
    part = batch_size // process_count
    for start in range(0, len(chosen), batch_size):
        together = chosen[start:start + batch_size]
        length = next(bucket for bucket in rows.buckets if bucket >= rows.lengths_R[together[-1]])
        yield rows.batch(together[process_index * part:(process_index + 1) * part], part, length)


def _groups(rows: TrainingRows, size: int) -> list[tuple[int, np.ndarray]]:
    """Each length of batches, with the numbers of its rows: whole batches of all lengths but the longest."""
    order = np.argsort(rows.lengths_R, kind="stable")
    ends = np.searchsorted(rows.lengths_R[order], rows.buckets, side="right")
    ends[:-1] -= ends[:-1] % size
    return [(length, order[start:end]) for length, start, end in zip(rows.buckets, [0, *ends], ends, strict=False)
            if end > start]
