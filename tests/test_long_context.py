"""Models with two ways to compute positions (longrope): each is transformers', and no text goes beyond its way."""

import dataclasses

import numpy as np
import pytest

import sled
from sled.errors import ConfigError, PromptError, SettingError
from sled.models import load_folder, save_folder
from sled.models.families.registry import format_config
from sled.train.data.packing import Layout
from sled.train.data.rows import read_rows
from sled.train.initial_model import prepare_initial_model

ORIGINAL = 16
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, "short_factor": [1.0, 1.1, 1.2, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 5.0]}
SHORT, LONG = (np.random.RandomState(3).randint(4, 48, size) for size in (14, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_model):
    return write_model(tmp_path_factory.mktemp("long") / "model", "llama", rope_scaling=LONGROPE, eos_token_id=None)


@pytest.fixture(scope="module")
def short(folder):
    return sled.load(folder)


@pytest.fixture(scope="module")
def long(folder):
    return sled.load(folder, long_context=True)


def test_each_way_is_that_of_transformers(folder, short, long, transformers):
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for lm, tokens in ((short, SHORT), (long, LONG)):
        with torch.no_grad():
            expected = model(torch.tensor(tokens)[None]).logits[0].log_softmax(-1).numpy()
        got = lm.score([tokens[:1].tolist()], [tokens[1:].tolist()]).logprobs[0]
        np.testing.assert_allclose(got, expected[np.arange(len(tokens) - 1), tokens[1:]], atol=1e-4)
    with torch.no_grad():
        out = model.generate(torch.tensor(LONG)[None], max_new_tokens=8, do_sample=False)[0, len(LONG):]
    assert long.generate(LONG.tolist(), max_new_tokens=8).tokens == [out.tolist()]
    assert short.config.context == ORIGINAL and long.config.context == 64
    assert "16 tokens; for more load it with long_context=True" in repr(short)


def test_a_text_beyond_the_short_way_is_refused_with_the_remedy(short, tmp_path):
    remedy = r"\(for more load it with long_context=True \(--long-context\)"
    text, part = LONG.tolist(), SHORT.tolist()
    for beyond in (lambda: short.generate(text, max_new_tokens=1), lambda: short.lens(text),
                   lambda: short.score(part, part), lambda: sled.Engine(short).submit(text)):
        with pytest.raises(PromptError, match=f"context holds 16, .*; shorten .* {remedy}"):
            beyond()
    for generate in (short.generate, short.stream):
        with pytest.raises(PromptError, match=f"14 tokens long and 3 new .* at most 2 new ones {remedy}"):
            generate(SHORT.tolist(), max_new_tokens=3)
    with pytest.raises(SettingError, match=r"capacity is 17, .* 16; .*context, and for more load it with long_context"):
        sled.Engine(short, capacity=17)
    assert len(short.generate(SHORT.tolist(), max_new_tokens=2).tokens[0]) == 2
    with pytest.raises(SettingError, match=f"Layout.context is 17, but the model's context holds 16; .* {remedy}"):
        read_rows(None, short.text, short.config, Layout(17))


def test_training_takes_one_way_or_the_other(folder, tmp_path):
    for context, long_context, positions in ((None, False, ORIGINAL), (None, True, 64), (20, True, 20)):
        to = tmp_path / f"{context}{long_context}"
        to.mkdir()
        model = prepare_initial_model(folder, None, context, to, long_context=long_context, resumed=False)
        assert model.context == positions and model.config.long_context == long_context
        assert model.decoder(0, None).config == model.config
    with pytest.raises(SettingError, match=r"context is 20, but .* 16 positions; .*long_context=True"):
        prepare_initial_model(folder, None, 20, tmp_path, resumed=False)


def test_a_folder_is_written_for_both(folder, long, tmp_path):
    written = load_folder(long.save(tmp_path / "saved"))
    assert written.config == load_folder(folder).config and written.for_long_context().config == long.config
    broken = dataclasses.replace(long.config, qkv_bias=True)
    with pytest.raises(ConfigError, match="out_bias"):
        format_config(broken, "float32")
    save_folder(written, tmp_path / "again")


def test_a_model_with_one_way_is_not_loaded_for_another(tiny_folder, command):
    with pytest.raises(SettingError, match=r"long_context is True, but this model has no .* up to 64; leave it out"):
        sled.load(tiny_folder("llama"), long_context=True)
    with pytest.raises(SettingError, match="long_context"):
        sled.load("demo", long_context=1)
    status, _, said = command("export", "demo", "--out", "x", "--long-context")
    assert status and "--long-context has no meaning for --form hf" in said
    status, _, said = command("generate", "Question", "--long-context")
    assert status and "this model has no rotary positions of their own for long texts" in said
