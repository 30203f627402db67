"""What the tests of sweeps share: a model that follows a script, small sweeps of it, and the command."""

import copy
import types

import pytest
from demo_toy import THREE, demo_toy

import sled
from sled.cli import main
from sled.eval.questions import Questions
from sled.eval.sweep import grid
from sled.eval.sweep import measure as measuring
from sled.eval.sweep import sweep as sweeping
from sled.eval.sweep.sweep import sweep
from sled.results import Output, Stats
from sled.timing import Times

# Five, as many as in no other test of the toy: programs that others compiled would not count as this one's.
QUESTIONS = Questions(tuple(f"Question: {n} and {n}?\nAnswer:" for n in range(5)), (0, 2, 4, 6, 8), "sums")
EARLY = grid.early_exits([1], [0.0, 1.0, 0.5])
DRAFTS = grid.self_speculation([1], [3, 1])


def run(lm, folder, methods=(*EARLY, *DRAFTS), questions=QUESTIONS, **how):
    return sweep(lm, methods, questions, folder, **{"rounds": 1, "max_new_tokens": 6, "progress": False, **how})


@pytest.fixture
def scripted(monkeypatch):
    """The toy with a script instead of a model: `scripted.calls` are the exits it was asked for. At threshold t the
    first (1 - t) of the answers are wrong, and it takes t seconds; without exits, or drafting, all are right, in 1."""

    def decode(prompts, decoding, **_):
        lm.calls.append(decoding.exits)
        lm.stop = decoding.stop
        t = getattr(decoding.exits, "threshold", 1.0)
        wrong = round((1 - t) * len(prompts))
        texts = [lm.says.format("no" if i < wrong else 2 * i) for i in range(len(prompts))]
        ended = ["length" if i < lm.cut else "stop" for i in range(len(prompts))]
        stats = Stats(prompt_tokens=1, new_tokens=2 * len(prompts), prefill_seconds=0, decode_seconds=1,
                      mean_depth=3 * t, drafted=10 * (t == 1), accepted=5)
        return Output(texts, [[i, i >= wrong] for i in range(len(prompts))], ended, [], stats)

    def interleave(calls, rounds, bar):
        assert next(iter(calls)).endswith("no exit")  # the baseline, in every round
        for call in calls.values():
            call()
        seconds = lambda name: max(float(name.rpartition("threshold ")[2]), 0.01) if "threshold" in name else 1.0  # noqa: E731
        return {name: Times([seconds(name), 9.0]) for name in calls}

    lm = copy.copy(demo_toy())
    lm.name, lm.decode, lm.calls, lm.config, lm.says, lm.cut = "scripted", decode, [], THREE, "#### {}", 0
    lm.check = lambda decoding: decoding.exits.exits(lm.config.num_layers)
    monkeypatch.setattr(measuring, "interleave", interleave)
    monkeypatch.setattr(sweeping, "draw_sweep", lambda _, path: path.write_bytes(b"a picture") and path)
    return lm


def many(n):
    return Questions(tuple(f"q {i}" for i in range(n)), tuple(2 * i for i in range(n)), "questions")


@pytest.fixture
def sweep_command(scripted, monkeypatch):
    """`sweep_command(*arguments)`: the exit status of `sled sweep`, with the scripted model. Its layers 1 and 2 promise
    most."""
    monkeypatch.setattr(sled, "load", lambda *_, **__: scripted)
    monkeypatch.setattr(sled, "layers", lambda *_, **__: types.SimpleNamespace(speaking_layers=lambda _: (1, 2)))
    return lambda *arguments: main(["sweep", *map(str, arguments)])
