"""A trained classifier on disk: one safetensors file, whose header names the model and the exits it holds for."""

from __future__ import annotations

import json
import os

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sled.errors import CheckpointError, SettingError
from sled.exits.confidence import Classifier, check_classifier
from sled.exits.policy import Exits
from sled.io import made_writable, naming_full_disk, path_of, regular_file, written_whole
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
    path = made_writable("path", path)
    with naming_full_disk(path), written_whole(path) as beside:
        save_file(arrays, beside, metadata={"sled": json.dumps(header)})


def load_classifier(path: str | os.PathLike, lm: LM) -> Classifier:
    """Reads a classifier that `save_classifier` wrote. Raises CheckpointError for a damaged file, and for any model
    but the one it was trained for."""
    path = path_of("path", path, CheckpointError)
    regular_file(path, CheckpointError, "name a file that save_classifier wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads(file.metadata()["sled"])
            weight_ED, bias_E = file.get_tensor("weight_ED"), file.get_tensor("bias_E")
        written, layers = header["format"], tuple(header["layers"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no complete classifier ({error!r}); name a file that save_classifier "
                              "wrote") from None
    if written != FORMAT:
        raise CheckpointError(f"the classifier {path} has format {written!r}, but this version of sled reads format "
                              f"{FORMAT}; train it again")
    now = _model(lm)
    if changed := changes({name: header.get(name) for name in now}, now):
        raise CheckpointError(f"the classifier {path} was trained for another model: {'; '.join(changed)}; load that "
                              "model, or train a classifier for this one")
    classifier = Classifier(weight_ED, bias_E, layers)
    try:
        layers = Exits()("its exits", layers)
        check_classifier("it", classifier, len(layers))
        if weight_ED.shape[1] != lm.config.width or layers != classifier.layers:
            raise SettingError(f"it is for exits {classifier.layers} of a model of width {weight_ED.shape[1]}")
    except SettingError as error:
        raise CheckpointError(f"the classifier {path} is damaged ({error}); copy it again, or train one") from None
    return Classifier(jnp.asarray(weight_ED), jnp.asarray(bias_E), layers)


def _model(lm: LM) -> dict:
    return {"model": describe(lm.config), "weights": lm.weights_digest()}
