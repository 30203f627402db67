"""A bound on the compiled programs that are kept: each takes megabytes, and every new shape of a batch makes some."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax

MOST = 64

_PROGRAMS: list[_Bounded] = []
_SERVING = ContextVar("serving", default=False)
_SERVICES = weakref.WeakSet()


def bounded(**how: Any) -> Callable[[Callable], _Bounded]:
    """As `jax.jit` with these settings, for a function whose compiled programs count."""
    return lambda function: _Bounded(function, how)


class _Bounded:
    """A function that is jitted twice, since JAX forgets all programs of a jitted function or none: those of services,
    whose shapes are fixed, and all others. programs: how many there are of either."""

    def __init__(self, function: Callable, how: dict[str, Any]):
        functools.update_wrapper(self, function)
        self.programs = {serving: 0 for serving in (False, True)}
        self._jitted = {serving: jax.jit(self._counted(function, serving), **how) for serving in self.programs}
        _PROGRAMS.append(self)

    def __call__(self, *args, **named):
        return self._jitted[_SERVING.get()](*args, **named)

    def _counted(self, function: Callable, serving: bool) -> Callable:
        @functools.wraps(function)
        def traced(*args, **named):  # which is called once for each program
            self.programs[serving] += 1
            return function(*args, **named)

        return traced

    def forget(self, serving: bool) -> None:
        self._jitted[serving].clear_cache()
        self.programs[serving] = 0


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Within it, programs are made and used that stay for as long as any service is there."""
    before = _SERVING.set(True)
    try:
        yield
    finally:
        _SERVING.reset(before)


def begin_service(service: Any) -> None:
    """To be called by each service. Where none is left of those before, their programs are forgotten if too many."""
    if not _SERVICES:
        _forget(serving=True)
    _SERVICES.add(service)


def forget_programs() -> None:
    """Where more than `MOST` are kept, besides services', forgets all of them: JAX forgets no single one.

    Those in use are compiled again, so at most each of them once in so many. To be called between generations.
    """
    _forget(serving=False)


def _forget(*, serving: bool) -> None:
    if sum(each.programs[serving] for each in _PROGRAMS) > MOST:
        for each in _PROGRAMS:
            each.forget(serving)
