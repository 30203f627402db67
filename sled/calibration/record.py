"""`Calibration`: the record of a calibrated threshold, bound to what it was calibrated for."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import sled.exits as our
from sled.calibration.fingerprint import fingerprint
from sled.calibration.learn_then_test import DELTA, EPSILON, descending, last_rejected
from sled.decoding.options import FULL_DEPTH, Decoding
from sled.errors import CalibrationError, SettingError
from sled.exits import Policy, Schedule
from sled.io import json_digest, json_text, path_of, read_object, replace_text
from sled.lm import LM
from sled.settings.brief import brief
from sled.settings.describe import changes
from sled.settings.rules import Instance, Number, OrNone, Whole

FORMAT = 1  # of the file; a reader refuses those that it does not know
AGAIN = "calibrate again (sled.calibrate, or the command `sled calibrate`)"


@dataclasses.dataclass(frozen=True)
class Step:
    """One threshold that was tried.

    mean_loss: over the prompts; p_value: of "the expected loss is more than delta"; mean_depth: mean over the new
    tokens of the layer that emitted them.
    """

    threshold: float
    mean_loss: float
    p_value: float
    mean_depth: float


@brief
@dataclasses.dataclass(frozen=True)
class Calibration:
    """A threshold with its guarantee: over the draw of the calibration prompts, with probability 1 - epsilon or more,
    the expected loss of another prompt from the same source is at most delta.

    threshold: the one to serve with, or None: no threshold of the grid could be shown to be safe enough.
    delta, epsilon, loss: what was asked for, and the name of the loss.
    prompts: how many were used. grid: the thresholds that might have been tried, descending; steps: those that were,
        down to the first that failed.
    full_depth: the model's layers, with which `mean_depth` of a step compares.
    serving: what the guarantee holds for, as `fingerprint` writes it.
    model: the model's name; seed, batch_size: of the calibration runs; date, versions, hardware: of the calibration.
        All of these are for the reader, and not compared.
    """

    threshold: float | None
    delta: float
    epsilon: float
    loss: str
    prompts: int
    grid: tuple[float, ...]
    steps: tuple[Step, ...]
    full_depth: int
    serving: dict[str, Any]
    model: str
    seed: int
    batch_size: int
    date: str
    versions: dict[str, str]
    hardware: str

    def policy(self, lm: LM, exits: Policy | None = None, **decoding) -> Policy:
        """The early exit with the calibrated threshold, to be given to `lm.generate` with these very settings.

        Where no threshold was safe enough, it is the policy under which no token leaves early.

        lm: the model to serve, all of whose weights are read once to compare them.
        exits: the policy meant, its threshold aside; left out, it is the record's own.
        decoding: the other fields of `sled.Decoding`.

        Raises CalibrationError, with every difference, where anything is not as it was calibrated.
        """
        exits = self._rebuilt("exits") if exits is None else exits  # the record's own has the default threshold
        if changed := changes(self.serving, fingerprint(lm, Decoding(exits=exits, **decoding))):
            raise CalibrationError(f"this calibration does not hold here: {'; '.join(changed)}; "
                                   f"serve what was calibrated, or {AGAIN}")
        return FULL_DEPTH if self.threshold is None else exits.with_threshold(self.threshold)

    @property
    def schedule(self) -> Schedule:
        """The schedule it was calibrated with."""
        return self._rebuilt("schedule")

    def save(self, path: str | os.PathLike) -> None:
        """Writes the record as JSON, with a digest of itself. Raises SettingError where it cannot be written."""
        written = {"format": FORMAT, **dataclasses.asdict(self)}
        replace_text("path", path, json_text({**written, "sha256": json_digest(written)}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Reads a record that `save` wrote.

        The digest shows damage and edits. It is no signature: who can write the file can write another digest.
        Raises CalibrationError for a file that is not complete, not a record of this format, or was changed.
        """
        path = path_of("path", path, CalibrationError)
        found = read_object(path, CalibrationError, f"name a calibration that is whole, or {AGAIN}")
        if "format" not in found:
            raise CalibrationError(f"{path} is no calibration, which is a JSON object with a format; "
                                   "name a file that `Calibration.save` or `sled calibrate` wrote")
        if found["format"] != FORMAT:
            raise CalibrationError(f"the calibration {path} has format {found['format']!r}, but this version of sled "
                                   f"reads format {FORMAT}; read it with the version that wrote it, or {AGAIN}")
        names = {"format", "sha256", *(f.name for f in dataclasses.fields(cls))}
        if found.keys() != names or found.pop("sha256") != json_digest(found):
            raise CalibrationError(f"the calibration {path} was changed after it was made: its digest does not fit, "
                                   f"and its guarantee is void; restore the file, or {AGAIN}")
        del found["format"]
        try:
            return _checked(cls(**{**found, "grid": descending(found["grid"]),
                                   "steps": tuple(Step(**step) for step in found["steps"])}))
        except (TypeError, SettingError) as reason:
            raise CalibrationError(f"the calibration {path} is none that sled made, though its digest fits ({reason}); "
                                   f"{AGAIN}") from None

    def table(self) -> str:
        """The steps, one a line, the chosen one marked."""
        lines = ["  threshold  mean loss   p-value  mean depth"]
        for step in self.steps:
            mark = "<- chosen" if step.threshold == self.threshold else "" if step.p_value <= self.epsilon else "fails"
            lines.append(f"{step.threshold:11.4g}  {step.mean_loss:9.4f}  {step.p_value:8.2g}  "
                         f"{step.mean_depth:10.2f}  {mark}".rstrip())
        return "\n".join(lines)

    def verdict(self) -> str:
        """The choice in words."""
        sure = f"With {100 * (1 - self.epsilon):.6g}% confidence, over the draw of the {self.prompts} prompts,"
        if self.threshold is None:
            return (f"No early exit: already at {self.steps[0].threshold:g} it cannot be shown that the expected loss "
                    f"({self.loss}) is at most {self.delta:g}. A larger delta, more prompts or a grid that begins "
                    "higher may help.")
        depth = next(step.mean_depth for step in self.steps if step.threshold == self.threshold)
        end = ("the whole grid passed, so a lower threshold may pass too" if self.steps[-1].p_value <= self.epsilon
               else f"{self.steps[-1].threshold:g} is the first that does not pass")
        return (f"{sure} the expected loss ({self.loss}) at threshold {self.threshold:g} is at most {self.delta:g}; "
                f"{end}. Tokens left at layer {depth:.2f} of {self.full_depth} on average.")

    def _rebuilt(self, name: str):
        """Settings of `serving` as an object. Raises CalibrationError where the record does not hold all of them."""
        fields = dict(self.serving[name])
        kind = fields.pop("kind").rpartition(".")[2]
        arrays = [field for field, value in fields.items() if isinstance(value, dict)]
        if arrays:
            raise CalibrationError(f"the record holds only a digest of {kind}.{arrays[0]}; give the very settings, "
                                   f"as {name}=sled.{kind}(..., {arrays[0]}=...)")
        try:
            return vars(our)[kind](**fields)
        except (TypeError, KeyError, SettingError) as reason:
            raise CalibrationError(f"the calibrated {name} has a class or settings that this version of sled lacks "
                                   f"({reason}); give the very settings as {name}=..., use the version that made it, "
                                   f"or {AGAIN}") from reason


_TEXT, _TABLE = (Instance(kind, traced=False, hint="it is for the reader") for kind in (str, dict))
_COUNT, _FINITE = Whole(0, hint="it counts"), Number(hint="it was measured")
_FIELDS = dict(threshold=OrNone(_FINITE), delta=DELTA, epsilon=EPSILON, loss=_TEXT, prompts=Whole(1, hint="it counts"),
               full_depth=Whole(1, hint="it counts"), serving=_TABLE, model=_TEXT, seed=_COUNT, batch_size=_COUNT,
               date=_TEXT, versions=_TABLE, hardware=_TEXT)


def _checked(record: Calibration) -> Calibration:
    """A record that was read. Raises SettingError for values that no calibration has, or that contradict each other."""
    for name, rule in _FIELDS.items():
        rule(name, getattr(record, name))
    for name in ("exits", "schedule"):
        _TEXT(f"serving.{name}.kind", _TABLE(f"serving.{name}", record.serving.get(name)).get("kind"))
    for n, step in enumerate(record.steps):
        for field, value in vars(step).items():
            _FINITE(f"steps[{n}].{field}", value)
    tried = tuple(step.threshold for step in record.steps)
    if not tried or tried != record.grid[:len(tried)]:
        raise SettingError(f"steps are at {tried}, but must be those of grid, from its first on; they are its walk")
    if record.threshold not in (None, chosen := last_rejected(record.steps, record.epsilon)):  # none is always safe
        raise SettingError(f"threshold is {record.threshold}, but its steps choose {chosen}; they decide")
    return record
