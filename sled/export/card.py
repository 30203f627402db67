"""The model card of an exported folder: what was measured and where it came from, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from huggingface_hub import ModelCardData

from sled.calibration.record import Calibration
from sled.errors import CalibrationError, SettingError
from sled.export.source import SourceModel, cast
from sled.models import Decoder
from sled.models.config import WEIGHT_TYPES
from sled.models.decoder import ARITHMETIC
from sled.models.digest import digest_of_weights
from sled.models.families.family import Family
from sled.models.families.registry import family_of
from sled.settings.decorator import setting, settings
from sled.settings.describe import changes, describe
from sled.settings.rules import Number
from sled.survey.result import Drafting, Survey

DTYPES = (None, *WEIGHT_TYPES)  # in which a model may have been loaded to be calibrated


@settings
class Card:
    """The statements of a card on the word of whoever exports."""

    license: str | None = setting(default=None, help='such as "apache-2.0"; None is unknown')
    base: str | None = setting(default=None, help="hub id of the model that this one was trained from")
    margin: float = setting(Number(0, 1, hint="0.02 is usual"), default=0.02, help=(
        "how far a recommended exit's held-out accuracy may be below the last layer's"))

    def __post_init__(self):
        for field in ("license", "base"):
            value = getattr(self, field)
            if value is not None and not value.strip():
                raise SettingError(f"Card.{field} is empty; leave it out where it is not known")


BUNDLED = "the model bundled with sled"
LEAST = 0.25  # the accuracy below which a last layer knows little more than which tokens are frequent
BY_HEADS = ("Layers with exit heads are not among them: they were measured through these, which transformers does not "
            "have. ")


class Measured(NamedTuple):
    """Held-out figures of the layers 1..L: nats per token, and the share of tokens that are the most likely ones."""

    loss_L: list[float]
    accuracy_L: list[float]

    def within(self, margin: float, without: Collection[int] = ()) -> list[int]:
        """Layers before the last, none of `without`, whose accuracy is at most `margin` below the last's, ascending.

        None where the last layer's is below `LEAST`: all layers are near one that knows next to nothing.
        """
        least = self.accuracy_L[-1] - margin if self.accuracy_L[-1] >= LEAST else 1
        return [n for n, accuracy in enumerate(self.accuracy_L[:-1], 1) if accuracy >= least and n not in without]


def measured(run: Path, step: int) -> Measured | None:
    """The held-out figures that the run wrote at this very step, or None where it wrote none."""
    from sled.train.run.metrics import HELD_OUT, read_metrics

    file = Path(run) / "metrics.jsonl"
    line = next((line for line in read_metrics(file) if line["step"] == step), {}) if file.is_file() else {}
    found = Measured(line.get(HELD_OUT, []), line.get("held_out_accuracy", []))
    numbers = found.loss_L and found.accuracy_L and all(
        isinstance(value, float) for value in (*found.loss_L, *found.accuracy_L))
    return found if numbers else None


def check_bound(record: Calibration, decoder: Decoder, name: str) -> None:
    """Raises CalibrationError unless the record is of these weights, in whatever type they were loaded."""
    bound = {"model": describe(decoder.config), "arithmetic": ARITHMETIC}
    changed = changes({name: record.serving.get(name) for name in bound}, bound)
    if not changed and not _is_digest_of(decoder, record.serving.get("weights")):
        changed = ["weights have another digest"]
    if changed:
        raise CalibrationError(f"the calibration is of {record.model} and does not belong to {name}: "
                               f"{'; '.join(changed)}; calibrate this model (sled calibrate), or leave it out")


def check_surveyed(survey: Survey, decoder: Decoder, name: str) -> None:
    """Raises CalibrationError unless the survey is of these weights, in whatever type they were loaded."""
    if not _is_digest_of(decoder, survey.weights):
        raise CalibrationError(f"the survey of layers is of {survey.model} and does not belong to {name}: weights have "
                               "another digest; survey this model (sled layers --json), or leave it out")


def _is_digest_of(decoder: Decoder, digest: Any) -> bool:
    weights = nnx.state(decoder)
    return any(digest == digest_of_weights(cast(weights, dtype)) for dtype in DTYPES)


def model_card(card: Card, model: SourceModel, decoder: Decoder, name: str, calibration: Calibration | None,
               survey: Survey | None = None) -> str:
    """The README.md of a folder `name` with this decoder, which is the one given or that without its exit heads.

    Drafts are recommended as the survey does, or, without one, by held-out accuracy.
    """
    has_text = (model.files / "tokenizer.json").is_file()
    found = None if model.run is None else measured(model.run, model.step)
    front = ModelCardData(license=card.license or "unknown", library_name="transformers",
                          pipeline_tag="text-generation", tags=["sled", "early-exit"],
                          base_model=card.base or model.hub_id)
    heads = model.decoder.config.exit_heads
    recommended = found.within(card.margin, without=() if heads is None else heads.layers) if found else []
    parts = [f"---\n{front.to_yaml()}\n---", f"# {name}", _origin(model, decoder, card.base)]
    if decoder.config.exit_heads is not None:
        parts.append("Its early exits have heads of their own, in `exit_heads.safetensors`, which only sled reads: to "
                     "transformers the exits share the final norm and projection.")
    elif model.decoder.config.exit_heads is not None:
        parts.append("The model that this was exported from had heads at its early exits; they were left behind.")
    parts += [_training(model.settings)] if model.run else []
    drafts = f"{recommended[0]}" if recommended else None
    if survey is not None:
        drafting = [way for way in survey.recommended if isinstance(way, Drafting)]
        drafts = f"{drafting[0].layer}, draft={drafting[0].draft}" if drafting else None
    parts += [_layers(found, recommended, card.margin, model) if survey is None else _surveyed(survey),
              _use(name, drafts, has_text, family_of(decoder.config))]
    if calibration is not None:
        parts.append(_calibration(calibration))
    return "\n\n".join(parts) + "\n"


def _origin(model: SourceModel, decoder: Decoder, base: str | None) -> str:
    c, count = decoder.config, sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder)))
    dtype = decoder.embedding.weight.dtype.name
    shape = f"A {c.family} model of {c.num_layers} layers, {c.width} wide, {count:,} parameters ({dtype})."
    if model.run is None:
        of = BUNDLED if model.name == "demo" else f"`{model.name}`"
        return f"{shape} Exported from {of}{f' at {model.revision}' if model.revision else ''}."
    origin = model.settings["model"]
    known = {"new": "random weights", "demo": BUNDLED}
    begun = f"`{base}`" if base else known.get(origin["name"]) or f"a model whose digest was {origin['digest'][:16]}"
    return f"{shape} Trained by `sled train` for {model.step} steps, from {begun}."


def _training(settings: dict[str, Any]) -> str:
    """The data and the recipe of a run. Of a file elsewhere on the machine that trained there is but the name."""

    def data(source: dict[str, Any]) -> str:
        names = [Path(name).name if Path(name).is_absolute() else name for name in source["name"].split(", ")]
        how = {field: value for field, value in source.items() if field not in ("name", "digest", "context")}
        return f"`{', '.join(names)}` ({_in_words(how)}; SHA-256 of what was read {source['digest'][:16]})"

    held_out = settings["held_out"]
    return "\n\n".join(["## Training", f"Data: {data(settings['data'])}.",
                        f"Held out: {data(held_out) if held_out else 'nothing'}.",
                        f"{_in_words(settings['recipe'])}; weight of prompts {settings['prompt_weight']:g}."])


def _in_words(described: Any) -> str:
    """What `sled.settings.describe` wrote, but for what is None: "Recipe (steps 9, exits LastOnly, ...)"."""
    if isinstance(described, dict):
        kind = described.get("kind", "").rpartition(".")[2]
        fields = ", ".join(f"{field.replace('_', ' ')} {_in_words(value)}" for field, value in described.items()
                           if field != "kind" and value not in (None, []))
        return f"{kind} ({fields})" if kind and fields else kind or fields
    if isinstance(described, list):
        return " ".join(map(_in_words, described))
    if isinstance(described, float):
        return f"{described:g}"
    return str(described) if re.fullmatch(r"[\w.-]*", str(described)) else f"`{described!r}`"


def _layers(found: Measured | None, good: list[int], margin: float, model: SourceModel) -> str:
    if found is None:
        why = ("no training run came with it" if model.run is None else
               f"its run measured no held-out data at step {model.step}")
        return f"## Layers\n\nHow well the early layers speak was not measured: {why}. No exit is recommended."
    heads = model.decoder.config.exit_heads
    rows = [f"| {n} | {loss:.4f} | {accuracy:.4f} |" for n, (loss, accuracy) in enumerate(zip(*found, strict=True), 1)]
    through = ", by its exit head where it has one" if heads else " through the final norm and projection"
    what = f"What each layer says{through}, on the run's held-out data (step {model.step}):"
    advice = (f"Here: {', '.join(map(str, good))}; the shallowest, {good[0]}, is the first to try." if good else
              "Here there is none.")
    if found.accuracy_L[-1] < LEAST:
        advice = (f"Here there is none: the last layer's own is below {LEAST:g}, and to be near it says nothing.")
    return "\n".join([
        "## Layers", "", what, "",
        "| layer | loss, nats per token | accuracy |", "|---|---|---|", *rows, "",
        "Accuracy is the share of tokens that the layer finds most likely, given all before them. Recommended as exits "
        f"are layers whose accuracy is at most {margin:g} below the last layer's. {advice} "
        f"{'' if heads is None else BY_HEADS}That is no promise about generated text; calibrate a threshold for it."])


def _surveyed(survey: Survey) -> str:
    """What `sled.layers` found, and recommends."""
    rows = []
    for said in survey.layers:
        way = survey.best_drafting(said.layer)
        rows.append(f"| {said.layer} | {said.agreement:.4f} | {said.calibration_error:.4f} | {way.draft} | "
                    f"{way.acceptance:.4f} | {way.speed:.2f} |")
    where = f"batch {survey.batch_size} on {survey.hardware}" if survey.costs else "a device bound by memory"
    return "\n".join([
        "## Layers", "", f"What each layer says along the model's own greedy answers to {survey.prompts} prompts "
        f"({survey.tokens} tokens; `sled layers`, {survey.date[:10]}):", "",
        "| layer | agrees with the last | calibration error | draft length | drafts accepted | expected speed |",
        "|---|---|---|---|---|---|", *rows, "",
        "Speeds are expected ones, as multiples of plain greedy decoding's, of the best draft length after each layer, "
        f"for {where}.", "", "```", survey.verdict(), "```"])


def _use(name: str, drafts: str | None, has_text: bool, family: Family) -> str:
    """Code that runs as it stands, where the folder, or the hub's repository, of that name is found.

    drafts: the arguments of `sled.SelfSpeculation`, its layer first, or None.
    """
    what, ours, theirs = "The model decodes as any other.", "", ""
    if drafts:
        layer = drafts.partition(",")[0]
        what = (f"Layer {layer} drafts and all layers verify, so the text stays theirs (in bfloat16 but for "
                "near ties, which a block of drafts may round otherwise).")
        ours, theirs = f", exits=sled.SelfSpeculation({drafts})", f", assistant_early_exit={layer}"
        if not family.early_exit:
            what += f" transformers' class of {family.name} models has no early exit: there all layers run."
            theirs = ""
    prompt, shown = '"The capital of France is"', "out.texts[0]"
    imports, decoded = "from transformers import AutoModelForCausalLM, AutoTokenizer", "tokenizer.decode(out[0])"
    inputs = f'tokenizer = AutoTokenizer.from_pretrained("{name}")\ninputs = tokenizer(prompt, return_tensors="pt")'
    if not has_text:
        prompt, shown = "[1, 2, 3]  # token ids: the folder has no tokenizer", "out.tokens[0]"
        imports, decoded = "import torch\nfrom transformers import AutoModelForCausalLM", "out[0].tolist()"
        inputs = 'inputs = {"input_ids": torch.tensor([prompt])}'
    return f"""## Use

{what} With sled:

```python
import sled

lm = sled.load("{name}")
prompt = {prompt}
out = lm.generate(prompt, max_new_tokens=64{ours})
print({shown})
```

With transformers:

```python
{imports}

model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = {prompt}
{inputs}
out = model.generate(**inputs, max_new_tokens=64, do_sample=False{theirs})
print({decoded})
```"""


def _calibration(record: Calibration) -> str:
    return f"""## Calibrated early exit

{record.verdict()}

```
{record.table()}
```

Calibrated on {record.date} on {record.prompts} prompts ({record.hardware}). It holds for these weights (SHA-256
{record.serving["weights"]}), these settings and prompts from the same source;
`sled.Calibration.load("calibration.json").policy(lm, ...)` gives the exits, and refuses anything else."""
