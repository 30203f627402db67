"""Rotary positions against transformers: frequencies and amplitude of every way to stretch them, in every spelling."""

import dataclasses

import numpy as np
import pytest

from sled.errors import ConfigError
from sled.models import LongRopeScaling, Rope, YarnScaling
from sled.models.families.registry import format_config, parse_config

SHAPE = dict(vocab_size=8, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=4096, model_type="llama", rope_theta=10_000.0)
ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 1024}
LONG = {"rope_type": "longrope", ORIGINAL: 1024, "short_factor": [1.0 + i / 9 for i in range(32)],
        "long_factor": [1.0 + i for i in range(32)]}
SETTINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 512},
    "yarn": YARN,
    "yarn without a factor": YARN | {"factor": None},
    "yarn that shrinks": YARN | {"factor": 0.5},
    "yarn, not truncated": YARN | {"truncate": False, "factor": 32.0},
    "yarn, other ramp": YARN | {"beta_fast": 16, "beta_slow": 2},
    "yarn, a ramp of no length": YARN | {"beta_fast": 1e-6, "beta_slow": 1e-6, ORIGINAL: 64},
    "yarn, betas of 0": YARN | {"beta_fast": 0, "beta_slow": 0},
    "yarn, attention factor": YARN | {"attention_factor": 0.75},
    "yarn as DeepSeek-V2 has it": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "yarn with other weights": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn with one weight": YARN | {"mscale": 0.5},
    "yarn of a wide base": YARN | {"rope_theta": 5e6},
    "longrope": LONG,
    "longrope with a factor": LONG | {"factor": 16.0},
    "longrope that shrinks": LONG | {"factor": 0.5},
    "longrope, attention factor": LONG | {"attention_factor": 1.25},
}


def spelled(settings, spelling):
    """A config.json with these rotary positions."""
    if spelling == "rope_parameters":
        return {**SHAPE, spelling: {"rope_theta": SHAPE["rope_theta"], **settings}, "rope_theta": None}
    old = dict(settings)
    theta = old.pop("rope_theta", SHAPE["rope_theta"])
    return {**SHAPE, "rope_theta": theta, "rope_scaling": {"type": old.pop("rope_type"), **old}}


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_and_amplitude_are_those_of_transformers(name, transformers):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = SETTINGS[name]
    config = transformers.LlamaConfig(**{**spelled(settings, "rope_parameters"), "rope_theta": SHAPE["rope_theta"]})
    rope = parse_config(spelled(settings, "rope_parameters")).rope
    assert parse_config(spelled(settings, "rope_scaling")).rope == rope
    for long in (False, True) if settings["rope_type"] == "longrope" else (False,):
        if long:
            rope = dataclasses.replace(rope, scaling=dataclasses.replace(rope.scaling, long_context=True))
        expected, amplitude = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, "cpu", seq_len=4096 if long else 1024)
        np.testing.assert_allclose(rope.frequencies(64), expected.numpy(), rtol=2e-6)
        assert rope.amplitude() == pytest.approx(amplitude, rel=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_they_are_written_so_that_they_are_read_as_the_same(name, transformers):
    config = parse_config(spelled(SETTINGS[name], "rope_parameters"))
    written = format_config(config, "float32")
    assert parse_config(written) == config
    for other in ({"rope_parameters": None}, {"rope_scaling": None, "rope_theta": None}):
        assert parse_config({**written, **other}) == config  # each spelling says all


def test_how_many_positions_a_text_may_have():
    def context(settings, **fields):
        return parse_config({**spelled(settings, "rope_scaling"), **fields}).context

    assert context(SETTINGS["dynamic"]) == context(SETTINGS["linear"]) == 4096
    assert context(YARN | {"factor": 8.0}) == 8192  # whoever adds YaRN by hand leaves max_position_embeddings
    assert context(YARN, max_position_embeddings=40960) == 40960
    assert context(LONG) == 1024
    long = LongRopeScaling((1.0,) * 4, (2.0,) * 4, 4.0, 1024, long_context=True)
    assert Rope(scaling=long).context(4096) == 4096
    assert context(LONG, max_position_embeddings=512) == 512


@pytest.mark.parametrize("settings, says", [
    (YARN | {"factor": -1.0}, "'factor' is -1.0, but it must be above 0"),
    (YARN | {"beta_fast": 0.5}, "beta_fast 0.5 must not be below beta_slow 1.0"),
    (YARN | {"beta_slow": -1}, "beta_slow -1.0, and both above 0"),
    (YARN | {"truncate": 1}, "'truncate' is 1, but it must be of type bool"),
    (YARN | {"attention_factor": "1"}, "'attention_factor' is '1', but it must be of type float"),
    (YARN | {ORIGINAL: 0}, "original_max_position_embeddings 0 and rope_theta 10000.0 must be above 1 for yarn"),
    (YARN | {"rope_theta": 1.0}, "rope_theta 1.0 must be above 1"),
    (LONG | {"short_factor": [1.0] * 31}, "short_factor of the rotary positions has 31 entries, but 32 pairs turn"),
    (LONG | {"long_factor": [0.0] * 32}, "long_factor: '0' is 0.0, but it must be above 0"),
    (LONG | {"long_factor": 2.0}, "'long_factor' is 2.0, but it must be of type list"),
    ({"rope_type": "longrope"}, "'short_factor' is missing"),
    ({"rope_type": "dynamic"}, "'factor' is missing"),
    ({"rope_type": "proportional"}, "rotary scaling 'proportional' is not supported .*yarn, dynamic, longrope"),
])
def test_what_cannot_be_is_refused_by_name(settings, says):
    with pytest.raises(ConfigError, match=f"config.json.*{says}"):
        parse_config(spelled(settings, "rope_scaling"))


def test_a_share_of_a_head_turns_an_even_number_of_its_numbers():
    assert Rope(share=0.75).width(128) == 96
    for share, head_dim in ((0.25, 6), (0.01, 64), (1.5, 64), (1.0, 7)):
        with pytest.raises(ConfigError, match="even number of at least 2, within the head"):
            Rope(share=share).check(head_dim)


def test_yarn_in_the_units_of_its_paper():
    """Pairs that turn more than 32 times over the original context stay, those that turn less than once shrink."""
    rope = Rope(10_000.0, YarnScaling(4.0, 4096, truncate=False))
    plain, turned = Rope(10_000.0).frequencies(128), rope.frequencies(128)
    turns = plain * 4096 / (2 * np.pi)
    np.testing.assert_allclose(turned[turns > 32], plain[turns > 32])
    np.testing.assert_allclose(turned[turns < 1], plain[turns < 1] / 4)
    assert rope.amplitude() == pytest.approx(0.1 * np.log(4) + 1)
