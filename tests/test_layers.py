"""`sled.layers`: counts of drafts and exits are those of a real run, costs those written by hand, verdicts follow."""

import copy
import dataclasses
import functools
import json

import numpy as np
import pytest
from flax import nnx
from headed_models import headed
from tiny_lm import CAPACITY, CONFIG, EOS, PROMPTS, generate, tiny_lm, totals

import sled
from sled.cli import main
from sled.cli.generate import Generate
from sled.cli.line import parse
from sled.errors import CalibrationError, SettingError
from sled.lm import LM
from sled.models import Decoder
from sled.survey import profile, survey
from sled.survey.choices import Choices, layer_choices
from sled.survey.costs import DRAFTS, Costs
from sled.survey.picture import picture
from sled.survey.result import Survey
from sled.survey.simulate import count_drafts, count_exits

COSTS = Costs(4, {1: 2.0, 3: 3.0, 9: 6.0, 17: 10.0}, {1: 1.0, 3: 1.5, 9: 2.0, 17: 3.0}, few=0.125, plain=0.5,
              draft=0.25, verify=1.25, exit=0.125, deeper=0.75, call=2.5)
FEW = 48  # ids, of 61
RNG = np.random.default_rng(0)


@functools.cache
def read() -> tuple[list[np.ndarray], list[Choices]]:
    """The tiny model's answers, and its layers' choices along them."""
    lm, texts = tiny_lm(), [np.array(tokens) for tokens in generate().tokens]
    pairs = list(zip(map(np.array, PROMPTS), texts, strict=True))
    return texts, layer_choices(lm, pairs, batch_size=len(PROMPTS), progress=False, first_ids=FEW)


# Choices

def test_choices_are_the_lenss_wherever_the_answer_stands():
    """Of four layers, two have heads with projections of their own."""
    lm = LM(headed("affine, untied"))
    pairs = [(RNG.integers(6, 47, size=m).astype(np.int32), RNG.integers(6, 47, size=n)) for m, n in ((5, 9), (2, 3))]
    for (prompt, answer), choices in zip(pairs, layer_choices(lm, pairs, batch_size=2, progress=False), strict=True):
        lens = lm.lens([*prompt.tolist(), *answer[:-1].tolist()])
        np.testing.assert_array_equal(choices.token_LT, lens.top[1:, len(prompt) - 1:])
        np.testing.assert_allclose(choices.probability_LT, lens.probability[1:, len(prompt) - 1:], rtol=1e-5)
        [logprobs] = lm.score(prompt, answer).logprobs
        np.testing.assert_allclose(choices.logprob_LT[-1], logprobs, rtol=1e-5)


# Counts

def test_drafts_of_few_ids_are_thought_of_where_the_projection_is_heavy():
    """242 rows weigh a layer, and 1,000 more than two."""
    assert survey._first_ids(tiny_lm()) is None
    wide = Decoder.init(dataclasses.replace(CONFIG, vocab_size=1000, num_layers=1, windows=()), rngs=nnx.Rngs(0))
    assert survey._first_ids(LM(wide)) == 192


@pytest.mark.parametrize("draft", [1, 2, 5, 8])
def test_drafts_are_counted_as_they_happen(draft):
    """Two of the texts end with an ending token, two at the end of the context. Of drafts of 8, one is wrong at once
    and ends the text three tokens before it is long enough."""
    texts, choices = read()
    assert {EOS in text for text in texts} == {True, False}
    stats = generate(exits=sled.SelfSpeculation(2, draft)).stats
    counted = [count_drafts(each.token_LT, text, (3, draft), limit=CAPACITY - len(prompt), ends=(EOS,))
               for each, text, prompt in zip(choices, texts, PROMPTS, strict=True)]
    drafted, accepted, verifications = (sum(each)[1, 1] for each in zip(*counted, strict=True))
    assert totals(stats)[3:] == (drafted - 3 * (draft == 8), accepted, verifications)


@pytest.mark.parametrize(("tokens", "draft", "limit", "counts"), [
    ([1, 2, 3, 4], 2, 9, (3, 3, 2)),     # all right: a block of two and the token after them, then the end
    ([1, 2, 3, 4], 9, 4, (4, 4, 1)),
    ([7, 2, 3, 4], 2, 4, (4, 2, 2)),     # wrong at once; two right, and the last layer's token after them
    ([1, 7, 3, 4], 3, 9, (5, 3, 2)),
    ([1, 0, 3, 4], 3, 9, (4, 3, 2)),     # the wrong draft ends the text, so no more are made
    ([1, 2, 3, 7], 9, 4, (4, 3, 1)),     # the limit cuts the draft
    ([7, 7, 7, 7], 2, 4, (7, 0, 4)),     # and cuts it to one token before the last
])
def test_drafts_by_hand(tokens, draft, limit, counts):
    counted = count_drafts(np.array([tokens, [1, 2, 3, 4]]), np.array([1, 2, 3, 4]), [draft], limit=limit, ends=(0,))
    assert tuple(int(each[0, 0]) for each in counted) == counts


def probable(probability_LT) -> Choices:
    """Choices of which nothing but their probability matters."""
    return Choices(np.zeros_like(probability_LT, int), np.float32(probability_LT), None, None)


def plain_exits(batch, layer, threshold, limits, window):
    """Step by step and row by row: the counts of `Left`."""
    lengths = [choices.token_LT.shape[1] for choices in batch]
    waiting, found = [0] * len(batch), [0] * 4
    for t in range(max(lengths)):
        active = [b for b, length in enumerate(lengths) if t < length]
        waiting = [waiting[b] + 1 if b in active else 0 for b in range(len(batch))]
        stays = [b for b in active if not batch[b].probability_LT[layer - 1, t] > threshold]
        full = [b for b in active if waiting[b] >= window and t + 1 < limits[b]]
        if stays or full:
            most = max(waiting)
            found = [x + y for x, y in zip(found, (1, most == 1, most in (2, 3), bool(stays)), strict=True)]
            waiting = [0] * len(batch)
    return (max(lengths), *found)


def test_exits_are_counted_as_step_by_step():
    batch = [probable(RNG.random((3, n), np.float32)) for n in (30, 17, 24)]
    for rows, limits in ((batch[:1], [30]), (batch, [30, 40, 24]), (batch, [40] * 3)):
        left = count_exits(rows, (0.0, 0.2, 0.5, 1.0), limits, window=5)
        for layer in (1, 2):
            steps, *counts = left.of(layer)
            for q, threshold in enumerate((0.0, 0.2, 0.5, 1.0)):
                assert (steps, *(int(x_Q[q]) for x_Q in counts)) == plain_exits(rows, layer, threshold, limits, 5)


# Costs

def test_times_are_those_of_the_parts():
    assert COSTS.step == 4 * 2 + 1 + 0.5
    assert (COSTS.layer(2), COSTS.layer(6), COSTS.layer(21), COSTS.head(1)) == (2.5, 4.5, 12.0, 1.0)
    # Ten drafts after layer 1, and three verifications of 9 tokens.
    assert COSTS.drafting(1, 9, 10, 3) == 10 * (2 + 0.25 + 1) + 3 * (2 + 0.25 + 3 * 6 + 2 + 1.25)
    assert COSTS.drafting(1, 9, 10, 3, few=True) == COSTS.drafting(1, 9, 10, 3) - 10 * (1 - 0.125)
    left = count_exits([probable([[0.9, 0.9, 0.1, 0.9, 0.1]] * 4)], [0.5], [5], window=9)
    # Five steps; the third runs three tokens, and the fifth two, as a block of 3.
    assert COSTS.leaving(3, left, window=9) == [5 * (3 * 2 + 1 + 0.125) + 2 * 3 + 2 * 1 + 2 * 0.75]


def test_drafts_pay_from_some_acceptance_on():
    flat = Costs(10, {1: 1.0}, {1: 0.0})
    windows = dict.fromkeys((1, 2, 4, 8), 9)
    least = flat.pays_from(2, windows)
    speed = {a: max(sum(a**n for n in range(d + 1)) * 10 / (2 * (d + 1) + 8) for d in windows)
             for a in (least, least - 0.01)}
    assert speed[least] >= 1.05 > speed[least - 0.01]
    assert flat.pays_from(9, {1: 9}) == 1.0  # 2 x 10 layers over 19
    assert Costs(10, {1: 1.0}, {1: 1.0}).pays_from(9, {1: 9}) is None  # and 2 x 11 over 21 with the projection


def test_a_device_bound_by_memory_reads_weights_once():
    bound = Costs.of_weights(tiny_lm())
    layer = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)
    assert bound.layer(1) == bound.layer(9) == 1 and bound.head(1) == pytest.approx(4 * 61 * 32 / layer)
    assert bound.step == pytest.approx(4 + bound.head(1)) and not bound.own_head and bound.few is None
    assert Costs.of_weights(tiny_lm(), FEW).few == pytest.approx(4 * FEW * 32 / layer)
    assert Costs.of_weights(LM(headed("affine, untied"))).own_head == pytest.approx(dict.fromkeys(
        (1, 3), (16 * 16 + 16) / (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16)))


def test_costs_come_back_from_the_times_of_whole_cycles():
    """Cycles of 5 and 9 steps with drafts after layer 1; with exits after layer 2, of 9 that leave, and of one."""
    def timed(left):
        return COSTS.leaving(2, left, window=9)[0]

    sizes = sorted(COSTS.layer_of)
    leave, stay = (count_exits([probable(np.full((4, n), 0.5))], [threshold], [n], window=9)
                   for n, threshold in ((10, 0.1), (1, 0.9)))
    one = 2 * COSTS.layer(1) + COSTS.head(1) + COSTS.exit  # the tenth step, after the cycle's nine
    times = {**{("layers", n): 4 * COSTS.layer(n) for n in sizes}, **{("head", n): COSTS.head(n) for n in sizes},
             "plain": COSTS.step, "few": COSTS.few, "call": COSTS.step + 2.5,
             "short": COSTS.drafting(1, 9, 4, 1), "long": COSTS.drafting(1, 9, 8, 1),
             "leaves": timed(leave) - one, "stays": timed(stay)}
    solved = profile._solved(times, 4, sizes, draft_layer=1, exit_layer=2, window=9, cycle=9)
    for field in dataclasses.fields(Costs):
        assert getattr(solved, field.name) == pytest.approx(getattr(COSTS, field.name)), field.name


# The whole

@functools.cache
def surveyed() -> Survey:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey, "measured_costs", lambda *_, **__: COSTS)
        patch.setattr(survey, "_first_ids", lambda _: FEW)
        return sled.layers(tiny_lm(), PROMPTS, max_new_tokens=CAPACITY, batch_size=4, progress=False)


def test_the_figures_are_those_of_the_answers():
    texts, choices = read()
    found = surveyed()
    assert found.prompts == 4 and found.tokens == sum(map(len, texts)) and len(found.layers) == 3
    right_LT, sure_LT = (np.concatenate(x, axis=1) for x in (
        [c.token_LT == text for c, text in zip(choices, texts, strict=True)], [c.probability_LT for c in choices]))
    for layer, said in enumerate(found.layers, 1):
        right, sure = right_LT[layer - 1], sure_LT[layer - 1]
        bins = np.minimum((sure * 15).astype(int), 14)
        error = sum(abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins))
        assert (said.layer, said.agreement) == (layer, pytest.approx(right.mean()))
        assert said.calibration_error == pytest.approx(error) and said.sure == pytest.approx((sure > 0.9).mean())
    for ids in (None, FEW):
        way = next(way for way in found.drafting if (way.layer, way.draft, way.first_ids) == (2, 4, ids))
        stats = generate(exits=way.policy()).stats
        assert way.accepted == pytest.approx(stats.mean_accepted)
        assert way.acceptance == pytest.approx(stats.acceptance, abs=0.002)  # one draft, wrong already, ends a text
    way = next(way for way in found.leaving if (way.layer, way.threshold) == (3, 0.5))
    leaves = sure_LT[2] > 0.5
    assert (way.left, way.kept) == pytest.approx((leaves.mean(), 1 - (leaves & ~right_LT[2]).mean()))
    assert way.mean_depth == pytest.approx(4 - leaves.mean())
    assert len(found.drafting) == 3 * len(DRAFTS) * 2 and found.weights
    assert "Survey(model=" in repr(found) and len(repr(found)) < 2500


def changed(**of_drafting) -> Survey:
    """The survey, with other figures of all drafts, and no token kept by an exit."""
    found = surveyed()
    return dataclasses.replace(found, drafting=tuple(dataclasses.replace(way, **of_drafting) for way in found.drafting),
                               leaving=tuple(dataclasses.replace(way, kept=0.5) for way in found.leaving))


@pytest.mark.parametrize(("found", "says"), [
    (changed(speed=1.4, acceptance=0.9, first_ids=None), "sled.SelfSpeculation(1, draft=1): 1.40 times"),
    (changed(speed=1.4, acceptance=0.9, first_ids=FEW), "sled.SelfSpeculation(1, draft=1, first_ids=48): 1.40 times"),
    (changed(speed=1.4, acceptance=0.9), "are of 145 tokens alone"),
    (changed(speed=1.4, bound_speed=1.5, acceptance=0.2), "do not speak. Nearest is layer"),
    (changed(speed=1.0, bound_speed=1.5, acceptance=0.5), "speak, but here, in batches of 4, no exit"),
    (changed(speed=0.8, bound_speed=0.8, acceptance=0.1), "do not speak. Nearest is layer"),
    (dataclasses.replace(changed(speed=0.8, bound_speed=0.8), layers=tuple(
        dataclasses.replace(said, pays_from=None) for said in surveyed().layers)), "not even drafts"),
    (dataclasses.replace(changed(speed=0.8, bound_speed=0.8), layers=tuple(
        dataclasses.replace(said, pays_from=0.9) for said in surveyed().layers)), "Training would hardly help"),
], ids=["drafts", "of few", "rough", "cheap but wrong", "here not", "none", "never", "hardly"])
def test_the_verdict_says_what_to_do(found, says):
    assert says in found.verdict()
    assert max(map(len, found.table().splitlines())) <= 120 and len(found.table().splitlines()) == 6


def test_heads_are_advised_where_drafts_could_pay():
    for pays_from, heads in (((0.3, 0.34, 0.6), (1, 2)), ((0.3, 0.6, 0.8), (1,)), ((0.4, 0.6, 0.8), (1, 2)),
                             ((0.4, 0.6, 0.65), (2, 3)), ((0.8, 0.9, None), ())):
        said = [dataclasses.replace(each, pays_from=pays)
                for each, pays in zip(surveyed().layers, pays_from, strict=True)]
        assert dataclasses.replace(surveyed(), layers=tuple(said)).heads() == heads


def test_it_is_drawn(tmp_path):
    assert picture(surveyed(), tmp_path / "deep" / "layers.svg").stat().st_size


def test_the_command_recommends_what_generate_takes(demo, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sled, "load", lambda *_, **__: demo)
    found, asked = changed(speed=1.4, first_ids=FEW), {}

    @functools.wraps(sled.layers)
    def layers(lm, prompts, **settings):
        asked.update(settings, prompts=prompts)
        return found

    monkeypatch.setattr(sled, "layers", layers)
    words = ["--problems", "3", "-n", "7", "--no-profile", "--json", str(tmp_path / "layers.json")]
    assert main(["layers", *words]) == 0
    assert len(asked.pop("prompts")) == 3 and asked == dict(max_new_tokens=7, batch_size=1, profile=False)
    options = capsys.readouterr().out.rpartition("options of sled generate: ")[2]
    made = parse(Generate, "sled generate", [*options.split(), "Hi"]).exit_options.settings()
    assert made["exits"] == found.recommended[0].policy() == sled.SelfSpeculation(1, 1, first_ids=FEW)
    assert json.loads((tmp_path / "layers.json").read_text())["recommended"]["drafting"]["layer"] == 1


@pytest.mark.parametrize(("change", "error", "says"), [
    (dict(decode=lambda *_, **__: generate(PROMPTS[:2], max_new_tokens=1)), CalibrationError, "all 2 answers end with"),
    (dict(config=dataclasses.replace(CONFIG, num_layers=1, windows=(None,))), SettingError, "has 1 layer, so there"),
])
def test_what_no_layer_can_tell_is_refused(change, error, says):
    lm = copy.copy(tiny_lm())
    vars(lm).update(change)
    with pytest.raises(error, match=says):
        sled.layers(lm, PROMPTS[:2], progress=False)


def test_a_saved_survey_is_read_as_it_was(tmp_path):
    path, untimed = tmp_path / "layers.json", dataclasses.replace(surveyed(), costs=None)
    for found in (surveyed(), untimed):
        found.save(path)
        assert Survey.load(path) == found
    text = path.read_text()
    for changed, says in ((text.replace('"tokens": 145', '"tokens": 146'), "was changed after it was made"),
                          (text.replace('"format": 2', '"format": 1'), "is no survey of layers that this version"),
                          ("[]", "not a JSON object"), ("{}", "is no survey")):
        assert changed != text
        path.write_text(changed)
        with pytest.raises(CalibrationError, match=says):
            Survey.load(path)


@pytest.mark.exhaustive
def test_this_machine_is_timed():
    lm = tiny_lm()
    costs = profile.measured_costs(lm, [np.array(PROMPTS[0])], draft_layer=2, exit_layer=2, windows=[9], capacity=48,
                                   progress=False)
    assert min(costs.layer_of.values()) > 0 and costs.step > 0
