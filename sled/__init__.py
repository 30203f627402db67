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
    "Chat": "sled.text.chat",
    "Sampling": "sled.decoding.sampling",
    "Decoding": "sled.decoding.options",
    "Mesh": "sled.models.sharding.mesh",
    "calibrate": "sled.calibration.calibrate",
    "tune": "sled.calibration.tune",
    "layers": "sled.survey.survey",
    "Classifier": "sled.exits",
    "save_classifier": "sled.calibration.classifier_file",
    "load_classifier": "sled.calibration.classifier_file",
    **dict.fromkeys(("SledError", "SettingError", "PromptError", "TokenizerError", "TemplateError", "CheckpointError",
                     "ConfigError", "CalibrationError", "RequestError", "DataError", "DownloadError", "UploadError",
                     "TrainingError", "EvaluationError", "VersionError", "OutOfMemoryError"), "sled.errors"),
}
_REGISTERS = (("sled.fusion", "FUSIONS"), ("sled.exits", "POLICIES"), ("sled.exits", "SCHEDULES"))  # classes by word


def __getattr__(name: str):
    if name == "__all__":
        return [*_HOME, *_registered()]
    if name in _HOME:
        home = importlib.import_module(_HOME[name])
        # A folder of functions, or one of its names.
        value = home if _HOME[name] == f"sled.{name}" else getattr(home, name)
    elif not name.startswith("_") and name in (registered := _registered()):
        value = registered[name]
    else:
        known = [] if name.startswith("_") else [*_HOME, *_registered()]
        raise AttributeError(f"module 'sled' has no attribute {name!r}; it has {', '.join(known)}")
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_HOME, *_registered()])


def _registered() -> dict[str, type]:
    """The registered fusions, policies and schedules by name."""
    registers = (getattr(importlib.import_module(home), register) for home, register in _REGISTERS)
    return {kind.__name__: kind for register in registers for kind in register.values()}


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
