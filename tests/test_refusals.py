"""What is refused where a user gives it: settings, prompts, models, engines, calibrations; and what the error says."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from headed_models import bare, headed
from tiny_lm import PROMPTS, talking_lm

import sled
from sled.bench.layers import run_layers_bench
from sled.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    DownloadError,
    PromptError,
    SettingError,
    SledError,
)
from sled.eval.numbers import exact_match
from sled.eval.sweep.grid import early_exits
from sled.fusion import SLED, ClampOnly, ConfidentDecoding, DoLa, FinalLayer, LayerAverage, SharedHead
from sled.lm import LM
from sled.models import ExitHeads, from_pre_exit
from sled.train.objective.exit_heads import partition

W_VD = jnp.ones((6, 4))


# The rules themselves are tested in test_checks.py: here stands a case for every setting that has one.
@pytest.mark.parametrize(("kind", "wrong", "says"), [
    (SLED, dict(rate=-1), "SLED.rate is -1, but must be a number in [0, 1e+06]; 0.5 to 3 is usual"),
    (SLED, dict(scale=0), "SLED.scale is 0, but must be a whole number from 1 to 2147483647; 5, 10 or 20 is usual"),
    (SLED, dict(steps=0), "SLED.steps is 0, but must be a whole number from 1 to 1000; 1 is usual"),
    (SLED, dict(temperature=0), "SLED.temperature is 0, but must be a number in [1e-06, 1e+06]; 1 is"),
    (SLED, dict(lower_bound=np.nan), "SLED.lower_bound is nan, but must be a number in [-inf, 1e+06]"),
    (SLED, dict(layers="low"), "SLED.layers is 'low', but must be None or 'all' or 'blocks' or a tuple"),
    (SLED, dict(log_softmax="no"), "SLED.log_softmax is 'no', but must be True or False"),
    (SLED, dict(norm_early=0), "SLED.norm_early is 0, but must be True or False"),
    (ClampOnly, dict(scale=0), "ClampOnly.scale is 0"),
    (ClampOnly, dict(log_softmax=1), "ClampOnly.log_softmax is 1, but must be True or False"),
    (DoLa, dict(relative_top=0), "DoLa.relative_top is 0, but must be a number in (0, 1]; 0.1 is usual"),
    (DoLa, dict(lower_bound="low"), "DoLa.lower_bound is 'low'"),
    (DoLa, dict(layers="middle"), "DoLa.layers is 'middle', but must be 'low' or 'high' or a tuple"),
    (ConfidentDecoding, dict(window=0), "ConfidentDecoding.window is 0, but must be a whole number from 1 to"),
    (LayerAverage, dict(weights=(1.0, -1.0)), "LayerAverage.weights[1] is -1.0, but must be a number in [0, 1e+30]"),
    (LayerAverage, dict(weights=(0.0, 0.0)), "LayerAverage.weights is (0.0, 0.0), but must not be all 0"),
    (LayerAverage, dict(weights=np.zeros(2)), "LayerAverage.weights is array([0., 0.]), but must not be all 0 for any"),
    (LayerAverage, dict(weights=np.array([[1, 0], [0, 0.]])), "LayerAverage.weights is array([[1., 0.],"),
    (LayerAverage, dict(weights=jnp.zeros((1, 2))), "LayerAverage.weights is Array([[0., 0.]], dtype=float32), but"),
    (LayerAverage, dict(weights=np.zeros((1, 0))), "LayerAverage.weights is array([], shape=(1, 0)"),
    (LayerAverage, dict(weights=np.full(2, 1e31)), "LayerAverage.weights, an array, is 1e+31, but must be a number"),
    (LayerAverage, dict(weights=2.0), "LayerAverage.weights is 2.0, but must be a tuple of numbers"),
    (SharedHead, dict(w_VD=W_VD, tile=0), "SharedHead.tile is 0, but must be a whole number of at least 1"),
    (SharedHead, dict(w_VD=W_VD, shards=0), "SharedHead.shards is 0, but must be a whole number from 1 to"),
    (SharedHead, dict(w_VD=W_VD, shards=4, tile=2), "SharedHead.shards is 4, but does not divide the vocabulary of 6 "),
    (sled.EarlyExit, dict(layers=2, threshold=40.0), "EarlyExit.threshold is 40.0"),
    (sled.EarlyExit, dict(layers=(1, 2), threshold=(0.5, 0.5, 0.5)), "EarlyExit.threshold has 3 numbers for 2 exits"),
    (sled.EarlyExit, dict(layers=(1, 2), threshold=(0.5, 1.5)), "EarlyExit.threshold[1] is 1.5"),
    (sled.EarlyExit, dict(layers=0), "EarlyExit.layers is 0"),
    (sled.EarlyExit, dict(layers=()), "EarlyExit.layers is ()"),
    (sled.EarlyExit, dict(layers=2, measure="hope"), "EarlyExit.measure is 'hope'"),
    (sled.EarlyExit, dict(layers=2, measure="classifier"), "EarlyExit: measure=\"classifier\" and a trained"),
    (sled.EarlyExit, dict(layers=2, measure="classifier", classifier=np.ones(3)), "EarlyExit.classifier is array"),
    *((sled.EarlyExit, dict(layers=2, measure="classifier", classifier=sled.Classifier(*weights)), says)
      for weights, says in (
        ((1.0, 1.0), "EarlyExit.classifier has weights of the types float and float, but must have arrays"),
        (([[0.0] * 4], [0.0]), "EarlyExit.classifier has weights of the types list and list, but must have arrays"),
        ((np.ones((1, 4)), np.ones(3)), "EarlyExit.classifier has weights of the shapes (1, 4) and (3,), but for the"),
        ((np.ones((2, 4)), np.ones(1)), "EarlyExit.classifier has weights of the shapes (2, 4) and (1,), but for the"),
        ((np.ones(4), np.ones(1)), "EarlyExit.classifier has weights of the shapes (4,) and (1,), but for the"),
        ((np.full((1, 4), np.nan), np.ones(1)), "EarlyExit.classifier has weights that are not finite numbers"),
        ((np.full((1, 4), 1e39), np.ones(1)), "EarlyExit.classifier has weights that are not finite numbers"),
        ((np.array([["a"]]), np.ones(1)), "EarlyExit.classifier has weights that are not finite numbers"))),
    (sled.EarlyExit, dict(layers=2, kv="none"), "EarlyExit.kv is 'none'"),
    (sled.EarlyExit, dict(layers=2, decay="fast"), "EarlyExit.decay is 'fast'"),
    (sled.EarlyExit, dict(layers=2, max_deferred=0), "EarlyExit.max_deferred is 0"),
    (sled.SelfSpeculation, dict(layer=2, draft=0), "SelfSpeculation.draft is 0"),
    (sled.SelfSpeculation, dict(layer=2, draft=jnp.array([1, 2])), "SelfSpeculation.draft is an array, whose entries"),
    (sled.SelfSpeculation, dict(layer=2, confidence=2), "SelfSpeculation.confidence is 2"),
    (sled.SelfSpeculation, dict(layer=(1, 2)), "SelfSpeculation.layer is (1, 2)"),
    (sled.SelfSpeculation, dict(layer=2, adaptive="yes"), "SelfSpeculation.adaptive is 'yes', but must be True or"),
    (sled.SelfSpeculation, dict(layer=2, vocabulary="abc"), "SelfSpeculation.vocabulary is 'abc', but must be a list"),
    (sled.SelfSpeculation, dict(layer=2, vocabulary=[0.5]), "SelfSpeculation.vocabulary is [0.5], but must be a list"),
    (sled.SelfSpeculation, dict(layer=2, vocabulary=[]), "SelfSpeculation.vocabulary is [], but must be a list of tok"),
    (sled.SelfSpeculation, dict(layer=2, first_ids=0), "SelfSpeculation.first_ids is 0"),
    (sled.SelfSpeculation, dict(layer=2, first_ids=2, vocabulary=[1]), "first_ids is 2, but vocabulary names the"),
    (sled.Gather, dict(rows=0), "Gather.rows is 0"),
    (sled.Gather, dict(patience=-1), "Gather.patience is -1"),
    (sled.Sampling, dict(temperature=-1), "Sampling.temperature is -1"),
    (sled.Sampling, dict(top_p=0), "Sampling.top_p is 0"),
    (sled.Sampling, dict(top_k=1.5), "Sampling.top_k is 1.5"),
    (sled.Sampling, dict(min_p=2), "Sampling.min_p is 2"),
    (sled.Sampling, dict(repetition_penalty=0), "Sampling.repetition_penalty is 0"),
    (sled.Limits, dict(threshold_floor=40.0), "Limits.threshold_floor is 40.0"),
    (sled.Limits, dict(min_layer=-1), "Limits.min_layer is -1"),
    (sled.Limits, dict(budget=0), "Limits.budget is 0"),
    (sled.Limits, dict(show_exits="no"), "Limits.show_exits is 'no', but must be True or False"),
    (ExitHeads, dict(layers=()), "ExitHeads.layers is (), but must be layers of at least 1"),
    (ExitHeads, dict(layers=(3, 1)), "ExitHeads.layers is (3, 1)"),
    (ExitHeads, dict(layers=(1,), kind="lens"), "ExitHeads.kind is 'lens', which is unknown; choose one of projection"),
    (ExitHeads, dict(layers=(1,), kind="projection"), "nothing of their own; leave the heads out"),
    (ExitHeads, dict(layers=(1,), tied=0), "ExitHeads.tied is 0, but must be True or False"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_setting_out_of_range_is_refused_by_name(kind, wrong, says):
    with pytest.raises(SettingError, match=re.escape(says)):
        kind(**wrong)


class Unregistered(sled.FinalLayer):
    """A strategy that was not made a pytree."""


def tune(lm, exits, **settings):
    return sled.tune(lm, **{"prompts": PROMPTS, "exits": exits, "progress": False, **settings})


def calibrate(lm, **settings):
    return sled.calibrate(lm, **{
        "prompts": PROMPTS * 8, "exits": sled.EarlyExit(1), "delta": 0.2, "epsilon": 0.1, "grid": (0.9,),
        "max_new_tokens": 4, "batch_size": 4, "progress": False, **settings})


def risk(text, reference):
    return 0


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda lm: sled.load(""), SettingError, "source is ''"),
    (lambda lm: sled.load("./nowhere"), CheckpointError, "nowhere"),
    (lambda lm: sled.load("demo", dtype="int8"), SettingError, "int8"),
    (lambda lm: sled.load("owner/no-such-model"), DownloadError, "owner/no-such-model"),
    # Prompts and continuations.
    (lambda lm: lm.generate(""), PromptError, "empty"),
    (lambda lm: lm.generate([]), PromptError, "no prompt"),
    (lambda lm: lm.generate(None), PromptError, "a prompt must be .* but None was given; of a generator"),
    (lambda lm: lm.stream(text for text in "ab"), PromptError, r"give list\(\.\.\.\)"),
    (lambda lm: lm.generate({"input_ids": [1]}), PromptError, "a tokenizer returned its input_ids"),
    (lambda lm: lm.generate({"a", "b"}), PromptError, "must be a string"),
    (lambda lm: lm.generate([1.5]), PromptError, "whole numbers"),
    (lambda lm: lm.generate([[1, 2], [3, 10**6]]), PromptError, "1000000"),
    (lambda lm: lm.generate([[1, -1]]), PromptError, "-1"),
    (lambda lm: lm.generate([1] * 48), PromptError, "48"),
    (lambda lm: lm.score(["a"], [3]), PromptError, r"one continuation by itself, \[3\]; give a list"),
    (lambda lm: lm.score("a", []), PromptError, "no"),
    (lambda lm: lm.score(["a", "b"], ["c"]), PromptError, "2 prompts"),
    (lambda lm: lm.score("a", [[1]]), PromptError, "both"),
    (lambda lm: lm.score([1] * 40, [[1] * 20]), PromptError, "60"),
    (lambda lm: lm.lens(["a", "b"]), PromptError, "one text, but 2"),
    # How a text is made.
    (lambda lm: lm.score(["AB", "CD"], "FG"), PromptError, "one continuation by itself, 'FG'; give a list"),
    (lambda lm: lm.score([[7], [8]], [9, 10]), PromptError, r"one continuation by itself, \[9, 10\]; give a list"),
    (lambda lm: exact_match("54", [5, 4]), SettingError, "texts is '54', but must be a list of texts"),
    (lambda lm: sled.calibrate(lm, ["a", "b"], exits=sled.EarlyExit(1), references="ab", risk=max), SettingError,
     "references is 'ab', but must be .*a list of right answers"),
    (lambda lm: early_exits([1], [0.5], measures="margins"), SettingError, "measure is 'margins', but must be one of"),
    (lambda lm: run_layers_bench("no-where"), SledError, "no-where"),
    (lambda lm: lm.generate("a", stop=5), SettingError, "stop is 5.* leave it out"),
    (lambda lm: lm.generate("a", stop=""), SettingError, "stop"),
    (lambda lm: lm.generate("a", max_new_tokens=0), SettingError, "max_new_tokens"),
    (lambda lm: lm.generate("a", batch_size=0), SettingError, "batch_size"),
    (lambda lm: lm.generate("a", seed=-1), SettingError, "seed is -1"),
    (lambda lm: lm.generate(["a", "b"], seed=2**32 - 1), SettingError, "from 0 to 4294967294"),
    (lambda lm: lm.generate("a", fusion=SLED), SettingError, r"class 'sled.*SLED'>.* give a strategy.* sled\.SLED\(\)"),
    (lambda lm: lm.generate("a", fusion=Unregistered()), SettingError, "that jax can trace"),
    (lambda lm: lm.score("a", "b", fusion=DoLa), SettingError, "DoLa"),
    (lambda lm: lm.lens("a", fusion=DoLa), SettingError, "DoLa"),
    (lambda lm: lm.generate("a", exits=(2, 4)), SettingError, r"exits is \(2, 4\), which is no Policy; give sled.E"),
    (lambda lm: lm.stream("a", schedule=3), SettingError, r"schedule is 3.* sled\.Gather"),
    (lambda lm: lm.generate("a", sampling=0.7), SettingError, r"sampling is 0\.7.* sled\.Sampling"),
    # What does not fit the model.
    (lambda lm: lm.generate("a", exits=sled.EarlyExit((1, 4))), SettingError, "model of 4 layers"),
    (lambda lm: lm.generate("a", exits=sled.SelfSpeculation(4)), SettingError, "model of 4 layers"),
    *((lambda lm, ids=ids: lm.generate("a", exits=sled.SelfSpeculation(1, vocabulary=ids)), SettingError,
       f"vocabulary has the token id {wrong}, but the model's are 0 to 60; leave it out")
      for ids, wrong in (([3, 61], 61), ([-1], -1), (np.array([2**40]), 2**40), (jnp.array([1, 99]), 99),
                         (range(70), 61))),
    (lambda lm: lm.generate("a", exits=sled.SelfSpeculation(1, first_ids=62)), SettingError, "the model has 61"),
    (lambda lm: lm.generate("a", exits=sled.EarlyExit(1, measure="classifier", classifier=sled.Classifier(
        np.ones((1, 7)), np.ones(1)))), SettingError, "hidden states of width 7, but the model's is 32"),
    (lambda lm: lm.generate("a", fusion=DoLa(layers=(99,))), SettingError, r"DoLa.layers is \(99,\), but 99 is no ear"),
    (lambda lm: SLED(layers="blocks").early_layers(1, tied=False), SettingError, r'SLED\(layers="blocks"\) finds no'),
    (lambda lm: DoLa().early_layers(3, tied=True), SettingError, 'finds none in a tied model of 3; use "high"'),
    (lambda lm: lm.generate("a", fusion=LayerAverage((1.0, 2.0))), SettingError, "got 2 weights for 5 candidate layer"),
    (lambda lm: LM(headed("projection, untied")).generate([7], exits=sled.EarlyExit(1), fusion=SLED()), SettingError,
     r"SLED looks at layers \(0,\) at the exit after layer 1, whose head has a projection .* use FinalLayer"),
    (lambda lm: bare().with_exit_heads(ExitHeads((3, 4))), ConfigError, r"layers \(3, 4\), but .* early exits 1 to 3"),
    (lambda lm: partition(nnx.state(bare())), SettingError, "no exit heads, so there is nothing to tune"),
    (lambda lm: from_pre_exit((1, 2)), SettingError, "pre-exit layer 1 reads the embeddings"),
    (lambda lm: SLED.preset("unknown"), SettingError, "'unknown'. is unknown; the presets are official-code, paper"),
    # Engines.
    (lambda lm: sled.Engine(lm, slots=0), SettingError, "slots is 0"),
    *((lambda lm, exits=exits: lm.generate("a", exits=exits), SettingError, says) for exits, says in (
        (sled.SelfSpeculation(1, draft=10**6), "SelfSpeculation.max_draft is 1048576, but the model's context"),
        (sled.SelfSpeculation(1, draft=2**31 - 1, max_draft=2**31 - 1), "max_draft is 2147483647, but"),
        (sled.EarlyExit(1, max_deferred=10**9), "EarlyExit.max_deferred is 1000000000, but the model"))),
    (lambda lm: sled.Engine(lm, exits=sled.EarlyExit(1, max_deferred=65)), SettingError, "max_deferred is 65, but"),
    (lambda lm: sled.Engine(lm, capacity=0), SettingError, "capacity is 0"),
    (lambda lm: sled.Engine(lm, capacity=49), SettingError, "capacity is 49.*2 to 48"),
    (lambda lm: sled.Engine(lm, exits=sled.EarlyExit(4)), SettingError, "no early exit of a model of 4"),
    (lambda lm: sled.Engine(lm, exits=sled.EarlyExit(4), limits=sled.Limits(constant_depth=True)), SettingError,
     "no early exit of a model of 4"),
    (lambda lm: sled.Engine(lm, limits=0.5), SettingError, "limits is 0.5"),
    (lambda lm: sled.Engine(lm, schedule="gather"), SettingError, "schedule is 'gather'"),
    (lambda lm: sled.Engine(lm, sampling=sled.Sampling(np.ones(8))), SettingError, "B is 1 here; a request is one row"),
    # Tuning.
    (lambda lm: sled.layers(lm, []), PromptError, "no prompt"),
    (lambda lm: sled.layers(lm, PROMPTS, batch_size=0), SettingError, "batch_size is 0"),
    (lambda lm: sled.layers(lm, PROMPTS, max_new_tokens=0), SettingError, "max_new_tokens is 0"),
    (lambda lm: sled.layers(lm, PROMPTS, profile=2), SettingError, "profile is 2, but must be True or False"),
    (lambda lm: sled.layers(lm, PROMPTS, profiles=True), SettingError, "did you mean profile"),
    (lambda lm: tune(lm, []), SettingError, "exits is empty"),
    (lambda lm: tune(lm, ["early"]), SettingError, "exits is 'early'"),
    (lambda lm: tune(lm, sled.EarlyExit(4)), SettingError, "no early exit of a model of 4"),
    (lambda lm: tune(lm, sled.EarlyExit(1), rounds=0), SettingError, "rounds is 0"),
    (lambda lm: tune(lm, sled.EarlyExit(1), prompts=[]), PromptError, "no prompt"),
    # Calibration.
    (lambda lm: calibrate(lm, delta=0), SettingError, r"delta is 0, .* number in \(0, 1\)"),
    (lambda lm: calibrate(lm, delta=1), SettingError, r"delta is 1, .* number in \(0, 1\)"),
    (lambda lm: calibrate(lm, epsilon=0), SettingError, r"epsilon is 0, .* number in \(0, 1\)"),
    (lambda lm: calibrate(lm, epsilon=1.0), SettingError, r"epsilon is 1\.0, .* number in \(0, 1\)"),
    (lambda lm: calibrate(lm, grid=()), SettingError, "at least one threshold"),
    (lambda lm: calibrate(lm, grid=0.9), SettingError, "grid is 0.9, but must be a list of thresholds"),
    (lambda lm: calibrate(lm, grid="0.9"), SettingError, "grid is '0.9', but must be a list of thresholds"),
    (lambda lm: calibrate(lm, grid=(1.5, 0.9)), SettingError, r"grid\[0\] is 1.5"),
    (lambda lm: calibrate(lm, grid=(0.9, -0.1)), SettingError, r"grid\[1\] is -0.1"),
    (lambda lm: calibrate(lm, prompts=[]), PromptError, "no prompt"),
    (lambda lm: calibrate(lm, prompts=PROMPTS), CalibrationError, "4 prompts show nothing .* give at least 11"),
    (lambda lm: calibrate(lm, loss="bleu"), SettingError, "loss is 'bleu'"),
    (lambda lm: calibrate(lm, loss=3), SettingError, "loss is 3"),
    (lambda lm: calibrate(lm, loss=lambda early, full: 1.2), CalibrationError, "is 1.2 for prompt 0"),
    (lambda lm: calibrate(lm, loss=lambda early, full: -0.1), CalibrationError, "is -0.1 for prompt 0"),
    (lambda lm: calibrate(lm, loss=lambda early, full: None), CalibrationError, "is nan"),
    (lambda lm: calibrate(lm, loss=lambda early, full: "a"), CalibrationError, "not a number"),
    (lambda lm: calibrate(lm, references=5, risk=risk), SettingError, "references is 5, but must be a list"),
    (lambda lm: calibrate(lm, references=[1], risk=risk), SettingError, "1 references were given for 32 prompts"),
    (lambda lm: calibrate(lm, references=["r"]), SettingError, "references was given without risk"),
    (lambda lm: calibrate(lm, risk=risk), SettingError, "risk was given without references"),
    (lambda lm: calibrate(lm, loss="rouge", references=["r"], risk=risk), SettingError, "replaces the loss"),
    (lambda lm: calibrate(lm, references=["r"], risk="f1"), SettingError, "risk must be a function"),
    (lambda lm: calibrate(lm, exits=sled.SelfSpeculation(2)), SettingError, "SelfSpeculation, which has no threshold"),
    (lambda lm: calibrate(lm, exits=sled.EarlyExit(4)), SettingError, "no early exit of a model of 4 layers"),
    (lambda lm: calibrate(lm, exits=sled.EarlyExit(1, min_layer=np.zeros(32, int))), SettingError, "one value for all"),
    (lambda lm: calibrate(lm, sampling=sled.Sampling(np.ones(32))), SettingError, "one value for all"),
    (lambda lm: calibrate(lm, batch_size=0), SettingError, "batch_size is 0"),
])
def test_what_cannot_be_is_refused_and_says_why(call, error, says):
    with pytest.raises(error, match=says):
        call(talking_lm())


@pytest.mark.parametrize(("call", "says"), [
    (lambda lm: sled.SLED(alpha=1), "SLED has no argument 'alpha'; did you mean rate?"),
    (lambda lm: sled.SLED(evolution_lower_bound=-1), "did you mean lower_bound?"),
    (lambda lm: sled.EarlyExit(2, treshold=1), "EarlyExit has no argument 'treshold'; did you mean threshold?"),
    (lambda lm: sled.EarlyExit(exit_layers=2), "did you mean layers?"),
    (lambda lm: sled.Sampling(temp=1), "did you mean temperature?"),
    (lambda lm: sled.DoLa(xyz=1), "it has layers, relative_top, lower_bound, norm_early"),
    (lambda lm: dataclasses.replace(sled.SLED(), rates=3), "did you mean rate?"),
    (lambda lm: sled.Decoding(rate=2), "give fusion=sled.SLED(rate=...)"),
    (lambda lm: lm.generate("a", temperature=1), "give sampling=sled.Sampling(temperature=...)"),
    (lambda lm: lm.generate("a", max_tokens=1), "did you mean max_new_tokens?"),
    (lambda lm: lm.chat("a", do_sample=True), "did you mean sampling?"),
    (lambda lm: lm.stream("a", chunk_size=1), "LM.stream has no argument 'chunk_size'; did you mean chunk?"),
    (lambda lm: lm.score("a", "b", threshold=1), "it has prompts, continuations, fusion, normalise, batch_size"),
    (lambda lm: lm.lens("a", k=3), "give fusion=sled.SLED(scale=...)"),
    (lambda lm: lm.save("a", torch_dtype="x"), "did you mean dtype?"),
    (lambda lm: sled.load("demo", device_map="auto"), "load has no argument 'device_map'; it has source, dtype, rev"),
    (lambda lm: sled.Engine(lm, slot=2), "Engine has no argument 'slot'; did you mean slots?"),
    (lambda lm: calibrate(lm, threshold=0.9), "give exits=sled.EarlyExit(threshold=...)"),
])
def test_an_argument_of_another_name_is_told_the_one_that_was_meant(call, says):
    with pytest.raises(SettingError) as refused:
        call(talking_lm())
    assert says in str(refused.value)


def test_bounds_beyond_the_model_mean_all_of_it():
    lm, [plain] = talking_lm(), talking_lm().generate("a", max_new_tokens=4).tokens
    assert lm.generate("a", max_new_tokens=4, exits=sled.EarlyExit(1, 0.0, min_layer=100)).tokens == [plain]
    whole = [lm.score("a", "b", fusion=fusion).logprobs for fusion in (FinalLayer(), ClampOnly(scale=10**6))]
    np.testing.assert_allclose(*whole, rtol=1e-6)
    long = lm.generate("a", max_new_tokens=10**12)
    assert len(long.tokens[0]) == 47 or long.finish_reasons == ["eos"]
