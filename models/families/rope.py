"""The rotary positions of a `config.json`, in both its spellings, and back."""

from __future__ import annotations

from collections.abc import Mapping

from sled.errors import ConfigError
from sled.io import shorten
from sled.models.families.family import FLOAT32_MAX, REQUIRED, Fields
from sled.models.positions import LinearScaling, Llama3Scaling, Rope

LEAST = 1e-12  # of the numbers of rotary positions; published ones go from 1 to 1e8
BESIDE = "original_max_position_embeddings"
ONE_VALUE: Mapping[str, tuple] = {
    "partial_rotary_factor": (1, None),
    "full_attention": (None,),  # positions of their own for each kind of layer
    "sliding_attention": (None,),
}


def read_rope(f: Fields, max_positions: int, theta: float = 10_000.0) -> Rope:
    """`rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before), or both alike.

    Versions of transformers disagree on which of the two wins, so a contradiction is refused.
    """
    spellings = {name: f.take(name, dict, None) or {} for name in ("rope_parameters", "rope_scaling")}
    given = {"rope_theta": f.take("rope_theta", float, None), BESIDE: f.take(BESIDE, int, None)}
    return _rope_of(f, _merged(f.source, given, *spellings.values()), max_positions, theta)


def read_ropes(f: Fields, max_positions: int, theta: float, local_theta: float) -> tuple[Rope, Rope]:
    """Those of layers that see all positions and those of layers with a window (Gemma 3).

    `rope_parameters` has an object for each; before, `rope_theta` and `rope_scaling` were of the first,
    `rope_local_base_freq` of the second.
    """
    both = f.take("rope_parameters", dict, None) or {}
    kinds = both.keys() & {"full_attention", "sliding_attention"}
    if both and len(kinds) < len(both):
        raise f.refused("rope_parameters", both, "it must have 'full_attention' and 'sliding_attention'; correct the "
                                                 "file")
    full, local = (both.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    scaling = f.take("rope_scaling", dict, None) or {}
    given = {"rope_theta": f.take("rope_theta", float, None), BESIDE: f.take(BESIDE, int, None)}
    given_local = {"rope_theta": f.take("rope_local_base_freq", float, None)}
    return (_rope_of(f, _merged(f.source, given, full, scaling), max_positions, theta),
            _rope_of(f, _merged(f.source, given_local, local), max_positions, local_theta))


def write_rope(rope: Rope) -> dict:
    """Both spellings: transformers 5 reads `rope_parameters`, 4.x the other two."""
    scaling = _scaling(rope)
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": _parameters(rope)}


def write_ropes(rope: Rope, local: Rope) -> dict:
    """The inverse of `read_ropes`."""
    return {"rope_theta": rope.theta, "rope_local_base_freq": local.theta, "rope_scaling": _scaling(rope),
            "rope_parameters": {"full_attention": _parameters(rope), "sliding_attention": _parameters(local)}}


def _parameters(rope: Rope) -> dict:
    return {"rope_type": "default", **(_scaling(rope) or {}), "rope_theta": rope.theta}


def _scaling(rope: Rope) -> dict | None:
    s = rope.scaling
    if isinstance(s, LinearScaling):
        return {"rope_type": "linear", "factor": s.factor}
    if isinstance(s, Llama3Scaling):
        return {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor, BESIDE: s.original_positions}
    return None


def _merged(source: str, given: Mapping, *spellings: Mapping) -> dict:
    """The values of all spellings together. Raises ConfigError where two of them differ."""
    given = dict(given)
    for values in spellings:
        renamed = {"rope_type" if key == "type" else key: value for key, value in values.items()}
        if values.get("type", renamed.get("rope_type")) != renamed.get("rope_type"):
            raise ConfigError(f"{source}: the rope's 'type' is {values['type']!r} but its 'rope_type' is "
                              f"{values['rope_type']!r}; remove the wrong one")
        for key, value in renamed.items():
            if given.get(key) not in (None, value):
                raise ConfigError(f"{source}: '{key}' of the rotary positions is given as {given[key]!r} "
                                  f"and as {value!r}; remove the wrong one")
            given[key] = value
    return given


def _rope_of(f: Fields, given: Mapping, max_positions: int, theta: float) -> Rope:
    rope = Fields(given, f"{f.source}, rotary positions")
    theta = _positive(rope, "rope_theta", theta)
    kind = rope.take("rope_type", str, "default")
    original = rope.take(BESIDE, int, max_positions)
    scaling: LinearScaling | Llama3Scaling | None = None
    if kind == "linear":
        scaling = LinearScaling(factor=_positive(rope, "factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=_positive(rope, "factor"),
            low_freq_factor=_positive(rope, "low_freq_factor"),
            high_freq_factor=_positive(rope, "high_freq_factor"),
            original_positions=original,
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ConfigError(f"{rope.source}: high_freq_factor {scaling.high_freq_factor} must be above "
                              f"low_freq_factor {scaling.low_freq_factor}; correct the file")
    elif kind != "default":
        raise ConfigError(f"{f.source}: rotary scaling {shorten(kind, 60)!r} is not supported (supported: default, "
                          "linear, llama3); use another model")
    f.passed_over += [f"{name} (of the rotary positions)" for name in rope.finish(ONE_VALUE)]
    return Rope(theta, scaling)


def _positive(f: Fields, name: str, default=REQUIRED) -> float:
    value = f.take(name, float, default)
    if not LEAST <= value <= FLOAT32_MAX:  # of 0, infinity or near them, angles are no numbers in float32
        raise ConfigError(f"{f.source}: '{name}' is {value!r}, but it must be above 0, at least "
                          f"{LEAST:g}; correct the file")
    return float(value)
