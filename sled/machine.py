"""What a measurement was made on, for the head of every report."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import jax


def hardware() -> str:
    """The accelerators, or the processor's name and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that bear on speed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "flax", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
