"""What a sweep found: its table, its picture, and the fastest setting whose loss is certified."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

from sled.calibration.learn_then_test import fewest_losses, p_value
from sled.eval.sweep.certified import certified
from sled.eval.sweep.pareto import pareto
from sled.eval.sweep.rows import Row
from sled.eval.tables import table
from sled.io import written_whole
from sled.plots import writable_picture


class Choice(NamedTuple):
    """The fastest certified method that is faster than its baseline, or None; and all certified methods."""

    method: str | None
    certified: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Swept:
    """The rows of a sweep, baselines first.

    sequences: names of the methods with exits, by compiled program, in the order in which they are tested.
    delta, epsilon: the expected loss that is tolerated, and the probability that it is exceeded all the same.
    num_layers: of the model. what: model, questions and common settings, in words.
    """

    rows: tuple[Row, ...]
    sequences: tuple[tuple[str, ...], ...]
    delta: float
    epsilon: float
    num_layers: int
    what: str

    def choice(self) -> Choice:
        """With a confidence of 1 - epsilon over the draw of the questions, the expected loss of ALL methods certified,
        and so of the one chosen among them by its speed, is at most delta.

        The loss of a question is 1 where the baseline solves it and the method does not, else 0: it bounds how far
        accuracy falls. See `sled.eval.sweep.certified.certified`.
        """
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
        cells = [(row.method, f"{row.accuracy:.3f}", f"[{row.low:.3f}, {row.high:.3f}]", f"{row.lost:.3f}",
                  f"{row.same_texts:.3f}", f"{row.same_tokens:.3f}", f"{row.mean_depth:.2f}",
                  None if row.acceptance is None else f"{row.acceptance:.2f}", f"{row.tokens_per_second:,.0f}",
                  f"{row.relative_speed:.2f}", f"{row.against_median_seconds / row.median_seconds:.2f}",
                  None if row.method not in tested else "yes" if row.method in passed else "no") for row in self.rows]
        headings = ("method", "accuracy", "95%", "lost", "same texts", "same tokens", "mean depth", "acceptance",
                    "tokens/s", "times as fast", "by medians", "certified")
        return "\n\n".join(["# Sweep", f"{self.what}; {'; '.join(self._machines())}.", table(headings, cells),
                            self.verdict(), *self._fronts(), *self._notes()])

    def verdict(self) -> str:
        """The choice in words."""
        if not self.sequences:
            return "No method leaves early, so none is chosen."
        method, passed = self.choice()
        n, count = self.rows[0].n, sum(map(len, self.sequences))
        said = (f"With {100 * (1 - self.epsilon):.6g}% confidence over the draw of the {n} questions, each of the "
                f"{len(passed)} certified methods, of {count} tested in {len(self.sequences)} sequences, has an "
                f"expected loss of at most {self.delta:g}: of further such questions, that share at most is solved "
                "without the exits and lost with them.")
        if not passed:
            few = fewest_losses(self.delta, self.epsilon / len(self.sequences))
            said = (f"No method could be shown to have an expected loss of at most {self.delta:g}. Even without any "
                    f"loss it takes {few:.0f} questions here, and {n} were asked.")
        if method is None:
            return f"{said} **None of them was faster than no exit**, so leave nothing early here." if passed else said
        [row] = [row for row in self.rows if row.method == method]
        return f"{said} **The fastest of them: {method}**, {row.relative_speed:.2f} times as fast as {row.against}."

    def picture(self, path: str | os.PathLike) -> Path:
        """Accuracy over mean depth and over relative speed, with the Pareto fronts. .png, .svg or .pdf."""
        from sled.eval.sweep.plot import draw

        return draw(self, writable_picture("the picture", Path(path)))

    def write(self, folder: Path) -> None:
        """`sweep.md` and `sweep.png`, each whole or not at all."""
        with written_whole(folder / "sweep.md") as beside:
            beside.write_text(self.markdown() + "\n", encoding="utf-8")
        with written_whole(folder / "sweep.png") as beside:
            self.picture(beside)

    def baseline(self) -> Row:
        """The baseline of the methods with exits, which share one; without any, plain decoding."""
        rows = {row.method: row for row in self.rows}
        return rows[rows[self.sequences[0][0]].against if self.sequences else self.rows[0].against]

    def speed(self, row: Row) -> float:
        """How many times as fast as `baseline()` the row is; 1 for the baseline itself.

        Of a row timed beside that baseline, its relative speed. Fusions are timed beside plain decoding, as the
        baseline was: their relative speed over its. So seconds are compared within the same rounds only.
        """
        base = self.baseline()
        return row.relative_speed if row.against == base.method else row.relative_speed / base.relative_speed

    def by_depth(self) -> list[Row]:
        """Rows whose mean depth says what was computed: not those of verified guesses, whose tokens all layers saw."""
        return [row for row in self.rows if row.draft is None]

    def fronts(self) -> tuple[list[Row], list[Row]]:
        """Rows that no other row beats in accuracy and mean depth, and in accuracy and `speed`."""
        shallow, accuracy = self.by_depth(), lambda rows: [row.accuracy for row in rows]
        return ([shallow[i] for i in pareto([-row.mean_depth for row in shallow], accuracy(shallow))],
                [self.rows[i] for i in pareto([self.speed(row) for row in self.rows], accuracy(self.rows))])

    def _fronts(self) -> list[str]:
        listed = lambda rows: "; ".join(row.method for row in rows)  # noqa: E731
        depth, speed = self.fronts()
        return [f"Not beaten in both accuracy and mean depth: {listed(depth)}.",
                f"Not beaten in both accuracy and speed: {listed(speed)}."]

    def _machines(self) -> list[str]:
        return list(dict.fromkeys(f"{row.machine}; {row.versions}; {row.run[:10]}" for row in self.rows))

    def _notes(self) -> list[str]:
        against = dict.fromkeys(row.against for row in self.rows)
        notes = [
            f"lost: share of the questions that {' or '.join(against)} solves and the method does not. same texts, "
            "same tokens: share of its texts that are the same, and of its tokens at the same place. mean depth: of "
            f"the layer that said a token, of {self.num_layers}; verified guesses went through all of them. times as "
            "fast: its seconds over the method's, for all questions, fastest round of each, timed in the same rounds. "
            "by medians: the same of the median rounds; as far as the two differ, speed is noise. tokens/s: in the "
            "fastest round. Methods of different programs (exits by threshold, guesses by draft, ...) are timed at "
            "different times, each beside its baseline anew, so their tokens/s do not compare; times as fast does."]
        if len(against) > 1:
            base = self.baseline()
            notes.append(f"Methods with exits are timed beside {base.method}, the others beside {base.against}. Where "
                         f"the picture and the front by speed hold all of them, {base.method} is 1, and what was timed "
                         f"beside {base.against} has its own times as fast over that of {base.method}: two "
                         "measurements, so more noise.")
        runs = dict.fromkeys(row.run for row in self.rows)
        if len(runs) > 1:
            notes.append(f"These rows stem from {len(runs)} runs ({', '.join(runs)}). Seconds and tokens per second of "
                         "different runs do not compare. times as fast compares each method with its baseline in its "
                         "own run; read differences between runs with care, and none between machines.")
        return notes
