"""An exit policy as a user writes one: a rule and a memory of its own, in a file of one's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_folders import random_decoder
from tiny_lm import CAPACITY, PROMPTS, check_caches, generate, tiny_lm

import sled
from sled.errors import SettingError
from sled.eval.methods import Method
from sled.eval.questions import Questions
from sled.eval.sweep.sweep import sweep
from sled.exits.policy import Decision, ExitView, Policy, with_last
from sled.export.forms import export_program
from sled.models import save_folder
from sled.settings.decorator import setting, settings
from sled.settings.rules import Number, Whole


@settings
class Streak(Policy):
    """Leaves after `layer` once the exit was surer than the threshold for `length` tokens in a row."""

    layer: int = setting(Whole(1, hint="a layer below the last"), help="the layer to leave after")
    threshold: float = setting(Number(0, 1, hint="0.9 is usual"), default=0.9, rows="B", help="how sure")
    length: int = setting(Whole(1, hint="2 is usual"), default=2, rows="B", help="tokens in a row")

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return with_last("Streak.layer", (self.layer,), num_layers)

    def initial_memory(self, batch: int):
        return jnp.zeros(batch, jnp.int32)

    def at_exit(self, view: ExitView) -> Decision:
        logits_BV = view.fused_logits()
        sure_B = jax.nn.softmax(logits_BV).max(-1) > self.threshold
        streak_B = jnp.where(view.here_B, jnp.where(sure_B, view.memory + 1, 0), view.memory)
        return Decision(view.here_B & (streak_B >= self.length), logits_BV, streak_B)

    def with_threshold(self, threshold: float) -> "Streak":
        return dataclasses.replace(self, threshold=threshold)

    @property
    def lowest_threshold(self) -> float:
        return float(np.min(self.threshold))


OFTEN = Streak(2, threshold=0.05)


def test_it_leaves_by_its_own_rule_and_memory():
    out = generate(exits=OFTEN)
    left = [layers.count(2) for layers in out.exit_layers]
    assert any(left) and all(layers[:1] != [2] for layers in out.exit_layers)  # no streak of two at the first token
    assert generate(exits=OFTEN.with_threshold(1.0)).tokens == generate().tokens
    check_caches(OFTEN)


@settings
class Narrow(Policy):
    """Every second token leaves at the second exit, whose logits are of a narrower type."""

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return (1, 2, num_layers)

    def at_exit(self, view: ExitView) -> Decision:
        logits_BV = view.fused_logits()
        leaves_B = view.here_B & (view.index == 1) & (view.emitted_B % 2 == 1)
        return Decision(leaves_B, logits_BV.astype(jnp.bfloat16) if view.index else logits_BV, view.memory)


@settings
class NarrowFirst(Policy):
    """No token leaves at its one exit, whose logits are of a narrower type than the last layer's."""

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return (1, num_layers)

    def at_exit(self, view: ExitView) -> Decision:
        return Decision(jnp.zeros_like(view.here_B), view.fused_logits().astype(jnp.float8_e4m3fn), view.memory)


def test_narrow_logits_of_an_exit_do_not_narrow_the_last_layers():
    assert generate(exits=NarrowFirst()).tokens == generate().tokens


def test_exits_may_give_logits_of_different_types():
    for layers in generate(exits=Narrow()).exit_layers:
        assert all((layer == 2) == (at % 2 == 1) for at, layer in enumerate(layers))


def test_neither_batch_mates_nor_the_schedule_change_a_row():
    together = generate(exits=OFTEN)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(prompt, exits=OFTEN, schedule=sled.Gather(3, 4))
        assert (alone.tokens[0], alone.exit_layers[0]) == (together.tokens[i], together.exit_layers[i])


def test_the_engine_serves_it_and_its_operator_sees_its_threshold():
    alone = generate(exits=OFTEN)
    engine = sled.Engine(tiny_lm(), slots=2, capacity=CAPACITY, exits=OFTEN, limits=sled.Limits(threshold_floor=0.05))
    requests = [engine.submit(prompt, max_new_tokens=CAPACITY) for prompt in PROMPTS]
    assert [request.result().tokens for request in requests] == alone.tokens
    with pytest.raises(SettingError, match=r"Streak.threshold comes down to 0.01"):
        engine.submit(PROMPTS[0], exits=OFTEN.with_threshold(0.01))


def test_it_is_tuned_and_calibrated(tmp_path):
    lm = tiny_lm()
    tuned = sled.tune(lm, PROMPTS, exits=OFTEN, rounds=1, max_new_tokens=4, progress=False)
    assert "Streak(layer=2" in tuned.table()
    record = sled.calibrate(lm, PROMPTS * 8, exits=OFTEN, delta=0.3, epsilon=0.1, grid=(1.0, 0.05), loss="exact",
                            max_new_tokens=4, progress=False)
    record.save(tmp_path / "record.json")
    again = sled.Calibration.load(tmp_path / "record.json")
    assert again.policy(lm, OFTEN, max_new_tokens=4) == OFTEN.with_threshold(record.threshold)


@pytest.mark.filterwarnings("ignore::sled.errors.EvaluationWarning")  # of one question, which it cannot solve
def test_it_is_swept(demo, tmp_path):
    asked = Questions(("Question: 2+3?\nAnswer:",), (5,), "one question")
    sweep(demo, [Method("streak", exits=Streak(2))], asked, tmp_path, rounds=1, max_new_tokens=4, progress=False)
    assert "Streak" in (tmp_path / "sweep.csv").read_text()


def test_it_is_exported(tmp_path):
    save_folder(random_decoder(), tmp_path / "model")
    export_program(tmp_path / "model", tmp_path / "program", sled.Decoding(exits=Streak(1, threshold=0.1)))
    assert (tmp_path / "program" / "generate.jax_export").stat().st_size > 0
