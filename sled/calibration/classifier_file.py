"""A trained classifier on disk: one safetensors file, whose header names the model and the exits it holds for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sled.calibration.fingerprint import digest_of_weights
from sled.errors import CheckpointError
from sled.exits.confidence import Classifier
from sled.io import made_writable
from sled.lm import LM
from sled.settings.describe import changes, describe

FORMAT = 1


def save_classifier(classifier: Classifier, path: str | os.PathLike, lm: LM) -> None:
    """Writes a classifier that was trained for `lm`, all of whose weights are read once for their digest.

    Raises CheckpointError where it does not say for which exits it is, SettingError where the path cannot be written.
    """
    if classifier.layers is None:
        raise CheckpointError("the classifier does not say for which exits it is; give Classifier(..., layers=...)")
    header = {"format": FORMAT, "layers": list(classifier.layers), **_model(lm)}
    arrays = {"weight_ED": np.asarray(classifier.weight_ED), "bias_E": np.asarray(classifier.bias_E)}
    save_file(arrays, made_writable("path", Path(path)), metadata={"sled": json.dumps(header)})


def load_classifier(path: str | os.PathLike, lm: LM) -> Classifier:
    """Reads a classifier that `save_classifier` wrote. Raises CheckpointError for a damaged file, and for any model
    but the one it was trained for."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads(file.metadata()["sled"])
            weight_ED, bias_E = file.get_tensor("weight_ED"), file.get_tensor("bias_E")
        written, layers = header["format"], tuple(header["layers"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no complete classifier ({error!r}); name a file that save_classifier "
                              "wrote") from None
    if written != FORMAT:
        raise CheckpointError(f"the classifier {path} has format {written!r}, but this version of sled reads format "
                              f"{FORMAT}; train it again")
    now = _model(lm)
    if changed := changes({name: header.get(name) for name in now}, now):
        raise CheckpointError(f"the classifier {path} was trained for another model: {'; '.join(changed)}; load that "
                              "model, or train a classifier for this one")
    if weight_ED.shape != (len(layers), lm.config.width) or bias_E.shape != (len(layers),) or not (
            np.isfinite(weight_ED).all() and np.isfinite(bias_E).all()):
        raise CheckpointError(f"the classifier {path} is damaged: its weights have other shapes than its exits, or are "
                              "not finite; copy it again, or train one")
    return Classifier(jnp.asarray(weight_ED), jnp.asarray(bias_E), layers)


def _model(lm: LM) -> dict:
    return {"model": describe(lm.config), "weights": digest_of_weights(lm.params)}
