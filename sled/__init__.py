"""sled: every layer of a language model speaks through the model's own final projection.

    import sled
    lm = sled.load("demo")
    out = lm.generate(["Question: ..."], fusion=sled.SLED(rate=2.0, scale=10))

Names are imported when first used: `import sled` alone loads neither jax nor flax.
"""

from __future__ import annotations

import importlib
import importlib.metadata

from sled.errors import VersionError

_HOME = {
    "load": "sled.loading",
    "LM": "sled.lm",
    "Output": "sled.lm",
    "Scores": "sled.lm",
    "Lens": "sled.lens.lens",
    "lens": "sled.lens",
    "Engine": "sled.serving.engine",
    "Limits": "sled.serving.request",
    "Calibration": "sled.calibration.record",
    "Sampling": "sled.decoding.sampling",
    "Decoding": "sled.decoding.options",
    "calibrate": "sled.calibration.calibrate",
    "tune": "sled.calibration.tune",
    "SLED": "sled.fusion",
    "DoLa": "sled.fusion",
    "ConfidentDecoding": "sled.fusion",
    "LayerAverage": "sled.fusion",
    "ClampOnly": "sled.fusion",
    "FinalLayer": "sled.fusion",
    "EarlyExit": "sled.exits",
    "SelfSpeculation": "sled.exits",
    "Classifier": "sled.exits",
    "save_classifier": "sled.calibration.classifier_file",
    "load_classifier": "sled.calibration.classifier_file",
    "Immediate": "sled.exits",
    "Lockstep": "sled.exits",
    "Gather": "sled.exits",
    **dict.fromkeys(("SledError", "SettingError", "PromptError", "TokenizerError", "CheckpointError", "ConfigError",
                     "CalibrationError", "RequestError", "DataError", "DownloadError", "TrainingError",
                     "EvaluationError", "VersionError"), "sled.errors"),
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sled' has no attribute {name!r}; it has {', '.join(_HOME)}")
    home = importlib.import_module(_HOME[name])
    value = home if _HOME[name] == f"sled.{name}" else getattr(home, name)  # a folder of functions, or one of its names
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_HOME])


# First jax and flax versions of each era, oldest first: a flax below its era's does not run on that jax.
_ERAS = (((0, 10, 2), (0, 12, 8)), ((0, 11, 1), (0, 12, 9)))
_REMEDY = ("pip install -U 'jax>=0.11.1' 'flax>=0.12.9' on Python 3.12 or later, "
          "'jax==0.10.2' 'flax==0.12.8' on Python 3.11")


def _check_versions(jax_version: str, flax_version: str) -> None:
    """Raises VersionError unless the two versions are a pair this library runs on."""
    jax, flax = _numbers(jax_version), _numbers(flax_version)
    needed = [need for first, need in _ERAS if jax >= first]
    if not needed:
        raise VersionError(f"jax {jax_version} is too old: this library needs 0.10.2 or later. {_REMEDY}")
    if flax < needed[-1]:
        raise VersionError(f"flax {flax_version} does not fit jax {jax_version}: they move in pairs. {_REMEDY}")


def _check_installed() -> None:
    """jax and flax move in pairs; a pair that does not fit fails deep inside flax. Say so at import."""
    try:
        _check_versions(importlib.metadata.version("jax"), importlib.metadata.version("flax"))
    except importlib.metadata.PackageNotFoundError as missing:
        raise VersionError(f"{missing.name} is not installed. {_REMEDY}") from None


def _numbers(version: str) -> tuple[int, ...]:
    digits = ["".join(c for c in part if c.isdigit()) for part in version.split(".")[:3]]
    return tuple(int(d or 0) for d in digits)


_check_installed()
