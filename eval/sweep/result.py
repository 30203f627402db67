"""The result of a sweep: a row per method, in a file that survives a kill; the table; and the certified choice."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sled.calibration.learn_then_test import can_lose, fewest_losses, p_value
from sled.errors import SettingError
from sled.eval.report.tables import table
from sled.eval.sweep.certified import certified, pareto
from sled.io import made_writable, naming_full_disk, written_whole
from sled.settings.brief import brief

SAMPLES = "samples.jsonl"
MORE_TOKENS = "Allow more tokens (--max-new-tokens), or say what ends an answer (--stop)"


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One method, measured. `against` names its baseline, timed beside it in the same rounds.

    digest: of all that decides the row: weights, questions, settings. run, machine, versions: when and on what.
    layers: after which a token may leave, or is drafted. verifies: drafts are verified, so that all layers see every
        token. policy: the exits' kind and settings, as JSON.
    n, right: the number of questions, and a 1 for each that was solved, else a 0. accuracy, low, high: the share of 1s,
        and its 95% interval (Wilson 1927). unanswered: the number of texts in which no answer could be read;
        unfinished: of those that ended at the token limit.
    lost: share of the questions that the baseline solved and this method did not.
    same_texts, same_tokens: share of the baseline's texts that are the same, token for token, and of its tokens that
        stand at the same place.
    mean_depth: as `Stats` of a result has it. acceptance: share of the drafts that were accepted.
    tokens: the number generated, in all texts. seconds: for all questions in the fastest of the rounds, and in the
        median one; against_seconds, against_median_seconds: the baseline's, in the same rounds.
    relative_speed: against_seconds / seconds: above 1, it answers sooner.
    """

    digest: str
    run: str
    machine: str
    versions: str
    method: str
    against: str
    layers: str
    verifies: bool
    policy: str
    n: int
    accuracy: float
    low: float
    high: float
    unanswered: int
    unfinished: int
    lost: float
    same_texts: float
    same_tokens: float
    mean_depth: float
    acceptance: float | None
    tokens: int
    seconds: float
    median_seconds: float
    against_seconds: float
    against_median_seconds: float
    relative_speed: float
    right: str

    @property
    def settings(self) -> dict[str, Any]:
        """The exits' settings by name, whatever the policy."""
        return json.loads(self.policy)


COLUMNS = [field.name for field in dataclasses.fields(SweepRow)]
READ = {"str": str, "int": int, "float": float, "bool": {"True": True, "False": False}.__getitem__}


class SweepFile:
    """A sweep's rows in a CSV file, by digest, of two with one digest the later; and their samples, one for each
    question, in JSON lines beside it.

    A last line without its break was cut off by a kill: it is removed, and so are samples of no row. A row without all
    its samples does not count. Raises SettingError for a CSV file with other columns or a damaged row, and where
    nothing can be written.
    """

    def __init__(self, path: Path):
        self.path = made_writable("the sweep's file", path)
        self.samples = made_writable("the sweep's samples", path.with_name(SAMPLES))
        found: dict[str, SweepRow] = {}
        text = path.read_bytes() if path.exists() else b""
        whole, _, torn = text.rpartition(b"\n")
        first = text.partition(b"\n")[0].decode("utf-8", "replace").rstrip("\r")
        header = ",".join(COLUMNS)
        if text and first != header and (whole or not header.startswith(first)):
            raise SettingError(f"{path} has other columns than this version of sled writes; name another folder, or "
                               "remove the file")
        if torn:
            os.truncate(path, len(text) - len(torn))
        lines = list(csv.reader(io.StringIO(whole.decode("utf-8", "replace"))))
        if not lines:
            _append(self.path, _csv_line(COLUMNS))
        for number, cells in enumerate(lines[1:], 2):
            row = _parse(cells, f"{path}, line {number},")
            found[row.digest] = row
        self.by_digest = self._with_samples(found)

    def _with_samples(self, rows: dict[str, SweepRow]) -> dict[str, SweepRow]:
        """The rows with a sample for every question; the file keeps no others."""
        lines = self.samples.read_bytes().splitlines(keepends=True) if self.samples.exists() else []
        of_row = [(_digest(line), line) for line in lines]
        counts = Counter(digest for digest, _ in of_row)
        rows = {digest: row for digest, row in rows.items() if counts[digest] == row.n}
        kept = [line for digest, line in of_row if digest in rows]
        if len(kept) < len(lines):
            with naming_full_disk(self.samples), written_whole(self.samples) as beside:
                beside.write_bytes(b"".join(kept))
        return rows

    def append(self, row: SweepRow, samples: Iterable[dict[str, Any]]) -> None:
        """Adds a row behind its samples, on the disk before this returns."""
        _append(self.samples, "".join(json.dumps({"digest": row.digest, **sample}, ensure_ascii=False,
                                                 allow_nan=False) + "\n" for sample in samples))
        _append(self.path, _csv_line(dataclasses.astuple(row)))
        self.by_digest[row.digest] = row


def _csv_line(cells: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _append(path: Path, text: str) -> None:
    with naming_full_disk(path), path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _digest(line: bytes) -> str | None:
    """That of the row which a line of samples is of; None where the line is damaged."""
    try:
        return json.loads(line)["digest"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _parse(cells: list[str], place: str) -> SweepRow:
    try:
        row = SweepRow(*(None if cell == "" and field.type.endswith("None") else READ[field.type.split()[0]](cell)
                         for field, cell in zip(dataclasses.fields(SweepRow), cells, strict=True)))
        if len(row.right) != row.n:
            raise ValueError(f"{len(row.right)} marks for {row.n} questions")
        json.loads(row.policy)
    except (ValueError, KeyError) as reason:
        raise SettingError(f"{place} is damaged ({reason}); remove that line, and its point is measured "
                           "again") from None
    return row


def too_few(method: str, right: int, n: int, unanswered: int, unfinished: int, delta: float) -> str:
    """That a baseline solves too few questions for anything to be certified beside it, in words."""
    counts = [f"in {unanswered} of its texts no answer could be read"] * bool(unanswered)
    counts += [f"{unfinished} ended at the token limit"] * bool(unfinished)
    texts = f" ({'; '.join(counts)})" * bool(counts)
    return (f"{method} solves {right} of {n} questions{texts}: so little can be lost that a method which solves none "
            f"might keep within a loss of {delta:g}")


def cut_off(method: str, unfinished: int, n: int) -> str:
    """That texts ended at the token limit, and what to do, in words."""
    return (f"{unfinished} of {n} texts of {method} ended at the token limit: an answer that would have come later is "
            f"missed. {MORE_TOKENS}")


def counted(sequences: Sequence[Any]) -> str:
    """How many sequences of methods there are, in words."""
    return f"{len(sequences)} sequence{'s' * (len(sequences) != 1)}"


class Choice(NamedTuple):
    """The fastest certified method that is faster than its baseline, or None; and all certified methods."""

    method: str | None
    certified: tuple[str, ...]


@brief
@dataclasses.dataclass(frozen=True)
class Swept:
    """The rows of a sweep, baselines first; `sled.eval.sweep.plot.draw_sweep` draws it.

    sequences: names of the methods with exits, by compiled program, in the order in which they are tested.
    delta, epsilon: the expected loss that is tolerated, and the probability that it is exceeded all the same.
    num_layers: of the model. what: model, questions and common settings, in words; form: how the questions are put.
    """

    rows: tuple[SweepRow, ...]
    sequences: tuple[tuple[str, ...], ...]
    delta: float
    epsilon: float
    num_layers: int
    what: str
    form: str = ""

    def can_lose(self) -> bool:
        """Whether the baseline is shown to solve more of such questions than delta, the loss that is tolerated."""
        base = self.baseline()
        return can_lose(base.accuracy, base.n, self.delta, self.epsilon)

    def choice(self) -> Choice:
        """With a confidence of 1 - epsilon over the draw of the questions, the expected loss of ALL methods certified,
        and so of the one chosen among them by its speed, is at most delta.

        The loss of a question is 1 where the baseline solves it and the method does not, else 0: it bounds how far
        accuracy falls. See `sled.eval.sweep.certified.certified`. None is certified where the baseline solves so few
        questions that a method that solves none could be.
        """
        if not self.can_lose():
            return Choice(None, ())
        rows = {row.method: row for row in self.rows}
        p_values = [[p_value(rows[name].lost, rows[name].n, self.delta) for name in names] for names in self.sequences]
        passed = [name for names, count in zip(self.sequences, certified(p_values, self.epsilon), strict=True)
                  for name in names[:count]]
        faster = [name for name in passed if rows[name].relative_speed > 1]
        return Choice(max(faster, key=lambda name: rows[name].relative_speed, default=None), tuple(passed))

    def markdown(self) -> str:
        """The table, the choice, the Pareto fronts, and what must be known to read them."""
        passed = self.choice().certified
        tested = {name for names in self.sequences for name in names}
        cells = [(row.method, f"{row.accuracy:.3f}", f"[{row.low:.3f}, {row.high:.3f}]", row.unanswered,
                  row.unfinished, f"{row.lost:.3f}", f"{row.same_texts:.3f}", f"{row.same_tokens:.3f}",
                  f"{row.mean_depth:.2f}", None if row.acceptance is None else f"{row.acceptance:.2f}",
                  f"{row.tokens / row.n:.0f}", f"{row.relative_speed:.2f}",
                  f"{row.against_median_seconds / row.median_seconds:.2f}",
                  None if row.method not in tested else "yes" if row.method in passed else "no") for row in self.rows]
        machines = dict.fromkeys(f"{row.machine}; {row.versions}; {row.run[:10]}" for row in self.rows)
        headings = ("method", "accuracy", "95%", "unanswered", "ended at the limit", "lost", "same texts",
                    "same tokens", "mean depth", "acceptance", "tokens", "times as fast", "by medians", "certified")
        fronts = [f"Not beaten in both accuracy and {what}: {'; '.join(row.method for row in front)}."
                  for what, front in zip(("mean depth", "speed"), self.fronts(), strict=True) if front]
        base = self.baseline()
        said, _, rest = cut_off(base.method, base.unfinished, base.n).partition(":")
        cut = [f"**{said}**:{rest}."] * bool(base.unfinished)
        form = f"{self.form[:1].upper()}{self.form[1:]}. " * bool(self.form)
        return "\n\n".join(["# Sweep", f"{self.what}; {'; '.join(machines)}.",
                            f"{form}All prompts and texts are in {SAMPLES}.", table(headings, cells), *cut,
                            self.verdict(), *fronts, *self._notes()])

    def verdict(self) -> str:
        """The choice in words."""
        if not self.sequences:
            return "No method leaves early, so none is chosen."
        method, passed = self.choice()
        base, n, count = self.baseline(), self.rows[0].n, sum(map(len, self.sequences))
        if not self.can_lose():
            why = too_few(base.method, base.right.count("1"), n, base.unanswered, base.unfinished, self.delta)
            return (f"**Nothing is certified or chosen**: {why}. Sweep again with more questions, or with such as the "
                    "model solves, in a form that it knows (solved examples, a chat template, another rule that finds "
                    "its answers). How far texts change is bounded by sled.calibrate, which needs no answers.")
        found = (f"With {100 * (1 - self.epsilon):.6g}% confidence over the draw of the {n} questions, each of the "
                 f"{len(passed)} certified methods, of {count} tested in {counted(self.sequences)}, has an "
                 f"expected loss of at most {self.delta:g}: of further such questions, that share at most is solved "
                 f"without the exits and lost with them. {base.method} solves {base.accuracy:.3g} of these.")
        if not passed:
            few = fewest_losses(self.delta, self.epsilon / len(self.sequences))
            return (f"No method could be shown to have an expected loss of at most {self.delta:g}. Even without any "
                    f"loss it takes {few:.0f} questions here, and {n} were asked.")
        if method is None:
            return f"{found} **None of them was faster than no exit**, so leave nothing early here."
        [row] = [row for row in self.rows if row.method == method]
        return f"{found} **The fastest of them: {method}**, {row.relative_speed:.2f} times as fast as {row.against}."

    def baseline(self) -> SweepRow:
        """The baseline of the methods with exits, which share one; without any, plain decoding."""
        rows = {row.method: row for row in self.rows}
        return rows[rows[self.sequences[0][0]].against if self.sequences else self.rows[0].against]

    def speed(self, row: SweepRow) -> float:
        """The speed of the row relative to `baseline()`, which has 1; above 1, the row is faster.

        Of a row timed beside that baseline, its relative speed. Fusions are timed beside plain decoding, as the
        baseline was: their relative speed over its. So seconds are compared within the same rounds only.
        """
        base = self.baseline()
        return row.relative_speed if row.against == base.method else row.relative_speed / base.relative_speed

    def by_depth(self) -> list[SweepRow]:
        """Rows whose mean depth tells what was computed: not those that verify, where all layers saw every token."""
        return [row for row in self.rows if not row.verifies]

    def fronts(self) -> tuple[list[SweepRow], list[SweepRow]]:
        """Rows that no other row beats in accuracy and mean depth, and in accuracy and `speed`; none where no row
        solves enough to be compared by it."""
        if not any(can_lose(row.accuracy, row.n, self.delta, self.epsilon) for row in self.rows):
            return [], []
        shallow, accuracy = self.by_depth(), lambda rows: [row.accuracy for row in rows]
        return ([shallow[i] for i in pareto([-row.mean_depth for row in shallow], accuracy(shallow))],
                [self.rows[i] for i in pareto([self.speed(row) for row in self.rows], accuracy(self.rows))])

    def _notes(self) -> list[str]:
        against = dict.fromkeys(row.against for row in self.rows)
        notes = [
            "unanswered: texts in which no answer could be read; they count as wrong. ended at the limit: texts that "
            "had as many tokens as were allowed. lost: share of the questions that "
            f"{' or '.join(against)} solves and the method does not. same texts, same tokens: share of its texts that "
            "are the same, and of its tokens at the same place. mean depth: of the layer whose choice a token is, "
            f"of {self.num_layers}; of an accepted draft, the one that drafted it. tokens: mean length of an answer. "
            "times as fast: its seconds over the method's, for all questions, fastest round of each, timed in the same "
            "rounds. A method whose answers are longer is slower at the same speed per token, and one whose answers "
            "break off is faster. by medians: the same of the median rounds; as far as the two differ, speed is noise."]
        if len(against) > 1:
            base = self.baseline()
            notes.append(f"Methods with exits are timed beside {base.method}, the others beside {base.against}. Where "
                         f"the picture and the front by speed hold all of them, {base.method} is 1, and what was timed "
                         f"beside {base.against} has its own times as fast over that of {base.method}: two "
                         "measurements, so more noise.")
        runs = dict.fromkeys(row.run for row in self.rows)
        if len(runs) > 1:
            notes.append(f"These rows stem from {len(runs)} runs ({', '.join(runs)}). Seconds of different runs do "
                         "not compare. times as fast compares each method with its baseline in its "
                         "own run; read differences between runs with care, and none between machines.")
        return notes
