"""The harness's results for one task and method, sample by sample, and the scores that can be compared."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sled.errors import EvaluationError
from sled.eval.protocols.choices import Scored
from sled.io import json_numbers

UNANSWERED = ("", "[invalid]")  # the second is what the harness's filters give where a text holds no answer


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task under one method.

    n: samples. num_fewshot: examples before each. version: the task's. metrics: means and the like, as the harness
    has them, by "metric" or "metric, filter". higher_is_better: by metric, as far as the task says.
    unanswered: by filter, the samples in which it found no answer; only of tasks that generate.
    scored: texts whose log-likelihood was asked for; left_out: those of them with tokens that the fusion leaves out.
    samples: for every document and filter a mapping. doc_id, row: its number among those asked, from 0, and in its
        data, from 1; None where the task's own code makes documents of the rows. doc_hash, prompt_hash: as the harness
        has them. prompt: as the model was given it, or a list where it was given several; choices: the texts that were
        scored behind it. target, responses, answers, scores: what is right, what the model said, what the filter made
        of it, and how it is judged. finish_reasons: of each generated text, "eos", "stop" or "length", the token limit.
        left_out: where tokens were left out of scored texts, how many of each.
    """

    name: str
    n: int
    num_fewshot: int
    version: Any
    metrics: dict[str, float]
    higher_is_better: dict[str, bool]
    unanswered: dict[str, int]
    scored: int
    left_out: int
    samples: list[dict[str, Any]]

    @classmethod
    def of(cls, results: Mapping[str, Any], name: str, task: Any,
           finish_reasons: Mapping[tuple[str, int], list[str]] = {}) -> TaskResult:
        """From what `lm_eval.evaluate` returns, and how each text ended, by task and document."""
        counted = task.get_config("process_docs") is None  # which may leave rows out
        samples = [_sample(sample, counted, finish_reasons.get((name, sample["doc_id"])))
                   for sample in results["samples"][name]]
        metrics = {_key(*key.split(",", 1)): float(value) for key, value in results["results"][name].items()
                   if "," in key and "_stderr," not in key and isinstance(value, numbers.Real)}
        unanswered = {}
        if task.OUTPUT_TYPE == "generate_until":
            for sample in samples:
                nothing = all(str(answer).strip() in UNANSWERED for answer in sample["answers"])
                unanswered[sample["filter"]] = unanswered.get(sample["filter"], 0) + nothing
        scored = [each for sample in results["samples"][name] for each in _scored(sample["resps"])]
        better = {metric: bool(value) for metric, value in (task.higher_is_better() or {}).items()}
        return cls(name, len({sample["doc_id"] for sample in samples}), int(task.get_config("num_fewshot") or 0),
                   results["versions"].get(name), metrics, better, unanswered, len(scored),
                   sum(each.left_out > 0 for each in scored), samples)

    def scores(self) -> dict[str, np.ndarray]:
        """Per metric (and filter) the scores [n] of the samples, where they are all in [0, 1] and higher is better."""
        found = {}
        for which in dict.fromkeys(sample["filter"] for sample in self.samples):
            of_filter = sorted((s for s in self.samples if s["filter"] == which), key=lambda s: s["doc_id"])
            for metric in of_filter[0]["scores"]:
                values = [sample["scores"].get(metric) for sample in of_filter]
                if self.higher_is_better.get(metric, True) and all(
                        isinstance(v, numbers.Real) and 0 <= v <= 1 for v in values):
                    found[_key(metric, which)] = np.array(values, np.float64)
        return found

    def documents(self) -> list[tuple[int, str, str]]:
        """The documents in order, with the hashes of their content and of their prompts."""
        return sorted({(sample["doc_id"], sample["doc_hash"], sample["prompt_hash"]) for sample in self.samples})


def scores_of(found: Mapping[str, Sequence[TaskResult]]) -> dict[str, dict[str, np.ndarray]]:
    """By "task: metric, filter" the scores [n] of every method, on the same samples.

    Raises EvaluationError where methods were not asked the same.
    """
    first, *others = found
    together: dict[str, dict[str, np.ndarray]] = {}
    for at, task in enumerate(found[first]):
        for name in others:
            if found[name][at].documents() != task.documents():
                raise EvaluationError(f"the task {task.name!r} gave other samples to {name!r} than to {first!r}, so "
                                      "they cannot be compared; its data change from one reading to the next")
        for key in task.scores():
            columns = {name: found[name][at].scores().get(key) for name in found}
            if all(column is not None for column in columns.values()):
                together[f"{task.name}: {key}"] = columns
    return together


def _sample(sample: Mapping[str, Any], counted: bool, finish_reasons: list[str] | None) -> dict[str, Any]:
    """A sample without the document itself, which may be large, and is in the data."""
    asked = list(dict.fromkeys(context for context, *_ in sample["arguments"]))
    choices = [of[0] for _, *of in sample["arguments"] if of and isinstance(of[0], str)]
    left_out = [each.left_out for each in _scored(sample["resps"])]
    return {"doc_id": sample["doc_id"], "row": sample["doc_id"] + 1 if counted else None,
            "doc_hash": sample["doc_hash"], "prompt_hash": sample["prompt_hash"], "filter": sample["filter"],
            "prompt": asked[0] if len(asked) == 1 else asked, **({"choices": choices} if choices else {}),
            "target": _plain(sample["target"]), "responses": _plain(sample["resps"]),
            "answers": _plain(sample["filtered_resps"]),
            "scores": {metric: _plain(sample[metric]) for metric in sample["metrics"]},
            **({"finish_reasons": finish_reasons} if finish_reasons else {}),
            **({"left_out": left_out} if any(left_out) else {})}


def _scored(responses: Any) -> list[Scored]:
    """The scores among the harness's lists of a sample's responses."""
    if isinstance(responses, Scored):
        return [responses]
    return [each for part in responses for each in _scored(part)] if isinstance(responses, list) else []


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return json_numbers(float(value))
    return value if value is None or isinstance(value, str) else str(value)


def _key(metric: str, which: str) -> str:
    return metric if which == "none" else f"{metric}, {which}"
