"""The three forms of an export, each a function from a source to a folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from flax import nnx

from sled.calibration.record import Calibration
from sled.decoding.options import Decoding
from sled.errors import CheckpointError
from sled.export.card import Card, check_bound, check_surveyed, model_card
from sled.export.program import save_program
from sled.export.source import SourceModel, read_source
from sled.export.target import RECORD, replacing, versions
from sled.io import path_of, write_json
from sled.lm import LM
from sled.models import Decoder, save_folder, save_orbax
from sled.models.digest import digest_of_weights
from sled.models.hub import create_repository, upload
from sled.survey.result import Survey
from sled.text.tokenizer import Tokenizer

NO_WORD = Card()


def export_hf(source: str | os.PathLike, to: str | Path, card: Card = NO_WORD, *,
              heads: Literal["drop", "beside"] | None = None, calibration: str | Path | None = None,
              survey: str | Path | None = None, push: str | None = None, private: bool | None = None,
              **reading) -> str | None:
    """Writes a Hugging Face folder that transformers runs, with a model card; returns the commit's address if pushed.

    heads: what becomes of exit heads, which transformers does not have: "drop" leaves them behind; "beside" keeps them
        in files that only sled reads. None refuses a model that has any.
    calibration: a record of `sled.calibrate` for these weights; it is shown in the card, and its file comes along.
    survey: a survey of `sled.layers` for these weights (`Survey.save`, `sled layers --json`): the card shows it, and
        drafts as it recommends, or nowhere.
    push: a repository of the hub to upload the folder to, "owner/name", made (`private` or not) where there is none.
    reading: step, revision and dtype of `read_source`.

    Raises UploadError where it cannot be pushed, most often before anything is written; CheckpointError for exit heads,
    CalibrationError for a record or a survey of other weights, SettingError; and what `read_source` and `replacing`
    raise.
    """
    with replacing(to) as folder:
        record = None if calibration is None else Calibration.load(calibration)
        surveyed = None if survey is None else Survey.load(survey)
        model = read_source(source, **reading)
        decoder = _without_or_beside(model, heads)
        if record is not None:
            check_bound(record, decoder, model.name)
        if surveyed is not None:
            check_surveyed(surveyed, decoder, model.name)
        repository = None if push is None else create_repository(push, private=private)
        save_folder(decoder, folder, tokenizer_from=model.files)
        written = model_card(card, model, decoder, repository or path_of("to", to).resolve().name, record,
                             surveyed)
        (folder / "README.md").write_text(written, encoding="utf-8")
        if calibration is not None:
            shutil.copyfile(calibration, folder / "calibration.json")
        _write_record(folder, "hf", model, decoder)
    return None if repository is None else upload(path_of("to", to), repository, f"Export of {model.name}")


def export_orbax(source: str | os.PathLike, to: str | Path, **reading) -> None:
    """Writes an Orbax folder, exit heads included, which `sled.load` reads. Otherwise as `export_hf`."""
    with replacing(to) as folder:
        model = read_source(source, **reading)
        save_orbax(model.decoder, folder, tokenizer_from=model.files)
        _write_record(folder, "orbax", model, model.decoder)


def export_program(source: str | os.PathLike, to: str | Path, decoding: Decoding, *, long_context: bool = False,
                   **reading) -> None:
    """Writes a portable program of this decoding (see `sled.export.program`), exit heads included.

    long_context: as for `sled.load`. Otherwise as `export_hf`."""
    with replacing(to) as folder:
        model = read_source(source, **reading)
        decoder = model.decoder.for_long_context() if long_context else model.decoder
        lm = LM(decoder, Tokenizer.from_folder(model.files), name=model.name)
        save_program(lm, folder, decoding, source=model.record())


def _without_or_beside(model: SourceModel, heads: str | None) -> Decoder:
    settings = model.decoder.config.exit_heads
    if settings is not None and heads is None:
        raise CheckpointError(
            f"the exits of {model.name} after layers {', '.join(map(str, settings.layers))} have heads of their own "
            f"({settings.kind}{'' if settings.tied else ', untied'}), which transformers cannot run; leave them behind "
            "by --heads drop (early exits then share the final norm and projection), keep them in files that only sled "
            "reads by --heads beside, or choose --form orbax or program, which hold them")
    return model.decoder.with_exit_heads(None) if settings is not None and heads == "drop" else model.decoder


def _write_record(folder: Path, form: str, model: SourceModel, decoder: Decoder) -> None:
    about: dict[str, Any] = {
        "form": form, **model.record(), "weights_sha256": digest_of_weights(nnx.state(decoder)),
        "versions": versions()}
    write_json(folder / RECORD, about)
