"""`evaluate`: methods compared on the tasks of lm-evaluation-harness, on the same samples."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from sled.errors import EvaluationError, EvaluationWarning, warn
from sled.eval.harness.adapter import SledLM
from sled.eval.harness.cache import Cache
from sled.eval.harness.local_data import Data, paths_by_task
from sled.eval.harness.tasks import NAMES, Folders, begin_anew, load_tasks
from sled.eval.methods import A_MODEL, Method, checked_methods, plain
from sled.eval.report.report import EvaluationReport, report_folder
from sled.eval.report.scores import TaskResult, scores_of
from sled.lm import LM
from sled.settings.rules import OrNone, Whole
from sled.timing import Times, hardware, interleave, versions
from sled.train.parallel.distributed import checked_by_first, from_first_process

ROUNDS = 3  # of timing; the fastest counts


def evaluate(lm: LM, tasks: str | Sequence[str], methods: Sequence[Method], *, against: str | None = None,
             data: Data | None = None, include_path: Folders = (),
             metadata: Mapping[str, Any] | None = None, limit: int | None = None, num_fewshot: int | None = None,
             apply_chat_template: bool = False, system_instruction: str | None = None,
             max_new_tokens: int | None = None, normalise: bool = True, batch_size: int = 16,
             cache: str | os.PathLike | None = None, out: str | os.PathLike | None = None, seed: int = 0,
             fewshot_seed: int = 1234, time_samples: int | None = None, progress: bool = True) -> EvaluationReport:
    """Scores of every method on every task, and how sure the differences from a baseline are.

    tasks: names of tasks, groups or tags of the harness, of this library (`sled_demo`) or of `include_path`.
    methods: those to compare; `sled.eval.methods.baselines` gives those that belong beside a method.
    against: the name of the baseline; None: the first method that is plain decoding, or else the first.
    data: a task's data from local files: a mapping from tasks to paths, "TASK=PATH", or a path for a single task.
    include_path: one or several folders with more tasks, as YAML files. metadata: values that tasks may read.
    limit: only so many samples of each task, the first; None: all.
    num_fewshot: examples before each question; None: as the task says. A task that says 0 keeps to it.
    apply_chat_template: prompts as the model's chat template has them. system_instruction: put before all else.
    max_new_tokens, normalise, batch_size: as of `sled.eval.harness.adapter.SledLM`.
    cache: a file that keeps every answer as it is made; the same call, after a kill, goes on from there.
    out: a folder for the report, written at the end; `report.json` comes last, so where it is, all is complete. Of
        several processes, all of which call this together, the first writes it, and has the cache.
    seed: of methods and tasks that draw, of the bootstrap, and of Python's and numpy's random numbers; fewshot_seed: of
        the choice of examples, by default the harness's own.
    time_samples: also time all methods side by side, on so many samples of each task, the first, in `ROUNDS` rounds
        after one that compiles; None: no timing. progress: shows bars and warnings.

    Raises EvaluationError, DataError, DownloadError, SettingError: what cannot be run is found before any work, as far
    as it can be known.
    """
    import lm_eval

    A_MODEL("lm", lm)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    began = datetime.datetime.fromisoformat(from_first_process(now))  # which chat templates may show
    progress = progress and jax.process_index() == 0
    if out is not None:
        checked_by_first(report_folder, "out", Path(out))
    names = NAMES("tasks", tasks)
    methods = checked_methods(methods)
    for method in methods:
        lm.check(method.decoding)
    against = _baseline(methods, against)
    limit = OrNone(Whole(1, hint="it counts the samples of each task"))("limit", limit)
    num_fewshot = OrNone(Whole(0, hint="it counts the examples before each question"))("num_fewshot", num_fewshot)
    seed = Whole(0, 2**31, hint="it begins the random streams")("seed", seed)
    fewshot_seed = Whole(0, hint="it chooses the examples")("fewshot_seed", fewshot_seed)
    time_samples = OrNone(Whole(1, hint="it counts the samples to time"))("time_samples", time_samples)
    with _quiet():
        loaded = load_tasks(names, data=data, include_path=include_path, metadata=metadata, num_fewshot=num_fewshot,
                            seed=seed, fewshot_seed=fewshot_seed)
        for name, task in loaded["tasks"].items():
            kept = task.get_config("num_fewshot")
            if progress and num_fewshot not in (None, kept):
                print(f"warning: {num_fewshot} examples before each question were asked for, but the task {name!r} "
                      f"keeps to the {kept} that it says itself", file=sys.stderr)
        store, weights = Cache(cache), lm.weights_digest()
        models = {method.name: SledLM(lm, method, batch_size=batch_size, max_new_tokens=max_new_tokens,
                                      normalise=normalise, seed=seed, cache=store, weights=weights, progress=progress,
                                      now=began)
                  for method in methods}
        for name, task in loaded["tasks"].items():
            for model in models.values():
                if task.OUTPUT_TYPE == "loglikelihood_rolling":
                    model.check_texts(f"the task {name!r}")
                elif task.OUTPUT_TYPE != "generate_until":
                    model.check_scoring(f"the task {name!r}")
        if apply_chat_template:
            next(iter(models.values())).chat_template()
        found: dict[str, list[TaskResult]] = {}
        for name, model in models.items():
            begin_anew(loaded["tasks"].values(), seed, fewshot_seed)  # every method sees the same examples
            results = lm_eval.evaluate(
                lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True,
                apply_chat_template=apply_chat_template, fewshot_as_multiturn=apply_chat_template,
                system_instruction=system_instruction)
            if model.counts.truncated:
                warn(f"{model.counts.truncated} of {model.counts.requests} prompts are longer than the "
                     f"{lm.config.max_positions} tokens of the model's context, and lost their beginning "
                     f"({model.counts.cut_tokens} tokens in all): give fewer examples before each question "
                     "(num_fewshot, --num-fewshot), or a model with a longer context", EvaluationWarning)
            found[name] = [TaskResult.of(results, task, loaded["tasks"][task], model.finish_reasons)
                           for task in loaded["tasks"]]
        store.close()
        times = _times(models, time_samples, progress) if time_samples else {}
    described = next(iter(models.values())).settings()
    report = EvaluationReport(
        tasks=found, scores=scores_of(found), times=times, against=against, seed=seed,
        methods=[{"name": method.name, "settings": method.settings(), "verifies": method.verifies,
                  "counts": dataclasses.asdict(models[method.name].counts)} for method in methods],
        model={"name": lm.name, "layers": lm.config.num_layers,
               **{key: described[key] for key in ("weights", "tokenizer", "dtype")}},
        settings={"tasks": names, "data": {name: str(path) for name, path in paths_by_task(data, names).items()},
                  "metadata": dict(metadata or {}), "limit": limit, "num_fewshot": num_fewshot,
                  "apply_chat_template": apply_chat_template, "system_instruction": system_instruction,
                  "max_new_tokens": max_new_tokens, "normalise": normalise, "batch_size": batch_size, "seed": seed,
                  "fewshot_seed": fewshot_seed, "time_samples": time_samples},
        versions={name: importlib.metadata.version(name) for name in ("sled-jax", "lm_eval", "datasets", "tokenizers")}
        | {name: version for name, version in versions().items() if name in ("python", "jax", "flax")},
        hardware=hardware(), date=began.isoformat())
    if out is not None and jax.process_index() == 0:
        report.write(Path(out))
    return report


def _times(models: Mapping[str, SledLM], samples: int, progress: bool) -> dict[str, Times]:
    """The seconds of every method for the same samples, compiled before."""
    with tqdm(total=(1 + ROUNDS) * len(models), desc="timing", unit="run", disable=not progress) as bar:
        for model in models.values():
            model.answer_again(samples)
            bar.update()
        return interleave({name: functools.partial(model.answer_again, samples) for name, model in models.items()},
                          ROUNDS, bar)


def _baseline(methods: list[Method], against: str | None) -> str:
    """The baseline's name. Raises EvaluationError where no method has it, or several have one name."""
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(f"two methods are called {twice[0]!r}; give each a name of its own")
    if against is None:
        return next((method.name for method in methods if plain(method)), names[0])
    if against not in names:
        raise EvaluationError(f"against is {against!r}, which is none of the methods {', '.join(names)}; name one")
    return against


@contextmanager
def _quiet() -> Iterator[None]:
    """Shows only the harness's errors: it logs at length what goes well."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
