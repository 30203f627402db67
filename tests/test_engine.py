"""The engine: every request gets what it would get alone, whatever comes and goes beside it."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
from tiny_lm import CAPACITY, DECODE, EOS, PROMPTS, PUT_ROW, SET_ACTIVE, START, compiled, generate, talking_lm, tiny_lm

import sled
from sled.decoding import state
from sled.errors import PromptError, RequestError, SettingError, TokenizerError
from sled.exits import FullDepth
from sled.serving.request import Limits

EXITS = sled.EarlyExit((1, 3), threshold=(0.08, 0.07), max_deferred=3)
GUESSES = sled.SelfSpeculation(2, draft=4)


def engine_of(**settings):
    return sled.Engine(tiny_lm(), **{"slots": 8, "exits": EXITS, "schedule": sled.Gather(3), **settings})


def some_prompt(rng):
    return rng.integers(6, 61, size=rng.integers(1, 18)).tolist()


def alone(prompt, max_new_tokens, **settings):
    """The first tokens for this prompt and the layers that said them: a token does not depend on how many follow."""
    out = generate([prompt], **settings)
    return out.tokens[0][:max_new_tokens], out.exit_layers[0][:max_new_tokens]


def test_a_hundred_requests_get_what_each_gets_alone():
    rng, engine = np.random.default_rng(0), engine_of(limits=Limits(show_exits=True))
    asked = [dict(
        prompt=some_prompt(rng), max_new_tokens=int(rng.integers(1, 40)), seed=int(rng.integers(2**32)),
        exits=dataclasses.replace(EXITS, threshold=tuple(rng.uniform(0, 0.2, size=2))),
        sampling=sled.Sampling(temperature=rng.choice([0.0, 0.9]), top_k=int(rng.integers(20)),
                               repetition_penalty=rng.choice([1.0, 1.3]))) for _ in range(100)]
    requests = [engine.submit(**one) for one in asked[:45]]
    for _ in range(15):
        engine.step()
    counts = compiled()
    requests += [engine.submit(**one) for one in asked[45:]]
    engine.run()
    assert compiled() == counts
    assert (engine.waiting, engine.running) == (0, 0)
    left_early = 0
    for request, one in zip(requests, asked, strict=True):
        result, (tokens, layers) = request.result(), alone(**one)
        assert (result.tokens, result.exit_layers) == (tokens, layers)
        assert result.finish_reason == ("eos" if tokens[-1] == EOS else "length")
        left_early += sum(layer < 4 for layer in layers)
    assert 100 < left_early < sum(len(r.result().tokens) for r in requests)


def test_speculation_says_what_its_fusion_alone_says():
    rng = np.random.default_rng(1)
    engine = engine_of(exits=GUESSES, schedule=None, fusion=sled.SLED(), limits=Limits(show_exits=True))
    asked = [dict(prompt=some_prompt(rng), max_new_tokens=int(rng.integers(1, 40)), seed=i,
                  fusion=sled.SLED(rate=rng.uniform(0, 4), scale=int(rng.integers(1, 16))),
                  sampling=sled.Sampling(temperature=i % 3 / 3)) for i in range(40)]
    requests = [engine.submit(**one, exits=sled.SelfSpeculation(2, draft=1 + i % 8)) for i, one in enumerate(asked)]
    default = engine.submit([7, 8], max_new_tokens=9)
    assert [request.result().tokens for request in requests] == [alone(**one)[0] for one in asked]
    assert default.result().tokens == alone([7, 8], 9, fusion=sled.SLED())[0]
    assert sum(request.result().accepted for request in requests) > 0


def test_pieces_add_up_and_statistics_of_exits_are_hidden_unless_shown():
    engine = engine_of()
    request, other = engine.submit([9, 8, 7], max_new_tokens=30), engine.submit([9, 8], max_new_tokens=30)
    pieces, result = list(request.stream()), request.result()
    assert len(pieces) > 1 and all(piece.tokens for piece in pieces)
    assert [token for piece in pieces for token in piece.tokens] == alone([9, 8, 7], 30, exits=EXITS)[0]
    assert [piece.tokens for piece in request.stream()] == [result.tokens]  # read again, in one piece
    assert other.result().tokens == alone([9, 8], 30, exits=EXITS)[0]
    assert request.status == other.status == "done" and (engine.waiting, engine.running) == (0, 0)
    assert all(piece.exit_layers is None for piece in pieces)
    assert result.exit_layers is None and result.drafted is None and result.accepted is None and result.text is None


def test_cancelled_requests_harm_no_other():
    engine, prompts = engine_of(), [[10 + i] * (1 + i) for i in range(20)]
    requests = [engine.submit(prompt, max_new_tokens=25) for prompt in prompts]
    requests[15].cancel()  # before it has a slot
    engine.step()
    cancelled = (0, 3, 7, 15)
    for i in cancelled:
        requests[i].cancel()
    engine.run()
    for i, request in enumerate(requests):
        result, (tokens, _) = request.result(), alone(prompts[i], 25, exits=EXITS)
        if i in cancelled:
            assert result.finish_reason == "cancelled" and result.tokens == tokens[:len(result.tokens)]
            assert 0 < len(result.tokens) < 25 if i != 15 else not result.tokens
        else:
            assert result.tokens == tokens
    requests[1].cancel()  # too late: nothing changes
    assert requests[1].result().finish_reason in ("eos", "length")


def test_failing_requests_harm_no_other(monkeypatch):
    engine, start = engine_of(), state.start

    def fails_at_thirteen(build, params, prompts, *rest, **named):
        if prompts[0][0] == 13:
            raise MemoryError("out of memory")
        return start(build, params, prompts, *rest, **named)

    monkeypatch.setattr(START, fails_at_thirteen)
    requests = [engine.submit([10 + i, 9], max_new_tokens=12) for i in range(10)]
    monkeypatch.setattr(requests[5], "take", lambda *_: 1 // 0)
    engine.run()
    for i, request in enumerate(requests):
        if i in (3, 5):
            assert request.status == "failed"
            with pytest.raises(RequestError) as failed:
                request.result()
            assert ("out of memory" if i == 3 else "division") in str(failed.value.__cause__)
            with pytest.raises(RequestError):
                list(request.stream())
        else:
            assert request.result().tokens == alone([10 + i, 9], 12, exits=EXITS)[0]


@pytest.mark.parametrize(("where", "failure"), [
    (START, KeyboardInterrupt()), (PUT_ROW, MemoryError("full")), (SET_ACTIVE, MemoryError("full")),
    (DECODE, ZeroDivisionError())], ids=str)
def test_where_the_device_fails_requests_that_wait_are_kept(monkeypatch, where, failure):
    engine = engine_of()
    requests = [engine.submit([10 + i, 9], max_new_tokens=3) for i in range(10)]
    with monkeypatch.context() as broken:
        broken.setattr(where, Mock(side_effect=failure))
        with pytest.raises(type(failure)):
            engine.run()
    served = "done" if where == SET_ACTIVE else "failed"  # they had had their tokens
    assert [request.status for request in requests] == [served] * 8 + ["waiting"] * 2
    if served == "failed":
        with pytest.raises(RequestError) as failed:
            requests[0].result()
        assert failed.value.__cause__ is failure or str(failed.value.__cause__) == "interrupted"
    engine.run()
    assert all(request.ended for request in requests)
    assert requests[9].result().tokens == alone([19, 9], 3, exits=EXITS)[0]


def test_a_reader_beside_the_driver_sees_tokens_with_their_layers(monkeypatch):
    engine = engine_of(limits=Limits(show_exits=True))
    request = engine.submit([9, 8, 7], max_new_tokens=40)
    update = request._row.update
    monkeypatch.setattr(request._row, "update", lambda tokens: (update(tokens), time.sleep(0.02)))
    monkeypatch.setattr(request, "_step", lambda: time.sleep(0.001))  # the driver is another
    with ThreadPoolExecutor() as pool:
        driver = pool.submit(engine.run)
        pieces = list(request.stream())
        driver.result()
    assert [layer for piece in pieces for layer in piece.exit_layers] == request.result().exit_layers


def test_any_thread_may_submit_and_read():
    engine = engine_of()

    def ask(i):
        return [token for piece in engine.submit([20 + i], max_new_tokens=15).stream() for token in piece.tokens]

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == [alone([20 + i], 15, exits=EXITS)[0] for i in range(12)]


def test_the_budget_charges_all_layers():
    engine = engine_of(limits=Limits(budget=4 * 20 + 2))
    cut, short = engine.submit([9] * 12, max_new_tokens=20), engine.submit([9] * 12, max_new_tokens=8)
    with pytest.raises(RequestError, match=r"prompt of 20 tokens .* budget of 82 layer-tokens"):
        engine.submit([9] * 20)
    engine.submit([9] * 19)
    tokens, _ = alone([9] * 12, 20, exits=EXITS)
    assert EOS not in tokens[:8]
    assert cut.result().finish_reason == "budget" and cut.result().tokens == tokens[:8]
    assert short.result().finish_reason == "length" and short.result().tokens == tokens[:8]
    engine.run()
    # A guess that is wrong costs as much as one that is right: five positions for a token, with a draft of four.
    assert Limits(budget=300).affordable(12, GUESSES, 3) == (100 - 12) // 5
    assert Limits().affordable(10**9, GUESSES, 3) is None


def test_constant_depth_goes_through_all_layers():
    engine = engine_of(schedule=None, limits=Limits(constant_depth=True, show_exits=True))
    request = engine.submit([9, 8, 7], max_new_tokens=12, exits=dataclasses.replace(EXITS, threshold=0.0))
    assert request.result().exit_layers == [4] * 12
    assert request.result().tokens == alone([9, 8, 7], 12)[0]


def test_the_operators_floor_holds_for_every_request():
    limits = Limits(threshold_floor=0.5, min_layer=2)
    floor = sled.EarlyExit((1, 2), threshold=0.5, min_layer=2)
    engine = engine_of(exits=floor, limits=limits)
    for exits, message in (
            (dataclasses.replace(floor, threshold=(0.9, 0.4)), "0.4.*0.5 at the lowest"),
            (dataclasses.replace(floor, threshold=np.array([0.9, 0.1])), "0.1.*0.5 at the lowest"),
            (dataclasses.replace(floor, min_layer=1), "after layer 1.*allows 2")):
        with pytest.raises(SettingError, match=message):
            engine.submit([7], exits=exits)
    for hidden in (dict(threshold=np.array([np.nan, 0.0])), dict(threshold=(np.array(np.nan), 0.0)),
                   dict(min_layer=np.array([2**32])), dict(min_layer=np.array([2.5])), dict(threshold=np.array(["a"]))):
        with pytest.raises(SettingError, match="must be a"):  # numbers in arrays have the same rules
            engine.submit([7], exits=dataclasses.replace(floor, **hidden))
    engine_of(exits=dataclasses.replace(floor, threshold=np.float32([0.9, 0.9])), limits=Limits(0.9))
    limits.check(sled.EarlyExit(2, threshold=0.6), 4)  # it has no exit before layer 2
    limits.check(sled.EarlyExit((1, 2), threshold=0.6, min_layer=3), 4)  # none leaves
    with pytest.raises(SettingError, match=r"comes down to 0\.45"):  # CALM's decay takes a tenth off
        limits.check(dataclasses.replace(floor, decay="calm-paper"), 4)
    with pytest.raises(SettingError, match="at the lowest"):
        engine_of(exits=sled.EarlyExit(2, threshold=0.1), limits=limits)


@pytest.mark.parametrize(("asked", "error", "message"), [
    (dict(prompt=[]), PromptError, "no prompt was given"), (dict(prompt=[99]), PromptError, "token id 99"),
    (dict(prompt=[[7], [8]]), PromptError, "2 were given"), (dict(prompt="text"), TokenizerError, "no tokenizer"),
    (dict(prompt=[7] * 48), PromptError, "48 tokens long"), (dict(prompt=[7], max_new_tokens=0), SettingError, "is 0"),
    (dict(prompt=[7], seed=-1), SettingError, "seed is -1"), (dict(prompt=[7], stop=""), SettingError, "stop is ''"),
    (dict(prompt=[7], stop="."), TokenizerError, "no tokenizer"),
    (dict(prompt=[7], exits=GUESSES), SettingError, "must be of class EarlyExit"),
    (dict(prompt=[7], exits=sled.EarlyExit(1)), SettingError, r"EarlyExit.layers is \(1,\), but \(1, 3\) for every"),
    (dict(prompt=[7], exits=dataclasses.replace(EXITS, threshold=np.ones((2, 2)))), SettingError, "B is 1 here; a req"),
    (dict(prompt=[7], fusion=sled.SLED()), SettingError, "must be of class FinalLayer"),
], ids=str)
def test_a_bad_request_is_refused_at_once(asked, error, message):
    engine = engine_of()
    with pytest.raises(error, match=message):
        engine.submit(**asked)
    assert (engine.waiting, engine.running) == (0, 0)


def test_no_request_makes_all_rows_take_more_steps():
    engine = engine_of(exits=FullDepth(), fusion=sled.SLED(steps=2))
    engine.submit([7], fusion=sled.SLED(steps=1)).cancel()
    with pytest.raises(SettingError, match=r"SLED\.steps is 3, but this engine allows 2"):
        engine.submit([7], fusion=sled.SLED(steps=3))


def test_text_and_stop_strings():
    lm = talking_lm()
    engine = sled.Engine(lm, exits=EXITS, schedule=sled.Gather(3))
    prompt = lm.text.decode(PROMPTS[2])
    text = lm.generate(prompt, max_new_tokens=CAPACITY, exits=EXITS).texts[0]
    stop = text[9:11]
    whole, stopped = engine.submit(prompt, max_new_tokens=40), engine.submit(prompt, max_new_tokens=40, stop=stop)
    assert "".join(piece.text for piece in stopped.stream()) == text[:text.index(stop)]
    assert stopped.result().finish_reason == "stop"
    assert "".join(piece.text for piece in whole.stream()) == whole.result().text == text
