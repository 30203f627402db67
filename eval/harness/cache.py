"""Answers kept as they are made, so that an evaluation that was killed goes on where it was.

One SQLite file holds the answers of any number of models and methods. An answer is found again only under everything
that decides it: a digest of the settings (weights, tokenizer, method, versions: `SledLM.settings`) and one of the
request (token ids, stop strings, limits, seeds). It is written in one transaction per batch, with SQLite's rollback
journal: a kill at any moment leaves the file as it was before or after that batch, and the next opening needs nothing
beside the file. (Its other mode, WAL, writes faster, which does not matter at a batch at a time, but needs shared
memory that network file systems lack.)
"""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from sled.errors import EvaluationError
from sled.io import json_digest, made_writable, writable
from sled.train.parallel.distributed import from_first_process

FORMAT = 2  # `PRAGMA user_version` of the file; a file of another is refused
PATIENCE = 60.0  # seconds to wait while another process writes to the same file


class Cache:
    """Answers under settings. path: the file, made with the first answer; None keeps them in memory alone.

    Of several processes that answer together only the first has a file, and the others find what it finds.
    Raises SettingError where the file cannot be written, EvaluationError where it is not such a file or damaged.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None or jax.process_index() > 0 else writable("cache", path)
        self._db = self._open() if self.path is None or self.path.exists() else None

    def _open(self) -> sqlite3.Connection:
        path = ":memory:" if self.path is None else made_writable("cache", self.path)
        with self._named_errors():
            db = sqlite3.connect(path, timeout=PATIENCE)
            [found] = db.execute("PRAGMA user_version").fetchone()
            [tables] = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if found != FORMAT and (found or tables):
                db.close()
                raise EvaluationError(f"the cache {self.path} has format {found}, but this version of sled reads "
                                      f"format {FORMAT}; name another file")
            with db:
                db.execute("CREATE TABLE IF NOT EXISTS settings (digest TEXT PRIMARY KEY, described TEXT)")
                db.execute("CREATE TABLE IF NOT EXISTS answers (settings TEXT, request TEXT, answer TEXT, sha256 TEXT, "
                           "PRIMARY KEY (settings, request)) WITHOUT ROWID")
                db.execute(f"PRAGMA user_version = {FORMAT}")
        return db

    def under(self, settings: Mapping[str, Any]) -> Answers:
        """The answers made under these settings, given as JSON has them. They are written down in full too."""
        return Answers(self, json_digest(settings), json.dumps(settings, sort_keys=True, ensure_ascii=False))

    def close(self) -> None:
        if self._db:
            self._db.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OverflowError, UnicodeError) as reason:  # the last two of rows that are damaged
            raise EvaluationError(f"the cache {self.path} cannot be used ({reason}); name another file, or delete it "
                                  "if nothing else keeps data in it") from reason


class Answers:
    """The answers of a `Cache` under one set of settings, by the digest of their request."""

    def __init__(self, cache: Cache, digest: str, described: str):
        self._cache, self.digest, self._described = cache, digest, described

    def find(self, requests: Iterable[str]) -> dict[str, Any]:
        """The known answers among these requests."""
        found = self._here(requests)
        return found if jax.process_count() == 1 else json.loads(from_first_process(json.dumps(found)))

    def _here(self, requests: Iterable[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._cache._db is None:
            return found
        with self._cache._named_errors():
            for request in requests:
                row = self._cache._db.execute("SELECT answer, sha256 FROM answers WHERE settings = ? AND request = ?",
                                              (self.digest, request)).fetchone()
                if row is not None:
                    found[request] = self._read(request, *row)
        return found

    def _read(self, request: str, text: Any, sha256: Any) -> Any:
        """A row's answer. Raises EvaluationError for one that was changed after it was written."""
        if not isinstance(text, str) or sha256 != self._sum(request, text):
            raise EvaluationError(f"the cache {self._cache.path} is damaged: the answer to {request[:12]}... is "
                                  "not the one that was written; name another file, or delete this one")
        return json.loads(text)

    def _sum(self, request: str, text: str) -> str:
        return json_digest([self.digest, request, text])

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keeps these answers, all or none. One that is there stays."""
        texts = {request: json.dumps(answer) for request, answer in answers.items()}
        rows = [(self.digest, request, text, self._sum(request, text)) for request, text in texts.items()]
        if self._cache._db is None:
            self._cache._db = self._cache._open()
        with self._cache._named_errors(), self._cache._db:
            self._cache._db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (self.digest, self._described))
            self._cache._db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", rows)


@dataclasses.dataclass
class RequestCounts:
    """The number of requests so far, and what became of them.

    requests: all that were made. computed: answered by the model; repeated: equal to another one of the same call; the
    rest was in the cache.
    truncated: requests longer than the context, whose beginning was cut off; cut_tokens: the tokens cut off.
    scored: texts whose log-likelihood was asked for; left_out: those of them with a token that the fusion leaves out.
    unfinished: generated texts that ended at the token limit. new_tokens: of all generated texts; layers: the sum, over
    these tokens, of the layer that each was emitted after.
    """

    requests: int = 0
    computed: int = 0
    repeated: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    scored: int = 0
    left_out: int = 0
    unfinished: int = 0
    new_tokens: int = 0
    layers: int = 0

    def cut(self, tokens: int) -> None:
        """Counts a request that lost so many tokens."""
        self.truncated += tokens > 0
        self.cut_tokens += tokens
