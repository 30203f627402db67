"""Compiled programs are kept on disk, so that a command that ran before starts in seconds."""

from __future__ import annotations

import os
from pathlib import Path

from sled.io import cache_folder

VARIABLE = "SLED_COMPILATION_CACHE"
MOST_BYTES = 2 * 2**30  # the programs that were not used for longest go first
LEAST_SECONDS = 0.1  # of compilation: what is quicker is not worth a file


def keep_programs() -> None:
    """Lets JAX keep what it compiles, by the program, its version and the machine, in the user's cache folder.

    `VARIABLE` names another folder, or 0 turns it off; a folder that JAX itself was given (JAX_COMPILATION_CACHE_DIR)
    stays. Where no folder can be made, nothing is kept.
    """
    import jax  # takes a second, and not every command computes

    asked = os.environ.get(VARIABLE)
    if asked == "0" or jax.config.jax_compilation_cache_dir:
        return
    folder = Path(asked).expanduser() if asked else cache_folder("programs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
