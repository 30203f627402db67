"""`tune`: every way to leave early, and not leaving early, timed side by side on prompts of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tqdm import tqdm

from sled.decoding.options import A_POLICY, FULL_DEPTH, Decoding
from sled.errors import CalibrationError, SettingError
from sled.exits import Gather, Immediate, Policy, Schedule
from sled.lm import LM
from sled.settings.brief import brief
from sled.settings.decorator import declared
from sled.settings.rules import Whole
from sled.text.prompts import Prompts, prompt_ids
from sled.timing import interleave


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way to decode the prompts.

    seconds: of the fastest round, compilation not included; median: of the median round.
    mean_depth: as `Stats` of a result has it.
    same_texts: share of the prompts whose tokens are all as without early exit.
    """

    exits: Policy
    schedule: Schedule
    seconds: float
    median: float
    new_tokens: int
    mean_depth: float
    same_texts: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


@brief
@dataclasses.dataclass(frozen=True)
class Tuned:
    """The fastest of the ways tried, and all of them, fastest first.

    exits, schedule: to be given to `LM.generate`. They hold for this model and machine, a batch of this size, and
    prompts like these. Where nothing was faster than not leaving early, `exits` leaves nothing early.
    """

    trials: tuple[Trial, ...]

    @property
    def exits(self) -> Policy:
        return self.trials[0].exits

    @property
    def schedule(self) -> Schedule:
        return self.trials[0].schedule

    @property
    def _plain(self) -> Trial:
        return next(trial for trial in self.trials if trial.exits == FULL_DEPTH)

    def verdict(self) -> str:
        """The fastest way in words, and what it costs: how fast a way is says nothing of what it answers."""
        best, plain = self.trials[0], self._plain
        if best is plain:
            return "Nothing was faster than no early exit."
        times = best.tokens_per_second / plain.tokens_per_second
        noise = max(trial.median / trial.seconds for trial in (best, plain))
        said = f"The fastest way made {times:.2f} times as many tokens a second as no early exit"
        if times <= noise:
            said += ", which is no more than its rounds differ by: noise"
        if best.same_texts == 1:
            return f"{said}, and the same texts."
        return (f"{said}, and changed {1 - best.same_texts:.0%} of the texts. An exit may be fast because it answers "
                "nothing: before you serve with it, bound what it loses by sled.calibrate.")

    def table(self) -> str:
        """The trials, one a line, with their speed as a multiple of that without early exit.

        What differs by less than a way's own rounds do (fastest against median) is noise.
        """
        plain = self._plain
        lines = ["tokens/s  of no exit  median round  mean depth  same texts  exits"]
        for trial in self.trials:
            what = "no early exit" if trial is plain else f"{_short(trial.exits)}, {_short(trial.schedule)}"
            lines.append(f"{trial.tokens_per_second:8,.0f}  {trial.tokens_per_second / plain.tokens_per_second:10.2f}  "
                         f"{trial.median / trial.seconds - 1:12.0%}  "
                         f"{trial.mean_depth:10.2f}  {trial.same_texts:10.0%}  {what}")
        return "\n".join(lines)


def tune(lm: LM, prompts: Prompts, *, exits: Policy | Sequence[Policy], rounds: int = 5, seed: int = 0,
         batch_size: int = 32, progress: bool = True, **decoding) -> Tuned:
    """The fastest way to leave early here: every policy with every schedule, and no early exit, timed side by side.

    Whether leaving early pays depends on model, machine, batch and prompts; where it does not, the result's
    `exits` leaves nothing early. Texts under `sled.EarlyExit` are as far from the full model's as its threshold
    lets them be: `calibrate` that first.

    prompts: like those to come; enough to fill a batch. exits: one policy or several.
    rounds: how often every way is timed, after one run that compiles; the fastest counts.
    decoding: the other fields of `sled.Decoding`, and seed and batch_size, as you will serve.

    Raises: PromptError, SettingError, TokenizerError, and CalibrationError where all texts end with their first token.
    """
    rounds = Whole(1, hint="every way is timed once a round")("rounds", rounds)
    batch_size = Whole(1, hint="prompts are decoded in batches")("batch_size", batch_size)
    ids = prompt_ids(prompts, lm.text, lm.config)
    policies = [exits] if not isinstance(exits, (list, tuple)) else [p for p in exits if p != FULL_DEPTH]
    if not policies:
        raise SettingError("exits is empty, so there is nothing to try; give a policy, or a list of them")
    serving = Decoding(**decoding)
    for policy in policies:
        lm.check(serving.replace(exits=A_POLICY("exits", policy)))  # before any work
    ways = [(FULL_DEPTH, FULL_DEPTH.schedule), *((policy, schedule) for policy in policies
                                                 for schedule in _schedules(policy, min(batch_size, len(ids))))]
    outs = {}

    def run(way: int):
        policy, schedule = ways[way]
        outs[way] = lm.decode(ids, serving.replace(exits=policy, schedule=schedule), seed=seed, batch_size=batch_size)

    with tqdm(total=len(ways) * (rounds + 1), unit="run", disable=not progress) as bar:
        for way in range(len(ways)):  # compiles
            run(way)
            bar.update()
            if outs[0].stats.new_tokens <= len(ids):
                raise CalibrationError(f"without early exit, all {len(ids)} texts end with their first token, so no "
                                       "way can be told from another; give prompts that the model answers, or a "
                                       "larger max_new_tokens")
        times = interleave({way: lambda way=way: run(way) for way in range(len(ways))}, rounds, bar)
    trials = [Trial(policy, schedule, times[way].best, times[way].median, outs[way].stats.new_tokens,
                    outs[way].stats.mean_depth, sum(map(list.__eq__, outs[way].tokens, outs[0].tokens)) / len(ids))
              for way, (policy, schedule) in enumerate(ways)]
    return Tuned(tuple(sorted(trials, key=lambda trial: -trial.tokens_per_second)))


def _schedules(policy: Policy, rows: int) -> list[Schedule]:
    """Those that differ for a batch of so many rows."""
    if rows == 1:
        return [policy.schedule]
    gathers = [Gather(2**n) for n in range(1, rows.bit_length())]
    return list(dict.fromkeys([policy.schedule, Immediate(), *gathers]))


def _short(settings) -> str:
    """A setting as one writes it down, defaults left out, and bounds that follow from what they bound."""
    fields = dataclasses.fields(settings)
    bounded = {of.bounds for of in declared(type(settings)).values()}
    usual = type(settings)(**{f.name: getattr(settings, f.name) for f in fields
                              if f.default is dataclasses.MISSING or f.name in bounded})
    written = {f.name: " ".join(repr(getattr(settings, f.name)).split()) for f in fields}
    changed = [f"{f.name}={written[f.name]}" for f in fields if f.default is dataclasses.MISSING
               or written[f.name] != repr(f.default if f.name in bounded else getattr(usual, f.name))]
    return f"{type(settings).__name__}({', '.join(changed)})"
