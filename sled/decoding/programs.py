"""A bound on the compiled programs that are kept: each takes megabytes, and every new shape of a batch makes some."""

from __future__ import annotations

MOST = 64

_BOUNDED = []


def bounded(jitted):
    """A jitted function whose compiled programs count."""
    _BOUNDED.append(jitted)
    return jitted


def forget_programs() -> None:
    """Where more than `MOST` are kept, forgets all of them: JAX forgets no single one.

    Those in use are compiled again, so at most each of them once in so many. To be called between generations.
    """
    if sum(jitted._cache_size() for jitted in _BOUNDED) > MOST:
        for jitted in _BOUNDED:
            jitted.clear_cache()
