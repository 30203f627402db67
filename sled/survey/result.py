"""What `sled.layers` returns: figures, a table of the layers, and what to do."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os

from sled.errors import CalibrationError
from sled.exits import EarlyExit, SelfSpeculation
from sled.io import json_digest, json_text, path_of, read_object, replace_text
from sled.lm import LOW_ACCEPTANCE
from sled.settings.brief import brief
from sled.survey.costs import PAYS, Costs
from sled.timing import hardware, versions

KEEPS = 0.98  # the share of tokens that an exit must leave as they are
SURE = 0.9
FORMAT = 2  # of a saved survey
FEW_TOKENS = 500  # on which shares are rough
REACHED = 0.7  # acceptance of drafts that training for exits has come to: 0.69 (LayerSkip), 0.6 to 0.7 (Kangaroo)
HEADINGS = ("layer", "agrees", "cal. error", f"over {SURE:g}", "of these", "pays from", "draft", "ids", "right",
            "speed", "threshold", "kept", "depth", "speed")
LEGEND = (
    f"agrees: tokens that are the last layer's choice; cal. error: of the layer's confidence, as a probability that it "
    f"agrees; over {SURE:g}: tokens to which it gives more than that; of these: those that agree; pays from: the share "
    f"of drafts that must be right for {PAYS:g} times the speed. Then the best way to draft after this layer, with the "
    f"number of token ids that drafts are of (the first ones) and the share of drafts that are right; and the best to "
    f"leave that keeps at least {KEEPS:.0%} of the tokens. speed: expected, as a multiple of plain greedy decoding's.")


@dataclasses.dataclass(frozen=True)
class Spoken:
    """What one layer says, over all tokens of the answers, each after the tokens of the answer before it.

    agreement: share of tokens for which its choice is the last layer's.
    calibration_error: the expected one (Guo et al. 2017, arXiv 1706.04599, 15 bins) of the probability that it gives to
        its choice, as that of agreeing with the last layer: 0 is perfect.
    sure: share of tokens that it gives more than 0.9; sure_agreement: share of these that are the last layer's choice,
        None where there are none.
    pays_from: the acceptance from which drafts after it would make decoding 1.05 times as fast; None where none does.
    """

    layer: int
    agreement: float
    calibration_error: float
    sure: float
    sure_agreement: float | None
    pays_from: float | None


@dataclasses.dataclass(frozen=True)
class Drafting:
    """What `sled.SelfSpeculation(layer, draft, first_ids=first_ids)` would do to the answers. Their text stays.

    acceptance, accepted: share of drafts, and drafts per verification, that are right. speed: expected, of decoding,
    as a multiple of plain greedy decoding's. bound_speed: on a device bound by memory.
    """

    layer: int
    draft: int
    first_ids: int | None
    acceptance: float
    accepted: float
    speed: float
    bound_speed: float

    def policy(self) -> SelfSpeculation:
        return SelfSpeculation(self.layer, self.draft, first_ids=self.first_ids)

    @property
    def written(self) -> str:
        """The policy as Python has it."""
        some = f", first_ids={self.first_ids}" if self.first_ids else ""
        return f"sled.SelfSpeculation({self.layer}, draft={self.draft}{some})"


@dataclasses.dataclass(frozen=True)
class Leaving:
    """What `sled.EarlyExit(layer, threshold)` would do to the answers, each token after the full model's before it.

    left: share of tokens that leave. kept: share of all tokens that stay the last layer's choice. mean_depth: layers
    of a token. speed, bound_speed: as of `Drafting`, with exact K/V.
    """

    layer: int
    threshold: float
    left: float
    kept: float
    mean_depth: float
    speed: float
    bound_speed: float

    def policy(self) -> EarlyExit:
        return EarlyExit(self.layer, self.threshold)


@brief
@dataclasses.dataclass(frozen=True)
class Survey:
    """What `sled.layers` found.

    model, num_layers; prompts, tokens: how many answers it read, of how many tokens; batch_size: of the speeds.
    layers: what the layers 1 .. L - 1 say. drafting, leaving: all draft lengths and thresholds after these.
    costs: what this machine takes for the parts of a step, or None where it was not timed: all speeds are then those
    of a device bound by memory. weights: SHA-256 of the model's, as a calibration has it.
    """

    model: str
    num_layers: int
    prompts: int
    tokens: int
    batch_size: int
    layers: tuple[Spoken, ...]
    drafting: tuple[Drafting, ...]
    leaving: tuple[Leaving, ...]
    costs: Costs | None
    weights: str
    date: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    hardware: str = dataclasses.field(default_factory=hardware)
    versions: dict[str, str] = dataclasses.field(default_factory=versions)

    def best_drafting(self, layer: int | None = None) -> Drafting | None:
        """The fastest way to draft, of one layer or of all; None in a model of one layer."""
        ways = (way for way in self.drafting if layer in (None, way.layer))
        return max(ways, key=lambda way: way.speed, default=None)

    def best_leaving(self, layer: int | None = None) -> Leaving | None:
        """The fastest way to leave that keeps 98% of the tokens, of one layer or of all; None where none keeps them."""
        _, keeping = self._worth_trying()
        ways = (way for way in keeping if layer in (None, way.layer))
        return max(ways, key=lambda way: way.speed, default=None)

    @property
    def recommended(self) -> list[Drafting | Leaving]:
        """The best way to draft and the best to leave, as far as they are at least 1.05 times as fast as plain."""
        best = (max(ways, key=lambda way: way.speed, default=None) for ways in self._worth_trying())
        return [way for way in best if way is not None and way.speed >= PAYS]

    def _worth_trying(self) -> tuple[list[Drafting], list[Leaving]]:
        """What may be recommended: ways to draft of which `sled.generate` would not warn, and to leave that keep 98%
        of the tokens. After a very cheap layer some speed is expected of drafts that are nearly all wrong; but such a
        layer does not speak, and little is left of that speed where the estimate errs a little."""
        return ([way for way in self.drafting if way.acceptance >= LOW_ACCEPTANCE],
                [way for way in self.leaving if way.kept >= KEEPS and way.left > 0])

    def speaking_layers(self, most: int = 4) -> tuple[int, ...]:
        """Where exits and drafts are most worth trying, ascending: the layers with the fastest ways to draft or leave,
        whether they pay or not."""
        def best(layer: int) -> float:
            ways = (self.best_drafting(layer), self.best_leaving(layer))
            return max((way.speed for way in ways if way is not None), default=0.0)

        return tuple(sorted(sorted(range(1, self.num_layers), key=best, reverse=True)[:most]))

    def table(self) -> str:
        """The layers, one a line, with the best way to draft and to leave after each, under what was surveyed."""
        rows = [HEADINGS]
        for said in self.layers:
            drafting, leaving = self.best_drafting(said.layer), self.best_leaving(said.layer)
            rows.append((
                str(said.layer), f"{said.agreement:.1%}", f"{said.calibration_error:.3f}", f"{said.sure:.0%}",
                _or_dash(said.sure_agreement, "{:.1%}"), _or_dash(said.pays_from, "{:.0%}"),
                str(drafting.draft), str(drafting.first_ids or "all"), f"{drafting.acceptance:.0%}",
                f"{drafting.speed:.2f}",
                *((f"{leaving.threshold:g}", f"{leaving.kept:.1%}", f"{leaving.mean_depth:.1f}", f"{leaving.speed:.2f}")
                  if leaving else "----")))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        where = self.hardware if self.costs else "a device bound by memory"
        head = (f"{self.model}, {self.num_layers} layers: {self.prompts} answers, {self.tokens:,} tokens; speeds "
                f"of batch {self.batch_size} on {where}")
        return "\n".join([head, "", *lines])

    def verdict(self) -> str:
        """The ways that are worth it, as Python has them; or none, why, and what would help."""
        if ways := self.recommended:
            rough = [] if self.tokens >= FEW_TOKENS else [
                f"These shares are of {self.tokens:,} tokens alone, and rough: give more prompts before relying on "
                "them."]
            return "\n".join([*map(_told, ways), *rough])
        best = max(itertools.chain(*self._worth_trying()), key=lambda way: way.bound_speed, default=None)
        if best is not None and best.bound_speed >= PAYS:
            return (f"none: the early layers of {self.model} speak, but here, in batches of {self.batch_size}, no exit "
                    f"is expected to make decoding {PAYS:g} times as fast. On a device bound by memory\n"
                    f"{_told(dataclasses.replace(best, speed=best.bound_speed))}")
        hopeful = [said for said in self.layers if said.pays_from is not None]
        if not hopeful:
            return (f"none: here not even drafts of {self.model} that are always right would make decoding {PAYS:g} "
                    "times as fast.")
        right = {said.layer: self.best_drafting(said.layer).acceptance for said in hopeful}
        least = {said.layer: max(said.pays_from, LOW_ACCEPTANCE) for said in hopeful}
        near = max(least, key=lambda layer: right[layer] - least[layer])
        said = (f"none: the early layers of {self.model} do not speak. Nearest is layer {near}, whose drafts are right "
                f"in {right[near]:.0%} and worth it from {least[near]:.0%}.\n")
        if not (heads := " ".join(map(str, self.heads()))):
            return (f"{said}Training would hardly help here: after no layer would drafts pay with {REACHED:.0%} of "
                    "them right.")
        model = f"-m {self.model} --data FILE"
        return (f"{said}Train heads for the model as it is, on its own answers to a column of prompts; or the model "
                "itself, on a column of texts:\n"
                f"  sled train --recipe tune-exits --exit-heads {heads} --head-kind block {model} --prompt prompt "
                "--answers 128 --out tuned\n"
                f"  sled train --recipe finetune {model} --text text --out trained")

    def heads(self) -> tuple[int, ...]:
        """Where exit heads may pay: the deepest layer after which drafts pay with half as many right as training has
        come to, so that a head which learns less gains too, and one half as deep. Failing that, the deepest that pays
        with all of them right that training has come to; none where there is no such layer."""
        pays = {said.layer: said.pays_from for said in self.layers if said.pays_from is not None}
        for share in (REACHED / 2, REACHED):
            if paying := [layer for layer, least in pays.items() if least <= share]:
                return tuple(sorted({max(paying), (max(paying) + 1) // 2}))
        return ()

    def save(self, path: str | os.PathLike) -> None:
        """Writes it as one JSON object, with what is recommended and a digest of it all. Raises SettingError where it
        cannot be written."""
        recommended = {type(way).__name__.lower(): dataclasses.asdict(way) for way in self.recommended}
        fields = {"format": FORMAT, **dataclasses.asdict(self), "recommended": recommended}
        written = json.loads(json_text(fields))  # keys are strings then, as they are read
        replace_text("path", path, json_text({**written, "sha256": json_digest(written)}) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Survey:
        """Reads what `save` wrote. Raises CalibrationError for a file that is none, of another format, or changed."""
        path = path_of("path", path, CalibrationError)
        again = "name a file that sled layers wrote by --json, or let it write one anew"
        found = read_object(path, CalibrationError, again)
        digest, names = found.pop("sha256", None), {field.name for field in dataclasses.fields(cls)}
        if found.get("format") != FORMAT or found.keys() != {"format", "recommended", *names}:
            raise CalibrationError(f"{path} is no survey of layers that this version of sled reads, of format {FORMAT}"
                                   f" (its format is {found.get('format', 'not told')}); {again}")
        if digest != json_digest(found):
            raise CalibrationError(f"the survey of layers {path} was changed after it was made; {again}")
        costs = found["costs"] and Costs(**found["costs"] | {
            name: {int(number): seconds for number, seconds in found["costs"][name].items()}
            for name in ("layer_of", "head_of", "own_head")})
        ways = {name: tuple(kind(**row) for row in found[name])
                for name, kind in (("layers", Spoken), ("drafting", Drafting), ("leaving", Leaving))}
        return cls(**{name: found[name] for name in names} | ways | {"costs": costs})


def _told(way: Drafting | Leaving) -> str:
    """A way as Python has it, and what it is expected to give."""
    speed = f"{way.speed:.2f} times plain greedy decoding's speed expected"
    if isinstance(way, Drafting):
        return f"exits={way.written}: {speed}, the same text ({way.acceptance:.0%} of the drafts are right)"
    return (f"exits=sled.EarlyExit({way.layer}, threshold={way.threshold:g}): {speed}, {way.kept:.1%} of the tokens "
            "kept, each judged after the full model's text (sled calibrate bounds what a text loses)")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
