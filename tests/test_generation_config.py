"""A checkpoint's own sampling and ending tokens: what transformers' generate does with the same folder."""

import json
import warnings

import jax
import numpy as np
import pytest

import sled
from sled.decoding.checkpoint_sampling import checkpoint_sampling
from sled.decoding.sampling import processed_logits, seen_tokens
from sled.errors import CheckpointWarning, ConfigError, SettingError
from sled.models import load_folder, read_config, save_folder, save_orbax
from sled.models.generation import ALWAYS, DRAWING, ONLY_DRAWING, PENALTY, read_generation
from sled.train.initial_model import prepare_initial_model

PROMPT = np.random.default_rng(0).integers(3, 48, size=12).tolist()
DRAWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


def folder_with(folder, write_model, generation: dict | None, **config):
    """A tiny model's folder with this `generation_config.json`, or without one."""
    write_model(folder, "llama", **config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@jax.jit
def processed(logits_BV, tokens_BS, length_B, sampling):
    return processed_logits(logits_BV, lambda: seen_tokens(tokens_BS, length_B, logits_BV.shape[-1]), sampling)


@pytest.mark.parametrize("generation", [
    DRAWN,
    {"do_sample": True},  # top_k is 50 then, more than this vocabulary has
    {"do_sample": True, "top_k": None, "top_p": None, "temperature": None, "min_p": None},
    {"do_sample": True, "top_k": 0, "temperature": 1.3},
    {"do_sample": True, "top_k": 5, "top_p": 0.7, "repetition_penalty": 1.3},
    {"do_sample": True, "min_p": 0.1, "temperature": 2.5, "top_k": 20},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_p": 0.05, "typical_p": 1.0, "epsilon_cutoff": 0, "num_beams": 1},
    {"do_sample": False, "temperature": 0.1, "top_k": 2, "typical_p": 0.5},
    {"temperature": 0.1, "top_p": 0.3, "repetition_penalty": 1.7},  # without do_sample it draws nothing
    {"do_sample": None, "repetition_penalty": 0.8},
    {"max_length": 64, "transformers_version": "4.30.0", "_from_model_config": True},
    {"old": {**DRAWN, "repetition_penalty": 1.1}},
    {"old": {"do_sample": True, "top_k": None}},
], ids=str)
def test_the_distribution_is_the_one_of_transformers_generate(generation, transformers, tmp_path, write_model):
    """Logits before and after its processors come from transformers' generate, which then draws and goes on.

    old: a checkpoint without generation_config.json, whose config.json has these settings.
    """
    import torch

    generation, config = (None, generation["old"]) if "old" in generation else (generation, {})
    folder = folder_with(tmp_path, write_model, generation, **config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=3, eos_token_id=None, output_scores=True,
                              output_logits=True, return_dict_in_generate=True)
    sampling = checkpoint_sampling(read_generation(folder), "m")
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        ours = processed(logits.numpy(), out.sequences.numpy(), np.array([len(PROMPT) + step]), sampling)
        np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-5, atol=1e-6)
    assert (sampling.temperature > 0) == ((generation or config).get("do_sample") is True)


@pytest.mark.parametrize("fields, says", [
    ({"do_sample": True, "typical_p": 0.9}, r"typical_p 0.9 is not to be had"),
    ({"do_sample": True, "epsilon_cutoff": 3e-4, "eta_cutoff": 0.1}, r"epsilon_cutoff 0.0003, eta_cutoff 0.1 is not"),
    ({"do_sample": True, "top_h": 0.4}, "top_h 0.4"),
    ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size 3"),
    ({"num_beams": 4, "early_stopping": True}, "num_beams 4 is not"),
    ({"suppress_tokens": [1, 2]}, r"suppress_tokens \[1, 2\]"),
    ({"min_new_tokens": 5}, "min_new_tokens 5"),
    ({"guidance_scale": 1.5}, "guidance_scale 1.5"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha 0.6"),
    ({"sequence_bias": [[[1], -5.0]] * 99}, "sequence_bias .{40,70} is not"),
    ({"do_sample": True, "temperature": 0.0}, "at temperature 0 nothing is drawn"),
    ({"do_sample": True, "temperature": "0.7"}, "Sampling.temperature is '0.7'"),
    ({"do_sample": True, "top_k": -1}, "Sampling.top_k is -1"),
    ({"do_sample": True, "top_p": 1.5}, "Sampling.top_p is 1.5"),
    ({"do_sample": "yes"}, "do_sample is 'yes', but must be true or false"),
    ({"repetition_penalty": 0}, "Sampling.repetition_penalty is 0"),
])
def test_what_cannot_be_followed_is_named_when_it_is_asked_for(fields, says, demo):
    lm = sled.LM(demo.build(demo.params), demo.text, name="m", generation=fields)
    assert repr(lm)
    with pytest.raises(SettingError, match=rf"^m: its generation_config.json cannot be followed: .*{says}.*give a "):
        lm.generate("1", sampling="checkpoint")


def test_all_that_transformers_reads_is_known(transformers, tmp_path, write_model):
    """What chooses its way of decoding and its processors reads no field that is in neither table."""
    read = set()

    class Recorder(transformers.GenerationConfig):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder_with(tmp_path, write_model, {}))
    config = Recorder(do_sample=True, **{name: None for name in (*ALWAYS, *ONLY_DRAWING)})
    read.clear()
    model._get_logits_processor(config, input_ids_seq_length=3, device="cpu", model_kwargs={})
    config.get_generation_mode()
    no_effect = {"remove_invalid_values", "renormalize_logits", "use_cache", "max_length",  # on what is drawn
                 "use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit"}  # lossless, or with a helper alone
    fields = {name for name in read if not name.startswith("_") and name != "get_generation_mode"}
    assert fields - no_effect == {"do_sample", *DRAWING, *PENALTY, *ONLY_DRAWING, *ALWAYS} & fields
    assert len(fields) > 25


@pytest.mark.parametrize("config", [None, 2, [2, 3], -1, [3, 2, 3]], ids=str)
@pytest.mark.parametrize("generation", ["no file", 5, [5, 6], [6, 5, 6]], ids=str)
def test_texts_end_where_transformers_ends_them(config, generation, transformers, tmp_path, write_model):
    """Where generation_config.json exists and names none, transformers never ends a text; here config.json counts."""
    given = None if generation == "no file" else {"eos_token_id": generation}
    folder = folder_with(tmp_path, write_model, given, eos_token_id=config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    theirs = theirs if isinstance(theirs, list) else [theirs]
    assert list(read_config(folder).eos_ids) == [i for i in theirs if i is not None and i >= 0]


def exported(folder, to):
    from sled.export.forms import export_hf

    export_hf(folder, to)


def trained(folder, to):
    run = to.with_name("model_config")
    run.mkdir()
    prepare_initial_model(str(folder), None, 8, run, resumed=False)
    save_folder(load_folder(folder), to, tokenizer_from=run)


@pytest.mark.parametrize("write", [
    lambda folder, to: save_folder(load_folder(folder), to, tokenizer_from=folder),
    lambda folder, to: save_orbax(load_folder(folder), to, tokenizer_from=folder),
    lambda folder, to: sled.load(folder).save(to),
    lambda folder, to: sled.load(sled.load(folder).save(to)).save(to),
    exported, trained,
], ids=["save_folder", "save_orbax", "save", "save twice", "export", "train"])
@pytest.mark.parametrize("generation", [
    {**DRAWN, "eos_token_id": [5, 6], "max_new_tokens": 2048, "transformers_version": "4.40.0", "min_p": None}, None])
def test_settings_are_kept_wherever_a_model_is_written(generation, write, transformers, tmp_path, write_model):
    """Those of old checkpoints too, which have them in config.json."""
    folder = folder_with(tmp_path / "m", write_model, generation, **({} if generation else DRAWN))
    write(folder, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    expected = {name: value for name, value in (generation or DRAWN).items()
                if value is not None and name != "transformers_version"}
    assert {name: kept[name] for name in expected} == expected and kept["bos_token_id"] == 1
    assert read_config(tmp_path / "out").eos_ids == ((5, 6) if generation else (2,))


@pytest.mark.parametrize("generation", [None, DRAWN])
def test_a_model_made_here_is_saved_with_its_own_settings(generation, demo, tmp_path):
    lm = sled.LM(demo.build(demo.params), demo.text, generation=generation)
    for _ in range(2):  # anew, and over what is there
        assert sled.load(lm.save(tmp_path / "m")).generation == lm.generation == (generation or {})


def test_a_number_that_is_not_finite_is_refused(tmp_path, write_model):
    folder = folder_with(tmp_path, write_model, {"temperature": float("nan")})
    with pytest.raises(ConfigError, match=r"generation_config.json holds a number that is not finite; correct"):
        sled.load(folder)


def test_the_type_of_what_is_saved_is_checked(demo, tmp_path):
    with pytest.raises(SettingError, match=r"dtype is 'int7'.* None keeps the weights as they are"):
        demo.save(tmp_path / "m", dtype="int7")
    assert not (tmp_path / "m").exists()
    folder = demo.save(tmp_path / "m", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_checkpoints_sampling_is_offered_once(demo):
    lm = sled.LM(demo.build(demo.params), demo.text, name="m", generation=DRAWN)
    own, short = sled.Sampling(temperature=0.6, top_k=50, top_p=0.9), dict(max_new_tokens=8)
    assert lm.checkpoint_sampling == own and "do_sample True, temperature 0.6, top_p 0.9" in repr(lm)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        [drawn] = lm.generate("1", sampling="checkpoint", **short).tokens
        assert drawn == lm.generate("1", sampling=own, **short).tokens[0]
        assert drawn == [token for piece in lm.stream("1", sampling="checkpoint", **short) for token in piece.tokens[0]]
        engine = sled.Engine(lm, sampling="checkpoint", slots=1)
        request = engine.submit("1", sampling="checkpoint", **short)
        assert not said and [engine.submit("1", **short).result().tokens, request.result().tokens] == [drawn] * 2
        for _ in range(2):
            lm.generate("1", **short)
    [note] = said
    assert note.category is CheckpointWarning and note.filename == __file__
    assert "m is decoded greedily, though its generation_config.json has do_sample True, tem" in str(note.message)


@pytest.mark.filterwarnings("default::sled.errors.CheckpointWarning")
def test_the_command_follows_the_checkpoint_where_it_is_told_to(demo, command, tmp_path):
    folder = demo.save(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({**DRAWN, "eos_token_id": list(demo.config.eos_ids)}))
    how = ("generate", "-m", str(folder), "-n", "8", "Question: 1")
    _, greedy, said = command(*how)
    assert "warning: " in said and "(--sampling checkpoint) to follow it" in said
    status, drawn, said = command(*how, "--sampling", "checkpoint")
    assert status == 0 and drawn != greedy and "to follow it" not in said
    assert "has it: Sampling(temperature=0.6, top_k=50, top_p=0.9, min_p=0.0, repetition_penalty=1.0)" in said
    assert command(*how, "--sampling", "checkpoint", "--top-k", "1")[1] == greedy == command(*how, "--top-k", "1")[1]
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 4}))
    status, _, said = command(*how, "--sampling", "checkpoint")
    assert status == 1 and "num_beams 4 is not to be had here; give a sled.Sampling(...) of your own" in said
