"""Options of the command that derive from declared settings: their types, defaults, help, and what they build."""

import dataclasses
import re

import pytest
import tyro

import sled
from sled.cli.derived import build, choice, derive, offer, settings_by_choice, settings_of
from sled.cli.exit_options import POLICIES, SCHEDULES, ExitOptions
from sled.cli.options import FUSIONS, SAMPLING, FusionOptions, SamplingOptions
from sled.errors import SettingError
from sled.settings.decorator import settings
from sled.settings.field import declared, setting
from sled.settings.rules import Flag, Number, OneOf, OrNone, Whole


@settings
class Warm:
    heat: float = setting(Number(0, hint="1 is usual"), default=1.5, help="how warm it is")
    level: str = setting(OneOf(("low", "high")), default="low", help="one of two levels")
    bold: bool = setting(Flag(hint="True is loud"), default=False, help="whether it is bold")


@settings
class Cold:
    heat: float = setting(Number(0, hint="1 is usual"), default=0.5, help="how warm it is")
    count: int | None = setting(OrNone(Whole(1, hint="None is all")), default=None, help="how many there are")


OFFERS = {"warm": offer(Warm, "level", "bold", warmth="heat"), "cold": offer(Cold, "count", warmth="heat")}
Options = derive("Options", choice("what", OFFERS, default="none", help="Choose."), *settings_by_choice(OFFERS))


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--what", "warm"], Warm()),
    (["--what", "warm", "--warmth", "3", "--level", "high", "--bold"], Warm(3, "high", True)),
    (["--what", "cold", "--warmth", "0", "--count", "4"], Cold(0, 4)),
])
def test_options_build_what_was_chosen(arguments, expected):
    options = tyro.cli(Options, args=arguments)
    assert build(options, OFFERS[options.what]) == expected


def test_help_tells_whose_setting_it_is_and_its_default(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Options, args=["--help"])
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "warm, cold: how warm it is; 1 is usual. (default: 1.5 for warm, 0.5 for cold)" in said
    assert "cold: how many there are; None is all. (default: None)" in said
    assert "--bold, --no-bold warm: whether it is bold; True is loud. (default: False)" in said


def test_a_class_of_its_own_shows_its_defaults(capsys):
    options = derive("Own", *settings_of(offer(Warm, "heat", "level")))
    assert options() == options(1.5, "low")
    with pytest.raises(SystemExit):
        tyro.cli(options, args=["--help"])
    assert "How warm it is; 1 is usual. (default: 1.5)" in re.sub(r"[\s│]+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("of", [*FUSIONS.values(), *POLICIES.values(), *SCHEDULES.values(), SAMPLING],
                         ids=lambda of: of.kind.__name__)
def test_every_option_of_the_command_is_a_setting_with_a_help(of):
    for field in of.options.values():
        assert declared(of.kind)[field].help, field


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--fusion", "dola", "--layers", "high", "--lower-bound", "-2500"], sled.DoLa(layers="high", lower_bound=-2500)),
    (["--fusion", "sled", "--layers", "1", "3", "--norm-early", "True"], sled.SLED(layers=(1, 3), norm_early=True)),
    (["--fusion", "sled", "--layers", "blocks"], sled.SLED.preset("paper")),
    (["--fusion", "sled", "--lower-bound", "-2500"], sled.SLED(lower_bound=-2500)),
    (["--fusion", "clamp", "--lower-bound", "-5"], sled.ClampOnly(lower_bound=-5)),
])
def test_fusions(arguments, expected):
    assert tyro.cli(FusionOptions, args=arguments).strategy() == expected


def test_an_option_of_another_fusion_is_refused():
    with pytest.raises(SettingError, match="--lower-bound has no meaning"):
        FusionOptions(lower_bound=-2500.0).strategy()


def test_exits_and_draws():
    early = tyro.cli(ExitOptions, args=["--exits", "early", "--exit-layers", "2", "4", "--threshold", "0.7"])
    assert early.settings() == dict(exits=sled.EarlyExit((2, 4), threshold=0.7), schedule=None)
    drafts = tyro.cli(ExitOptions, args=["--exits", "speculate", "--exit-layers", "2", "--draft", "3", "--schedule",
                                         "gather", "--gather-rows", "2"])
    assert drafts.settings() == dict(exits=sled.SelfSpeculation(2, draft=3), schedule=sled.Gather(rows=2))
    draws = tyro.cli(SamplingOptions, args=["--top-k", "5", "--seed", "3"])
    assert draws.sampling() == sled.Sampling(top_k=5) and draws.seed == 3
    assert dataclasses.replace(draws, top_k=0).sampling() == sled.Sampling()
    with pytest.raises(SystemExit):  # its weights are in no option
        tyro.cli(ExitOptions, args=["--exits", "early", "--exit-layers", "2", "--measure", "classifier"])
