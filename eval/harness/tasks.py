"""Tasks by name: this library's, one's own folders', the harness's; and with data of one's own."""

from __future__ import annotations

import difflib
import inspect
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from sled.errors import DataError, DownloadError, EvaluationError, SledError
from sled.eval.harness.local_data import Data, overrides, paths_by_task
from sled.eval.protocols.task import ProtocolTask
from sled.io import first_line
from sled.settings.rules import Several

Folders = str | os.PathLike | Sequence[str | os.PathLike]

NAMES = Several(str, "names of tasks", hint="name one, such as sled_demo")
FOLDERS = Several((str, os.PathLike), "folders", hint="name folders that hold YAML files")
OWN = (Path(__file__).parent.parent / "tasks", Path(__file__).parent.parent / "protocols")


def manager(names: Sequence[str] = (), *, include_path: Folders = (),
            metadata: Mapping[str, Any] | None = None, everything: bool = False) -> TaskManager:
    """All tasks that there are. The harness's own, whose listing takes seconds, only where a name needs them.

    Raises EvaluationError for a folder that is not there, and for names of no task, group, tag or YAML file.
    """
    folders = [Path(folder).expanduser() for folder in FOLDERS("include_path", include_path)]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise EvaluationError(f"there is no folder {missing[0]} to take tasks from; name one that holds YAML files")
    make = lambda defaults: TaskManager(include_path=[*OWN, *folders], include_defaults=defaults,  # noqa: E731
                                        metadata=dict(metadata or {}))
    found = make(everything)
    unknown = lambda: [name for name in names if name not in found.task_index and not Path(name).is_file()]  # noqa: E731
    if unknown() and not everything:
        found = make(True)
    if unknown():
        near = difflib.get_close_matches(unknown()[0], found.all_tasks, n=4)
        raise EvaluationError(f"there is no task {unknown()[0]!r}" + (f"; did you mean {', '.join(near)}?" if near else
                              "; see what there is by `sled eval --tasks list`"))
    return found


def load_tasks(names: str | Sequence[str], *, data: Data | None = None, include_path: Folders = (),
               metadata: Mapping[str, Any] | None = None, num_fewshot: int | None = None, seed: int = 0,
               fewshot_seed: int = 1234) -> dict[str, Any]:
    """Tasks as `lm_eval.evaluate` takes them: {"tasks": ..., "groups": ..., "group_map": ...}.

    names: of tasks, groups or tags, or YAML files. data: as `paths_by_task` has it, in place of a task's own.
    include_path: folders with more tasks, which go before others of the same name. metadata: values for tasks to read.
    num_fewshot: examples before each question; None: what the task says. A task that says 0 keeps it, as in the
        harness. seed: of what tasks draw from Python's random numbers; fewshot_seed: of their choice of examples.

    Raises EvaluationError (unknown, or not for this library), DataError (among them: fewer rows than examples),
    DownloadError (its data cannot be had).
    """
    names = NAMES("tasks", names)
    if not names:
        raise EvaluationError("no task was given; name one, such as sled_demo")
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise EvaluationError(f"the task {twice[0]!r} is named twice; name it once")
    paths = paths_by_task(data, names)
    found = manager(names, include_path=include_path, metadata=metadata)
    begin_anew([], seed, fewshot_seed)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        spec: Any = name
        if name in paths:
            entry = found.task_index.get(name)
            if entry is None or entry.cfg is None or "task" not in entry.cfg or "group" in entry.cfg:
                raise EvaluationError(f"data are given for {name!r}, which is no single task; give them for the tasks "
                                      "it stands for, by name")
            # The harness changes a registered task only as a member of a group.
            spec = {"group": f"{name} with local data",
                    "task": [{"task": name, **overrides(name, entry.cfg, paths[name])}]}
        some = _load(found, name, spec)
        loaded["tasks"] |= some["tasks"]
        if spec is name:
            loaded["groups"] |= some["groups"]
            loaded["group_map"] |= some["group_map"]
    for task in loaded["tasks"].values():
        _prepare(task, num_fewshot)
        _check_examples(task)
    _check_metadata(loaded["tasks"].values(), metadata or {})
    begin_anew(loaded["tasks"].values(), seed, fewshot_seed)
    return loaded


def begin_anew(tasks: Iterable[Any], seed: int, fewshot_seed: int) -> None:
    """Random numbers from their beginning: the global ones that tasks draw from, and those that choose examples."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    for task in tasks:
        task.set_fewshot_seed(seed=fewshot_seed)


def _load(found: TaskManager, name: str, spec: Any) -> dict[str, Any]:
    import datasets

    try:
        return found.load(spec)
    except SledError:
        raise
    except (OSError, datasets.exceptions.DatasetsError) as reason:  # no network, unknown to the hub, offline mode
        raise DownloadError(f"the data of the task {name!r} cannot be had ({first_line(reason)}); go online, or give a "
                            f"local file: data={{{name!r}: PATH}} (--data {name}=PATH)") from reason
    except Exception as reason:  # a task's YAML and code raise what they like
        raise EvaluationError(f"the task {name!r} cannot be set up ({type(reason).__name__}: {first_line(reason)}); "
                              "does it fit its data, and is what it imports installed?") from reason


def _prepare(task: Any, num_fewshot: int | None) -> None:
    """Prepares a task as `lm_eval.simple_evaluate` does, without its survey of the machine, which takes seconds."""
    name = task.config.task
    if getattr(task, "MULTIMODAL", False):
        raise EvaluationError(f"the task {name!r} shows images or sounds, but the models here read text; "
                              "take another one")
    if getattr(task, "UNSAFE_CODE", False):
        raise EvaluationError(f"the task {name!r} runs code that the model writes, which is not done here; "
                              "take another one")
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _check_metadata(tasks: Iterable[Any], metadata: Mapping[str, Any]) -> None:
    """Raises EvaluationError for a name that certainly none of the tasks reads."""
    read = [_names_read(task) for task in tasks]
    if None in read:
        return
    known = set().union(*read)
    if unread := [name for name in metadata if name not in known]:
        raise EvaluationError(f"metadata (--metadata) has {unread[0]!r}, which no task here reads; leave it out, or "
                              f"give one of {', '.join(sorted(known))}")


def _names_read(task: Any) -> set[str] | None:
    """The names in its metadata that a task reads; None where its code may read any."""
    if type(task) not in (ConfigurableTask, ProtocolTask):
        return None
    make = task.config.custom_dataset
    parameters = inspect.signature(make).parameters.values() if callable(make) else ()
    if any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in parameters):
        return None
    primed = {"primer_file"} if "primer" in (task.config.metadata or {}) else set()
    return {"version", *primed, *(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)}


def _check_examples(task: Any) -> None:
    """Raises DataError where the rows that examples come from are fewer than the examples before each question."""
    asked, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if not asked or sampler is None:
        return
    rows = free = len(sampler.df)
    apart = task.fewshot_cfg.split == task.config.test_split  # then the harness never shows the row that is asked
    if apart and rows:
        free -= max(Counter(map(repr, sampler.df)).values())  # nor its duplicates
    if asked > free:
        beside = f", {free} besides the one that is asked" if apart else ""
        lower = f"lower num_fewshot (--num-fewshot) to {free}, or give more rows" if free else "give more rows"
        raise DataError(f"the task {task.config.task!r} shows {asked} examples before each question, but the data they "
                        f"come from hold {rows} row{'s' * (rows != 1)}{beside}; {lower}")
