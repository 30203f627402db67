"""A bound on the compiled programs that are kept: each takes megabytes, and every new shape of a batch makes some."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import Any

import jax

from sled.decoding.groups import over_groups, placed

MOST = 64

_PROGRAMS: list[_Bounded] = []
_SERVING = ContextVar("serving", default=False)
_SERVICES = weakref.WeakSet()


def bounded(*, rows: Collection[str] | None, settings: Collection[str] = (), static: Collection[str] = (),
            donate: str | None = None) -> Callable[[Callable], _Bounded]:
    """As `jax.jit`, for a function whose compiled programs count, over the groups of a mesh (`over_groups`, which
    explains rows, settings and static; `build`, which the function takes, is one of the static arguments).

    rows None: the function sees to the mesh itself. donate: the argument whose arrays the function may overwrite.
    """
    return lambda function: _Bounded(function, rows, settings, {"build", *static}, donate)


class _Bounded:
    """A function that is jitted twice, since JAX forgets all programs of a jitted function or none: those of services,
    whose shapes are fixed, and all others. programs: how many there are of either."""

    def __init__(self, function: Callable, rows: Collection[str] | None, settings: Collection[str], static: set[str],
                 donate: str | None):
        functools.update_wrapper(self, function)
        self._static, self._signature = static, inspect.signature(function)
        self.programs = {serving: 0 for serving in (False, True)}
        mapped = function if rows is None else over_groups(function, rows=rows, settings=settings, static=static)
        self._jitted = {serving: jax.jit(self._counted(mapped, serving), static_argnames=tuple(static),
                                         donate_argnames=donate) for serving in self.programs}
        _PROGRAMS.append(self)

    def __call__(self, build, *args, **named):
        jitted = self._jitted[_SERVING.get()]
        if build.mesh is None or not build.mesh.is_multi_process:
            return jitted(build, *args, **named)
        given = self._signature.bind(build, *args, **named).arguments
        return jitted(**{name: value if name in self._static else placed(value, build.mesh)
                         for name, value in given.items()})

    def _counted(self, mapped: Callable, serving: bool) -> Callable:
        @functools.wraps(self.__wrapped__)
        def traced(*args, **named):  # which is called once for each program
            self.programs[serving] += 1
            return mapped(*args, **named)

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
