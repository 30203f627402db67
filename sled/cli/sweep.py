"""`sled sweep`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

import sled
from sled.cli.derived import arguments, given, left_out, option_help, option_type, sets
from sled.cli.options import FEW_PROMPTS, ChatOptions, FusionOptions, ModelOptions, Stop, layers_to_try, unescape
from sled.cli.question_options import QuestionOptions
from sled.cli.values import Layer, LayerSet, NewPath
from sled.demo import MAX_NEW_TOKENS
from sled.errors import SettingError

Measure = option_type(sled.EarlyExit, "measure")
KV = Annotated[option_type(sled.EarlyExit, "kv"), tyro.conf.arg(help=option_help(sled.EarlyExit, "kv"))]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Measure what leaving early costs and gains, over a grid of settings: a table, a CSV file and a picture.

    sled sweep

    sled sweep --exit-layers 2 4 2,4 --thresholds 0.7 0.9 0.99 --measures max_probability margin --drafts

    sled sweep --fusion sled --rate 2 --scale 10 -o sweep-sled

    sled sweep --thresholds --drafts --rates 0.5 1 2 --scales 5 10 20 -o sweep-of-sled

    sled sweep -m meta-llama/Llama-3.2-1B --data gsm8k.jsonl --prompt "Question: {question}\\nAnswer:"
    --answer answer --num-fewshot 8 --problems 200 -n 256

    Every setting is compared with the same fusion without exits, answer by answer and text by text, and timed beside
    it in the same rounds. The fastest setting whose loss can be shown to be small is named, or none: that takes a
    model that solves some of the questions, and 99 of them for the usual grid, 59 for one setting. Started again after
    an interruption with the same options, it goes on where it was.
    """

    out: Annotated[NewPath, tyro.conf.arg(aliases=["-o"])] = Path("sweep")
    """Folder for sweep.csv, samples.jsonl (every prompt and text), sweep.md and sweep.png."""
    problems: Annotated[int | None, left_out("all of --data, or 160 held-out problems of the demo model")] = None
    """The number of questions to ask."""
    question_options: QuestionOptions = dataclasses.field(default_factory=QuestionOptions)
    stop: Annotated[Stop, left_out("what a next question begins with, which a model may invent: the words of --prompt "
                                   "before its first column, such as Question:")] = ()
    exit_layers: Annotated[tuple[LayerSet, ...] | None, sets(sled.EarlyExit, "layers"),
                           left_out("the four that promise most, by sled layers on other questions")] = None
    """Early exit: after which layers, each a setting; with commas, several at once: 2 4 2,4."""
    thresholds: Annotated[tuple[float, ...], sets(sled.EarlyExit, "threshold")] = (0.98, 0.9, 0.8, 0.7, 0.5)
    """Early exit: how sure an exit must be. Nothing behind the option: no early exit in the sweep."""
    measures: tuple[Measure, ...] = (sled.EarlyExit.measure,)
    """Early exit: the measure of confidence."""
    kv: KV = sled.EarlyExit.kv
    draft_layers: Annotated[tuple[Layer, ...] | None, sets(sled.SelfSpeculation, "layer"),
                            left_out("as for --exit-layers")] = None
    """Self-speculation: after which layer to draft, each a setting."""
    drafts: Annotated[tuple[int, ...], sets(sled.SelfSpeculation, "draft")] = (2, 4, 6, 8)
    """Self-speculation: how many tokens to draft. Nothing behind the option: no self-speculation in the sweep."""
    rates: tuple[float, ...] = ()
    """SLED without exits, against plain greedy decoding: evolution rates."""
    scales: tuple[int, ...] = ()
    """SLED without exits: evolution scales."""
    rounds: int = 3
    """Rounds of timing; the fastest counts."""
    delta: float = 0.05
    """The expected loss to tolerate: the share of questions solved without exits and lost with them."""
    epsilon: float = 0.05
    """The probability that a setting called certified loses more all the same."""
    model_options: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    chat_options: ChatOptions = dataclasses.field(default_factory=ChatOptions)
    fusion_options: FusionOptions = dataclasses.field(default_factory=FusionOptions)
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-n"])] = MAX_NEW_TOKENS
    """The most tokens of an answer."""
    batch_size: int = 8
    """Questions answered together. Speeds are those of this batch size; in float32, texts do not depend on it."""

    def run(self) -> None:
        from sled.eval.sweep import grid
        from sled.eval.sweep.sweep import FILES, sweep, sweep_folder

        fusion = self.fusion_options.strategy()
        if bool(self.rates) != bool(self.scales):
            raise SettingError("--rates and --scales go together: SLED is swept over both; give both, or neither")
        self._refuse_idle()
        aside, questions = self._set_aside(self._questions())
        questions = dataclasses.replace(questions, prompts=tuple(self.chat_options.prompts(questions.prompts)))
        sweep_folder("--out", self.out)
        lm = self.model_options.load()
        self.chat_options.hint(lm)
        usual = layers_to_try(lm, self.chat_options.prompts(aside), 4, self.max_new_tokens) if aside else ()
        methods = [*grid.early_exits(self.exit_layers or usual, self.thresholds, measures=self.measures, kv=self.kv,
                                     fusion=fusion),
                   *grid.self_speculation(self.draft_layers or usual, self.drafts, fusion=fusion),
                   *grid.sled_settings(self.rates, self.scales)]
        if not methods:
            raise SettingError("nothing is left to sweep: give --thresholds, --drafts, or --rates with --scales")
        stop = [unescape(each) for each in self.stop] or None  # the questions' own
        swept = sweep(lm, methods, questions, self.out, **{**arguments(self, sweep), "stop": stop})
        print(swept.markdown())
        print(f"written to {self.out}: {', '.join(FILES)}", file=sys.stderr)

    def _refuse_idle(self) -> None:
        """Raises SettingError for an option that decides nothing in this sweep."""
        early, drafts = bool(self.thresholds), bool(self.drafts)
        for option, there, used, needs in (("--fusion", given(self.fusion_options), early or drafts,
                                            "--thresholds or --drafts"),
                                           ("--exit-layers", self.exit_layers, early, "--thresholds"),
                                           ("--draft-layers", self.draft_layers, drafts, "--drafts")):
            if there and not used:
                raise SettingError(f"{option} has no meaning without {needs}, which were left empty; leave it out, or "
                                   f"give {needs}")

    @property
    def _chooses(self) -> bool:
        """Whether layers are to be chosen, since none were named."""
        return any(ways and layers is None for ways, layers in ((self.thresholds, self.exit_layers),
                                                                (self.drafts, self.draft_layers)))

    def _set_aside(self, questions) -> tuple[list[str], Any]:
        """Prompts to choose the layers by, and the questions to ask: others, since a grid that was chosen after a look
        at the questions voids what is certified on them."""
        from sled.demo.problems import problems, prompt

        if not self._chooses:
            return [], questions
        if self.question_options.data is None:
            return [prompt(problem.question) for problem in problems("train", FEW_PROMPTS)], questions
        if len(questions.prompts) <= FEW_PROMPTS:
            raise SettingError(f"--exit-layers or --draft-layers was left out, so the first {FEW_PROMPTS} questions "
                               "are to choose layers by and are not asked; but there are "
                               f"{len(questions.prompts)}: name the layers, or give more questions")
        left = dataclasses.replace(questions, prompts=questions.prompts[FEW_PROMPTS:],
                                   answers=questions.answers[FEW_PROMPTS:], first_row=questions.first_row + FEW_PROMPTS)
        return list(questions.prompts[:FEW_PROMPTS]), left

    def _questions(self):
        """As many as are asked, and those that are to be set aside."""
        count, data = self.problems, self.question_options.data
        if count and data and self._chooses:
            count += FEW_PROMPTS
        return self.question_options.read(self.model_options.model, count, 160)
