"""The rotary positions of a `config.json`, in both its spellings, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from sled.errors import ConfigError
from sled.io import shorten
from sled.models.families.family import FLOAT32_MAX, REQUIRED, Fields
from sled.models.positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
    yarn_amplitude,
)

LEAST = 1e-12  # of the numbers of rotary positions; published ones go from 1 to 1e8
BESIDE = "original_max_position_embeddings"
SHARE = "partial_rotary_factor"
ONE_VALUE: Mapping[str, tuple] = {
    SHARE: (1, None),
    "full_attention": (None,),  # positions of their own for each kind of layer
    "sliding_attention": (None,),
}


def read_rope(f: Fields, max_positions: int, theta: float = 10_000.0, *, original: int | None = None,
              partial: bool = False, kinds: Mapping[str, str] | None = None, absent: Mapping | None = None) -> Rope:
    """`rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before), or both alike.

    Versions of transformers disagree on which of the two wins, so a contradiction is refused.

    theta, original: of a file that does not say (None: `max_positions`). partial: whether the family's class lets a
    share of each head turn. kinds: the family's own names of ways to stretch, with the usual ones. absent: the
    `rope_parameters` of a file that has neither them nor `rope_scaling`.
    """
    spellings = {name: f.take(name, dict, None) or {} for name in ("rope_parameters", "rope_scaling")}
    if not any(spellings.values()):
        spellings["rope_parameters"] = absent or {}
    given = {"rope_theta": f.take("rope_theta", float, None), BESIDE: f.take(BESIDE, int, original)}
    if partial:
        given[SHARE] = f.take(SHARE, float, None)
    return _rope_of(f, _merged(f.source, given, *spellings.values()), max_positions, theta, partial, kinds or {})


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
    """Both spellings: transformers 5 reads `rope_parameters`, 4.x the others."""
    share = {} if rope.share == 1 else {SHARE: rope.share}
    return {"rope_theta": rope.theta, "rope_scaling": _scaling(rope), "rope_parameters": _parameters(rope) | share,
            **share}


def write_ropes(rope: Rope, local: Rope) -> dict:
    """The inverse of `read_ropes`."""
    return {"rope_theta": rope.theta, "rope_local_base_freq": local.theta, "rope_scaling": _scaling(rope),
            "rope_parameters": {"full_attention": _parameters(rope), "sliding_attention": _parameters(local)}}


def _parameters(rope: Rope) -> dict:
    return {"rope_type": "default", **(_scaling(rope) or {}), "rope_theta": rope.theta}


def _scaling(rope: Rope) -> dict | None:
    if rope.scaling is None:
        return None
    s = dataclasses.asdict(rope.scaling)
    s.pop("long_context", None)  # which a model is loaded for, not made for
    written = {"rope_type": next(name for name, way in SCALINGS.items() if way.kind is type(rope.scaling))}
    for name, value in s.items():
        if value is not None:
            name = BESIDE if name == "original_positions" else name
            written[name] = list(value) if isinstance(value, tuple) else value
    return written


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


def _rope_of(f: Fields, given: Mapping, max_positions: int, theta: float, partial: bool = False,
             kinds: Mapping[str, str] = MappingProxyType({})) -> Rope:
    rope = Fields(given, f"{f.source}, rotary positions")
    theta = _positive(rope, "rope_theta", theta)
    kind = rope.take("rope_type", str, "default")
    kind = kinds.get(kind, kind)
    share = _positive(rope, SHARE, 1.0) if partial else 1.0
    original = rope.take(BESIDE, int, max_positions)
    if kind not in ("default", *SCALINGS):
        raise ConfigError(f"{f.source}: rotary scaling {shorten(kind, 60)!r} is not supported (supported: default, "
                          f"{', '.join(SCALINGS)}); use another model")
    if kind in ("yarn", "longrope") and not (original > 1 and theta > 1):  # their logarithms divide
        raise ConfigError(f"{rope.source}: {BESIDE} {original} and rope_theta {theta} must be above 1 for {kind}; "
                          "correct the file")
    scaling = None if kind == "default" else SCALINGS[kind].read(rope, max_positions, original)
    f.unknown += [f"{name} (of the rotary positions)" for name in rope.finish(ONE_VALUE)]
    return Rope(theta, scaling, share)


def _read_linear(rope: Fields, max_positions: int, original: int) -> LinearScaling:
    return LinearScaling(factor=_positive(rope, "factor"))


def _read_dynamic(rope: Fields, max_positions: int, original: int) -> DynamicScaling:
    return DynamicScaling(factor=_positive(rope, "factor"))


def _read_llama3(rope: Fields, max_positions: int, original: int) -> Llama3Scaling:
    scaling = Llama3Scaling(_positive(rope, "factor"), _positive(rope, "low_freq_factor"),
                            _positive(rope, "high_freq_factor"), original)
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ConfigError(f"{rope.source}: high_freq_factor {scaling.high_freq_factor} must be above "
                          f"low_freq_factor {scaling.low_freq_factor}; correct the file")
    return scaling


def _read_yarn(rope: Fields, max_positions: int, original: int) -> YarnScaling:
    factor = _positive(rope, "factor", max_positions / original)
    amplitude = _positive(rope, "attention_factor", None)
    weights = [rope.take(name, float, None) or None for name in ("mscale", "mscale_all_dim")]  # DeepSeek's; 0 is none
    if amplitude is None and all(weights):
        amplitude = yarn_amplitude(factor, weights[0]) / yarn_amplitude(factor, weights[1])
    fast, slow = (float(rope.take(name, float, None) or usual) for name, usual in (("beta_fast", 32), ("beta_slow", 1)))
    if not fast >= slow > 0:
        raise ConfigError(f"{rope.source}: beta_fast {fast} must not be below beta_slow {slow}, and both above 0; "
                          "correct the file")
    return YarnScaling(factor, original, fast, slow, amplitude, rope.take("truncate", bool, True))


def _read_longrope(rope: Fields, max_positions: int, original: int) -> LongRopeScaling:
    return LongRopeScaling(_divisors(rope, "short_factor"), _divisors(rope, "long_factor"),
                           _positive(rope, "factor", max_positions / original), original,
                           _positive(rope, "attention_factor", None))


class Way(NamedTuple):
    """One of the ways to stretch rotary positions, and how its fields are read."""

    kind: type[Scaling]
    read: Callable[[Fields, int, int], Scaling]


SCALINGS: Mapping[str, Way] = {
    "linear": Way(LinearScaling, _read_linear),
    "llama3": Way(Llama3Scaling, _read_llama3),
    "yarn": Way(YarnScaling, _read_yarn),
    "dynamic": Way(DynamicScaling, _read_dynamic),
    "longrope": Way(LongRopeScaling, _read_longrope),
}


def _divisors(f: Fields, name: str) -> tuple[float, ...]:
    """A list of one number for each pair that turns."""
    values = {str(pair): value for pair, value in enumerate(f.take(name, list))}
    each = Fields(values, f"{f.source}, {name}")
    return tuple(_positive(each, pair) for pair in values)


def _positive(f: Fields, name: str, default: Any = REQUIRED):
    value = f.take(name, float, default)
    if value is None:
        return None
    if not LEAST <= value <= FLOAT32_MAX:  # of 0, infinity or near them, angles are no numbers in float32
        raise ConfigError(f"{f.source}: '{name}' is {value!r}, but it must be above 0, at least "
                          f"{LEAST:g}; correct the file")
    return float(value)
