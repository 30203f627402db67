"""`sled eval`."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from sled.cli.derived import arguments, derive, explained, given, left_out, settings_by_choice
from sled.cli.devices import ProcessOptions, check_alike, first_process
from sled.cli.exit_options import ExitOptions
from sled.cli.line import dashed, parse
from sled.cli.options import OFFERS, FusionOptions, SamplingOptions, TextModelOptions, named_value
from sled.cli.values import NewPath
from sled.errors import EvaluationError, SettingError
from sled.fusion import FUSIONS
from sled.io import writable
from sled.train.parallel.distributed import checked_by_first


@dataclasses.dataclass(frozen=True)
class FusionsOptions(derive(
        "Fusions", ("fusion", Annotated[tuple[str, ...], tyro.conf.arg(metavar="FUSION [FUSION ...]", help=(
            "One or several, each a method of its own. Settings given besides are for all that have them; those of one "
            'alone stand with it, in quotes: --fusion sled "sled --layers 0 4 8" confident.\n'
            f"{explained(FUSIONS)}\nFor scores, dola needs a finite --lower-bound, such as -1000."))], ("final",)),
        *settings_by_choice(OFFERS))):
    """The fusion of the layers' predictions. A setting left out keeps the method's own default."""

    def each(self) -> list[FusionOptions]:
        """The options of every fusion. Raises SettingError for an unknown one, and a setting that none of them has."""
        shared = given(self)
        words = shared.pop("fusion", ("final",))
        found, idle = [], set(shared)
        for written in words or ("",):
            word, _, own = written.strip().partition(" ")
            if word not in OFFERS:
                raise SettingError(f"--fusion has {written!r}, but must begin with one of {', '.join(OFFERS)}")
            options = parse(FusionOptions, "sled eval", ["--fusion", word, *own.split()])
            mine = {name: value for name, value in shared.items()
                    if name in OFFERS[word].options and name not in given(options)}
            idle -= set(OFFERS[word].options)
            found.append(dataclasses.replace(options, **mine))
            if found[-1] in found[:-1]:
                raise SettingError(f"--fusion has {written!r} twice, with the same settings; give it once")
        if idle:
            raise SettingError(f"{dashed(min(idle))} has no meaning for --fusion {' '.join(words)}; leave it out or "
                               "choose another --fusion")
        return found


@dataclasses.dataclass(frozen=True)
class Eval:
    """Score a way to decode on tasks of lm-evaluation-harness, beside the baselines that it must beat.

    sled eval --tasks sled_demo --limit 50 --fusion sled --rate 2

    sled eval --tasks gsm8k --data gsm8k=test.jsonl -m meta-llama/Llama-3.2-1B --fusion sled --num-fewshot 5

    sled eval --tasks arc_easy hellaswag -m Qwen/Qwen2.5-0.5B --fusion sled dola confident --lower-bound -1000
    --limit 200 --out arc

    sled eval --tasks list

    Every method answers the same samples: the last layer alone, for sled also its clamp alone, and what was chosen,
    of which there may be several.
    The report has means with 95% intervals, differences from plain decoding with theirs, and an exact test.

    Answers are kept as they are made: after a kill, the same command goes on where it was.
    """

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, or YAML files; list shows what there is."""
    data: tuple[str, ...] = ()
    """A task's data from a local file, TASK=PATH, or PATH where there is one task.
    JSON Lines, JSON, CSV, Parquet, ... with the columns that the task reads, or a folder of such files by split
    (test.jsonl, train.jsonl)."""
    include_path: tuple[Path, ...] = ()
    """Folders with tasks of your own, as YAML files."""
    metadata: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE [NAME=VALUE ...]")] = ()
    """Metadata for the tasks, such as problems=200 for sled_demo."""
    out: Annotated[NewPath, tyro.conf.arg(aliases=["-o"])] = Path("sled-eval")
    """Folder for report.json, report.md, samples.jsonl and pictures; report.json comes last."""
    cache: Annotated[NewPath | None, left_out("answers.sqlite in the folder of --out")] = None
    """Keep answers in this file. One file may serve many evaluations: answers of other models, methods or settings are
    never mixed up."""
    limit: Annotated[int | None, left_out("all")] = None
    """Only so many samples of each task, the first."""
    num_fewshot: Annotated[int | None, left_out("as the task says")] = None
    """Examples before each question. A task that says 0, such as sled_demo, keeps to it."""
    fewshot_seed: int = 1234
    """Chooses the examples; 1234 is the harness's own."""
    apply_chat_template: bool = False
    """Put prompts into the model's chat template."""
    system_instruction: str | None = None
    """Say this before all else."""
    max_new_tokens: Annotated[int | None, left_out("what the task says, or 256", "-n")] = None
    """The most tokens for an answer."""
    raw_scores: bool = False
    """Sum what the fusion gives as it is, logits for the last layer alone, in place of log-probabilities.
    SLED's published TruthfulQA figures are such sums."""
    batch_size: int = 16
    """Prompts decoded, and continuations scored, together."""
    time_samples: Annotated[int | None, left_out("no timing")] = None
    """Also time all methods side by side on so many samples of each task; the report has ratios to the baseline."""
    compare: bool = True
    """Compare with the baselines; --no-compare scores what was chosen alone."""
    model_options: TextModelOptions = dataclasses.field(default_factory=TextModelOptions)
    process_options: ProcessOptions = dataclasses.field(default_factory=ProcessOptions)
    fusion_options: FusionsOptions = dataclasses.field(default_factory=FusionsOptions)
    exit_options: ExitOptions = dataclasses.field(default_factory=ExitOptions)
    sampling_options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)

    def run(self) -> None:
        self.process_options.join()
        _need_harness()
        from sled.eval.harness.local_data import paths_by_task
        from sled.eval.harness.tasks import manager

        if self.tasks == ("list",):
            print("\n".join(manager(include_path=self.include_path, everything=True).all_tasks))
            return
        from sled.eval.methods import Method, baselines
        from sled.eval.report.report import report_folder
        from sled.eval.report.run import evaluate

        chosen = self.fusion_options.each()
        fusions = list(zip(self._names(chosen), [each.strategy() for each in chosen], strict=True))
        settings = self.exit_options.settings()
        self.sampling_options.check()
        metadata = dict(named_value("--metadata", each) for each in self.metadata)
        check_alike(self)
        cache = self.cache or self.out / "answers.sqlite"
        checked_by_first(report_folder, "--out", self.out)
        checked_by_first(writable, "--cache", cache)
        paths_by_task(self.data, self.tasks)  # these refuse here what would else be refused once the model is loaded
        manager(self.tasks, include_path=self.include_path)
        lm = self.model_options.load()
        sampling = self.sampling_options.chosen(lm)
        methods = [Method(name, fusion=fusion, sampling=sampling, **settings) for name, fusion in fusions]
        methods = [*(baselines(*methods) if self.compare else ()), *methods]
        report = evaluate(**arguments(self, evaluate) | dict(
            lm=lm, methods=methods, metadata=metadata, normalise=not self.raw_scores,
            cache=cache, seed=self.sampling_options.seed))
        print(report.markdown())
        if first_process():
            print(f"written to {self.out}", file=sys.stderr)

    def _names(self, fusions: Sequence[FusionOptions]) -> list[str]:
        """Every method by the options that were given for it; what all of one fusion share is left out."""
        others = {**given(self.exit_options), **given(self.sampling_options)}
        others.pop("seed", None)
        names = []
        for each in fusions:
            rivals = [given(other) for other in fusions if other.fusion == each.fusion and other is not each]
            own = {name: value for name, value in given(each).items() if name != "fusion" and not (
                rivals and all(other.get(name) == value for other in rivals))}
            chosen = {**own, **others}
            kind = {"final": "final layer" if chosen else "greedy", "clamp": "clamp only"}.get(
                each.fusion, OFFERS[each.fusion].kind.__name__)
            names.append(", ".join([kind, *(f"{name.replace('_', ' ')} {_shown(value)}"
                                            for name, value in chosen.items())]))
        return names


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as reason:
        raise EvaluationError(f"lm-evaluation-harness is not installed ({reason}); "
                              "install it by `pip install 'sled-jax[eval]'`") from reason


def _shown(value: Any) -> str:
    """A setting's value in a few words; of layers at equal steps the first two and the last."""
    if isinstance(value, tuple):
        steps = {later - earlier for earlier, later in itertools.pairwise(value) if isinstance(later, int)}
        listed = (*value[:2], "..", value[-1]) if len(steps) == 1 and len(value) > 4 else value
        return " ".join(map(str, listed))
    return f"{value:g}" if isinstance(value, float) else str(value)
