"""The report of an evaluation: a table per score, all settings, and the samples; written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sled.errors import SettingError
from sled.eval.report.compare import Comparison, compare
from sled.eval.report.plot import draw_comparison
from sled.eval.report.scores import TaskResult
from sled.eval.report.tables import table
from sled.io import unfinished, writable_folder, written_whole
from sled.settings.brief import brief
from sled.timing import Times

FORMAT = 1  # of report.json
FILES = ("report.json", "report.md", "samples.jsonl")  # besides pictures


@brief
@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """The scores found, and all that decided them.

    tasks: by method. scores: by "task: metric, filter" the scores [n] of every method, on the same samples.
    times: by method the seconds for the samples that were timed, side by side; {} where none were.
    against: the method that the others are compared with. methods: name, settings, whether its exits verify, and
    counts (`sled.eval.harness.cache.RequestCounts`).
    date: when it began; the day that chat templates wrote into prompts, where they do.
    """

    tasks: Mapping[str, list[TaskResult]]
    scores: Mapping[str, Mapping[str, np.ndarray]]
    times: Mapping[str, Times]
    against: str
    seed: int
    methods: list[dict[str, Any]]
    model: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    hardware: str
    date: str

    @functools.cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """One for each of `scores`."""
        return {name: compare(outcomes, self.against, seed=self.seed) for name, outcomes in self.scores.items()}

    @functools.cached_property
    def pictures(self) -> dict[str, str]:
        """The file name of each comparison's picture; names that differ in signs alone are numbered."""
        names: dict[str, str] = {}
        for score in self.comparisons:
            stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", score).strip("-")
            numbered = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
            taken = {name.lower() for name in names.values()}  # some file systems do not tell A from a
            names[score] = next(f"{name}.png" for name in numbered if f"{name}.png".lower() not in taken)
        return names

    def markdown(self) -> str:
        """The head, a table for each score, other metrics, and the counts of the answers."""
        made_with = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        first = next(iter(self.tasks.values()))
        lines = [f"# {', '.join(task.name for task in first)} on {self.model['name']}", "",
                 f"{self.date}; {self.hardware}; {made_with}; weights {self.model['weights'][:12]}, "
                 f"{self.model['dtype']}. All settings are in report.json.", "",
                 *(f"- {task.name}: {task.n} samples, {task.num_fewshot} examples before each, task version "
                   f"{task.version}" for task in first)]
        tested = sum(comparison.tested for comparison in self.comparisons.values())
        for name, comparison in self.comparisons.items():
            lines += ["", f"## {name}", "", comparison.markdown(tested=tested), *self._left_out(name),
                      "", f"![{name}]({self.pictures[name]})"]
        clamped = {method["name"] for method in self.methods if method["counts"]["left_out"]}
        others = [(method, f"{task.name}: {key}", f"{value:.4g}{'*' * (method in clamped and not task.unanswered)}")
                  for method, tasks in self.tasks.items() for task in tasks for key, value in task.metrics.items()
                  if f"{task.name}: {key}" not in self.scores]
        if others:
            lines += ["", "## Other metrics", "", table(("method", "metric", "value"), others)]
            if any(value.endswith("*") for *_, value in others):
                lines += ["", "\\* Of scores some of which are lower bounds of the fusion, and no log-probabilities."]
        if self.times:
            lines += ["", "## Time", "", f"The first {self.settings['time_samples']} samples of each task, answered by "
                      "every method in turn; the fastest round counts.", "", self.timing()]
        return "\n".join([*lines, "", "## Answers", "", self.answers(), ""])

    def timing(self) -> str:
        """Per method a row: seconds, and their ratio to the baseline's."""
        base = self.times[self.against].best
        return table(("method", "seconds", f"x {self.against}"), [
            (name, f"{times.best:.2f}", f"{times.best / base:.2f}") for name, times in self.times.items()])

    def _left_out(self, score: str) -> list[str]:
        """What must be known of a score under methods that leave tokens out."""
        found = {method: task for method, tasks in self.tasks.items() for task in tasks
                 if score.startswith(f"{task.name}: ") and task.left_out}
        if not found:
            return []
        counts = ", ".join(f"{task.left_out} of {task.scored} under {method}" for method, task in found.items())
        return ["", f"Texts scored with tokens outside those that the method keeps: {counts}. Each such token counts "
                "as the method's lower bound, so these sums are no log-probabilities: they rank texts first of all by "
                "how many such tokens they have."]

    def answers(self) -> str:
        """Per method a row: requests, computed now, cut prompts, texts at the token limit, unanswered, mean layer.

        There is no mean layer where drafts are verified: all layers saw every token.
        """
        head = ["method", "requests", "computed now", "prompts cut", "ended at the limit", "unanswered", "mean layer"]
        rows = []
        for method in self.methods:
            counts = method["counts"]
            none = ", ".join(f"{task.name} ({which}) {n}" for task in self.tasks[method["name"]]
                             for which, n in task.unanswered.items())
            shown = counts["new_tokens"] and not method["verifies"]
            depth = f"{counts['layers'] / counts['new_tokens']:.2f} of {self.model['layers']}" if shown else None
            rows.append([method["name"], counts["requests"], counts["computed"], counts["truncated"],
                         counts["unfinished"], none or None, depth])
        late = ("\n\nended at the limit: texts that had as many tokens as the task, or --max-new-tokens, allows. An "
                "answer that would have come later is missed.")
        return table(head, rows) + late * any(method["counts"]["unfinished"] for method in self.methods)

    def json(self) -> dict[str, Any]:
        """The whole report but the samples."""
        return {"format": FORMAT, "date": self.date, "hardware": self.hardware, "versions": self.versions,
                "model": self.model, "settings": self.settings, "against": self.against, "methods": self.methods,
                "tasks": {method: [{field.name: getattr(task, field.name) for field in dataclasses.fields(task)
                                    if field.name != "samples"} for task in tasks]
                          for method, tasks in self.tasks.items()},
                "times": {name: times.seconds for name, times in self.times.items()},
                "comparisons": {name: comparison.json() for name, comparison in self.comparisons.items()},
                "pictures": list(self.pictures.values())}

    def write(self, folder: Path) -> None:
        """report.json, report.md, samples.jsonl and a picture per score. Raises SettingError where it cannot.

        All files are written whole before the first takes its place; report.json is the last to, and that of an earlier
        evaluation goes first, with the pictures that it lists. So where report.json is, all else belongs to it.
        """
        samples = [json.dumps({"method": method, "task": task.name, **sample}, ensure_ascii=False, allow_nan=False)
                   for method, tasks in self.tasks.items() for task in tasks for sample in task.samples]
        texts = (json.dumps(self.json(), indent=2, ensure_ascii=False) + "\n", self.markdown(),
                 "".join(f"{line}\n" for line in samples))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as placing:  # what is entered first, takes its place last
                for file, text in zip(FILES, texts, strict=True):
                    placing.enter_context(written_whole(folder / file)).write_text(text, encoding="utf-8")
                for name, picture in self.pictures.items():
                    draw_comparison(self.comparisons[name], placing.enter_context(written_whole(folder / picture)))
                for earlier in [*_earlier(folder).get("pictures", ()), FILES[0]]:
                    (folder / earlier).unlink(missing_ok=True)
        except OSError as reason:
            raise SettingError(f"the report cannot be written to {folder} ({reason.strerror}); name a folder of your "
                               "own") from reason


def report_folder(name: str, folder: Path) -> Path:
    """`folder`, for a report. Raises SettingError where none can be written, or would replace files that are not one's.

    `EvaluationReport.write`, killed while its files take their places, leaves its report.json under the other name.
    """
    return writable_folder(name, folder, FILES, owns=lambda folder: bool(
        _earlier(folder) or list(folder.glob(unfinished(FILES[0])))))


def _earlier(folder: Path) -> dict[str, Any]:
    """The report.json of an earlier evaluation in its folder; {} where there is none."""
    try:
        found = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        if {"format", "methods", "comparisons"} <= found.keys() and all(map(_is_picture, found["pictures"])):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _is_picture(name: str) -> bool:
    return Path(name).name == name and name.endswith(".png")
