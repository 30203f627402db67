"""jax and flax move in pairs; a pair that does not fit fails deep inside flax. Say so at import."""

from __future__ import annotations

import importlib.metadata

from sled.errors import VersionError

# First jax and flax versions of each era, oldest first: a flax below its era's does not run on that jax.
ERAS = (((0, 10, 2), (0, 12, 8)), ((0, 11, 1), (0, 12, 9)))
REMEDY = ("pip install -U 'jax>=0.11.1' 'flax>=0.12.9' on Python 3.12 or later, "
          "'jax==0.10.2' 'flax==0.12.8' on Python 3.11")


def check(jax_version: str, flax_version: str) -> None:
    """Raises VersionError unless the two versions are a pair this library runs on."""
    jax, flax = _numbers(jax_version), _numbers(flax_version)
    needed = [need for first, need in ERAS if jax >= first]
    if not needed:
        raise VersionError(f"jax {jax_version} is too old: this library needs 0.10.2 or later. {REMEDY}")
    if flax < needed[-1]:
        raise VersionError(f"flax {flax_version} does not fit jax {jax_version}: they move in pairs. {REMEDY}")


def check_installed() -> None:
    try:
        check(importlib.metadata.version("jax"), importlib.metadata.version("flax"))
    except importlib.metadata.PackageNotFoundError as missing:
        raise VersionError(f"{missing.name} is not installed. {REMEDY}") from None


def _numbers(version: str) -> tuple[int, ...]:
    digits = ["".join(c for c in part if c.isdigit()) for part in version.split(".")[:3]]
    return tuple(int(d or 0) for d in digits)
