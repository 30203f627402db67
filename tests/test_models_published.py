"""Published config.json files, and every field that transformers reads, against transformers."""

import contextlib
import dataclasses
import json
import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from published_configs import COUNTS, HOLDERS, PASSED_OVER, PUBLISHED, REFUSED
from published_sizes import shrunken, whole

from sled.errors import CheckpointWarning, ConfigError
from sled.models import FAMILIES, load_folder, read_config
from sled.models.families.family import ONE_VALUE, WITHOUT_EFFECT
from sled.models.families.registry import parse_config
from sled.models.stored import parameter_shapes

PROMPT = [5, 17, 40, 3, 41, 22, 9, 33, 28, 12, 7, 26]  # longer than the windows
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:(?!sled)")  # of transformers


@pytest.fixture(scope="module")
def theirs():
    """torch, on one thread, since for models this small more only wait for one another, and transformers."""
    torch, transformers = (pytest.importorskip(name, reason=f"{name} is not installed: pip install sled-jax[parity]")
                           for name in ("torch", "transformers"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch, transformers
    torch.set_num_threads(threads)


def made_by_transformers(theirs, folder, values):
    """The class that transformers has for a config.json, with random weights, which are written beside it."""
    torch, transformers = theirs
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
    model.save_pretrained(folder)  # under the names that it stores them by
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(values))
    return model


@contextlib.contextmanager
def passing_over(names):
    """Checks that one warning names these fields and no others, or that there is none."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", CheckpointWarning)
        yield
    said = [one for one in seen if one.category is CheckpointWarning]
    assert [str(one.message).partition("passed over ")[2].partition(" (unknown")[0].split(", ") for one in said] == (
        [names] if names else [])
    assert all(one.filename == __file__ for one in said)  # it points at who called, not into the library


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_gives_the_tokens_of_transformers(name, theirs, tmp_path):
    torch, _ = theirs
    model = made_by_transformers(theirs, tmp_path / "model", shrunken(PUBLISHED[name]))
    with torch.no_grad():
        tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)[0].tolist()
    with passing_over(PASSED_OVER.get(name)):
        decoder = load_folder(tmp_path / "model")
    row = np.pad(tokens, (0, len(PROMPT) + 16 - len(tokens)))  # of one length: operations are compiled for a shape
    best = decoder.logits(decoder.hidden_states(jnp.asarray(row)[None])[-1])[0].argmax(-1)
    assert best[len(PROMPT) - 1:len(tokens) - 1].tolist() == tokens[len(PROMPT):]
    ends = model.config.eos_token_id
    assert decoder.config.eos_ids == tuple(ends if isinstance(ends, list) else [ends])


@pytest.mark.filterwarnings("ignore::sled.errors.CheckpointWarning")
@pytest.mark.parametrize("name", COUNTS)
def test_a_published_file_gives_the_published_number_of_parameters(name):
    config = parse_config(whole((PUBLISHED | HOLDERS)[name]))
    assert sum(map(math.prod, parameter_shapes(config).values())) == COUNTS[name]


def test_published_files_of_full_size_are_understood():
    for name, values in PUBLISHED.items():
        with passing_over(PASSED_OVER.get(name)):
            parse_config(whole(values))


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_model_is_refused_for_the_field_that_matters(name):
    values, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says):
        parse_config(whole(values))


def reads(theirs, folder, values, monkeypatch) -> set[str]:
    """Every name that transformers asks of a configuration when it loads this model, runs it and generates."""
    torch, transformers = theirs
    made_by_transformers(theirs, folder, values)
    kind, names = transformers.AutoConfig.for_model(values["model_type"]).__class__, set()
    plain = kind.__getattribute__  # which knows other names of some fields

    def recorded(self, name):
        names.add(name)
        return plain(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__getattribute__", recorded)
        transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
            torch.tensor([PROMPT]), max_new_tokens=2, do_sample=False)
    own = {field.name for field in dataclasses.fields(kind)}
    return own | {name for name in names - set(dir(kind)) if not name.startswith("__")}  # methods are no fields


@pytest.mark.parametrize("variant", ["llama", "llama-llama3", "llama-linear-old-spelling", "mistral-window",
                                     "qwen2-layer-types", "qwen3-mha-biases-windows", "gemma", "gemma2", "gemma3_text",
                                     "mixtral", "qwen3_moe", "gpt_oss", "gpt2", "olmo2", "phi3-longrope-partial-tied"])
def test_every_field_that_transformers_reads_is_accounted_for(variant, theirs, variants, tmp_path, monkeypatch):
    """It is obeyed or refused where it is odd, or is known to change nothing: it never counts as unknown."""
    of_generation = theirs[1].GenerationConfig._get_default_generation_params()
    names = reads(theirs, tmp_path / "model", variants[variant], monkeypatch) | of_generation.keys()
    names -= {"auto_map"}  # names code of the checkpoint's own, which transformers runs only where it is trusted
    assert len(names) > 80 and {"hidden_size", "is_causal"} <= names
    for name in sorted(names):
        with warnings.catch_warnings():
            warnings.simplefilter("error", CheckpointWarning)
            with contextlib.nullcontext() if name in WITHOUT_EFFECT else pytest.raises(ConfigError):
                parse_config({**variants[variant], name: {"rope_type": ["odd"]}})


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_without_effect_have_none(family, theirs, variants, tmp_path):
    """In transformers, which would load and run them otherwise, and here."""
    torch, transformers = theirs
    odd = dict(attention_dropout=0.5, initializer_range=0.9, use_cache=False, pretraining_tp=2, is_decoder=True,
               add_cross_attention=True, gradient_checkpointing=True, chunk_size_feed_forward=2, num_heads=7,
               pruned_heads={"0": [1]}, tie_encoder_decoder=True, mlp_layer_types=["dense"] * 3, torchscript=True,
               use_bfloat16=True, tf_legacy_loss=True, temperature=0.1, top_k=2, repetition_penalty=2.0,
               min_length=30, num_labels=5, problem_type="regression", tokenizer_class="GPT2Tokenizer",
               tie_last_hidden_states=False, finetuning_task="x", sep_token_id=3, prefix="x", dtype="float32")
    assert odd.keys() <= WITHOUT_EFFECT
    folder = tmp_path / "model"
    model = made_by_transformers(theirs, folder, variants[family if family != "mistral" else "mistral-window"])
    here = load_folder(folder).config
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **odd}))
    with torch.no_grad():
        other = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(model(torch.tensor([PROMPT])).logits, other(torch.tensor([PROMPT])).logits)
    with passing_over(None):
        assert read_config(folder) == here


@pytest.mark.parametrize("family, name, value", [
    ("llama", "is_causal", False), ("llama", "sliding_window", 4),
    ("llama", "attention_chunk_size", 4),
    ("llama", "rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ("mistral-window", "is_causal", False), ("qwen2", "is_causal", False), ("qwen3", "is_causal", False),
])
def test_fields_that_are_refused_have_an_effect(family, name, value, theirs, variants, tmp_path):
    """Those, at least, that can be tried so; a refusal of what changes nothing would keep good models out."""
    torch, transformers = theirs
    model = made_by_transformers(theirs, tmp_path / "model", variants[family])
    odd = {**variants[family], name: value}
    tokens, outs = torch.arange(60)[None] % 48, []
    for values in (variants[family], odd):
        (tmp_path / "model" / "config.json").write_text(json.dumps(values))
        config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
        one = transformers.AutoModelForCausalLM.from_config(config).eval()
        one.load_state_dict(model.state_dict())
        out = one.generate(tokens, max_new_tokens=2, min_new_tokens=2, do_sample=False, output_logits=True,
                           return_dict_in_generate=True)
        outs.append(torch.stack(out.logits))
    assert not torch.allclose(*outs, atol=1e-3)
    with pytest.raises(ConfigError, match=name if name != "rope_parameters" else "rotary"):
        parse_config(odd)


NOTES = ("_model_name_or_path", "unk_token_id")  # of who wrote a file, or of the tokenizer: not worth a word


@pytest.mark.parametrize("name, value", [
    ("rotary_dim", 4), ("attn_logit_softcapping", 50.0), ("qk_layernorm", True), ("_model_name_or_path", "x"),
    ("unk_token_id", 0), ("unsloth_version", "2024.9"), ("attn_implementation_note", {"a": [1]}),
])
def test_fields_that_transformers_does_not_know_are_passed_over(name, value, theirs, variants, tmp_path):
    torch, transformers = theirs
    model = made_by_transformers(theirs, tmp_path / "model", variants["llama"])
    plain = read_config(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**variants["llama"], name: value, "another_one": 1}))
    with torch.no_grad():
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        assert torch.equal(model(torch.tensor([PROMPT])).logits, other(torch.tensor([PROMPT])).logits)
    with passing_over(["another_one"] if name in NOTES else [name, "another_one"]):
        assert read_config(tmp_path / "model") == plain


def test_no_field_is_both_without_effect_and_refused():
    assert not WITHOUT_EFFECT & ONE_VALUE.keys()
