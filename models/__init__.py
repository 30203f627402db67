"""Flax transformers of the common families, Hugging Face and Orbax folders in and out.

Shapes are named by suffixes: B batch, T tokens of a call, S cache positions, D width, F feed-forward,
N query heads, K key/value heads, H head width, V vocabulary, L layers.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "DecoderConfig": "config",
    "Rope": "positions",
    "LinearScaling": "positions",
    "Llama3Scaling": "positions",
    "YarnScaling": "positions",
    "DynamicScaling": "positions",
    "LongRopeScaling": "positions",
    "ExitHeads": "config",
    "Experts": "config",
    "from_pre_exit": "config",
    "Decoder": "decoder",
    "FAMILIES": "families.registry",
    "read_config": "families.registry",
    "load_folder": "huggingface",
    "save_folder": "huggingface",
    "exportable": "huggingface",
    "load_orbax": "orbax",
    "save_orbax": "orbax",
    "fetch": "hub",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    # Lazy: reading a configuration or listing families should not wait for jax and flax.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
