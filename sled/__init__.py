"""sled: every layer of a language model speaks through the model's own final projection.

    import sled
    lm = sled.load("demo")
    out = lm.generate(["Question: ..."], fusion=sled.SLED(rate=2.0, scale=10))

Names are imported when first used: `import sled` alone loads neither jax nor flax.
"""

from __future__ import annotations

import importlib

from sled import _versions

_HOME = {
    "load": "sled.loading",
    "LM": "sled.lm",
    "Output": "sled.lm",
    "Scores": "sled.lm",
    "Lens": "sled.lens.lens",
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
                     "CalibrationError", "RequestError", "DataError", "DownloadError",
                     "EvaluationError"), "sled.errors"),
}
__all__ = list(_HOME)

_versions.check_installed()


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sled' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_HOME])
