"""Every error this library raises on purpose, by name.

A message says what was wrong (with the value), why it cannot be, and what to do.
All of them derive from `SledError`, which the command line prints in one line.
"""

import sys
import warnings


class SledError(Exception):
    """Base of every error raised on purpose by this library."""


class VersionError(SledError, ImportError):
    """The installed jax and flax do not fit each other."""


class SettingError(SledError, ValueError):
    """A setting (rate, scale, temperature, layer index, ...) is out of its range."""


class PromptError(SledError, ValueError):
    """A prompt or continuation cannot be used: empty, too long, or with unknown token ids."""


class TokenizerError(SledError):
    """Text was given or asked for, but the model has no (usable) tokenizer."""


class TemplateError(SledError, ValueError):
    """A model has no chat template, or its template cannot be read, refuses the messages, never ends or fills the
    memory."""


class ConfigError(SledError, ValueError):
    """A model configuration has an unknown architecture, field or value."""


class CheckpointError(SledError):
    """Weights are missing, surplus, misshaped, damaged or not finite; or a training run's files are, or cannot be
    written, or are of a run with other settings."""


class DownloadError(SledError, OSError):
    """A model or data set could not be fetched from the hub."""


class UploadError(SledError, OSError):
    """A model could not be put on the hub: nobody is logged in, the repository is another's, or there is no network."""


class DataError(SledError, ValueError):
    """Data to train or to evaluate on are missing, damaged, lack a column, or leave nothing to work on."""


class TrainingError(SledError):
    """A training run cannot go on: its loss or gradient is not finite."""


class EvaluationError(SledError, ValueError):
    """An evaluation cannot be run as asked: an unknown task, settings a task or model cannot take, no chat template."""


class CalibrationError(SledError, ValueError):
    """A calibration cannot be made of these losses, or its record is damaged or made for something else."""


class RequestError(SledError):
    """A request is beyond what the operator allows, or failed while it was served."""


class OutOfMemoryError(SledError, MemoryError):
    """The device's memory, or the host's, does not suffice for what was asked, or did not when it was tried."""


class SledWarning(UserWarning):
    """Base of every warning of this library, which the command line prints in one line."""


def warn(message: str, kind: type[SledWarning]) -> None:
    """Warns at the user's line that called this library: Python then shows it, and once for each such line."""
    frame, level, here = sys._getframe(1), 2, 2
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("sled."):
            here = level + 1
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=here)


class CheckpointWarning(SledWarning):
    """Something that a model's folder holds was passed over: what its family does not know, so that it cannot matter,
    or a sampling of its own where none was asked for."""


class DecodingWarning(SledWarning):
    """Drafts that are nearly always wrong make decoding slower; or the model's context ended texts."""


class EvaluationWarning(SledWarning):
    """A sweep is about to measure what it cannot judge: too few questions, or none that the model solves."""
