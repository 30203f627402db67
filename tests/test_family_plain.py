"""GPT-2, OLMo 2 and Phi-3 against transformers: tokens, folders, and what is theirs alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import sled
from sled.errors import ConfigError, PromptError
from sled.export.card import Card, model_card
from sled.export.source import read_source
from sled.models import FAMILIES, ExitHeads, load_folder, save_folder
from sled.models.families.registry import format_config, parse_config

CHOSEN = ["gpt2-wide-untied", "olmo2-mha-biases-yarn", "phi3-longrope-partial-tied"]
PROMPTS = [np.random.RandomState(n).randint(4, 48, n).tolist() for n in (3, 14, 9)]


@pytest.mark.parametrize("name", CHOSEN)
def test_greedy_tokens_of_ragged_prompts_and_tensors_are_those_of_transformers(
        name, variants, tiny_folder, tmp_path, transformers):
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(name)).eval()
    theirs = model.save_pretrained(tmp_path / "theirs") or tmp_path / "theirs"
    lm = sled.load(theirs)
    assert lm.config == load_folder(tiny_folder(name)).config
    for prompt, ours in zip(PROMPTS, lm.generate(PROMPTS, max_new_tokens=12).tokens, strict=True):
        with torch.no_grad():
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
        assert ours == tokens[len(prompt):]
    one, other = (load_file(folder / "model.safetensors") for folder in (theirs, lm.save(tmp_path / "ours")))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.to_dict().keys() >= model.config.to_dict().keys() - {"dtype", "_name_or_path"}
    with torch.no_grad():
        tokens = torch.tensor([PROMPTS[1]])
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_gpt2_as_the_hub_has_it(tiny_folder, tmp_path, variants):
    """Without the prefix of the class with a head, and with the masks of old versions among the weights."""
    expected, folder = load_folder(tiny_folder("gpt2")), tmp_path / "hub"
    folder.mkdir()
    weights = {name.removeprefix("transformer."): array
               for name, array in load_file(tiny_folder("gpt2") / "model.safetensors").items()}
    masks = {f"h.{i}.attn.{name}": np.tril(np.ones((1, 1, 64, 64), np.float32)) for i in range(3)
             for name in ("bias", "masked_bias")}
    save_file(weights | masks, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(variants["gpt2"], architectures=["GPT2Model"])))
    read = load_folder(folder)
    assert read.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(read), nnx.state(expected))


def test_no_text_goes_beyond_learned_positions(tiny_folder):
    lm = sled.load(tiny_folder("gpt2"))
    assert "64 tokens" in repr(lm)
    for beyond in (lambda: lm.generate([5] * 64), lambda: lm.score([5] * 40, [6] * 26)):
        with pytest.raises(PromptError, match=r"the model's context holds 64, .* shorten"):
            beyond()
    assert len(lm.generate([5] * 60, max_new_tokens=9).tokens[0]) <= 4
    with pytest.raises(PromptError, match="have 65 tokens, but 64 positions were learned"):
        load_folder(tiny_folder("gpt2")).hidden_states(jnp.zeros((1, 65), jnp.int32))


@pytest.mark.parametrize("name, fields, says", [
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "'scale_attn_by_inverse_layer_idx' is True, but only False"),
    ("gpt2", dict(reorder_and_upcast_attn=True), "'reorder_and_upcast_attn' is True, but only False"),
    ("gpt2", dict(scale_attn_weights=False), "'scale_attn_weights' is False, but only True"),
    ("gpt2", dict(activation_function="relu"), "'activation_function' is 'relu', but only silu"),
    ("gpt2", dict(n_head=5), "n_embd 32 is not a multiple of n_head 5"),
    ("gpt2", dict(hidden_size=64), "'hidden_size' is 64, but 'n_embd' is 32"),
    ("gpt2", dict(n_layer=10**6), "'n_layer' is 1000000, but it can be at most 10,000"),
    ("olmo2", dict(layer_types=["sliding_attention"] * 3), "every layer of an olmo2 model sees all positions"),
    ("olmo2", dict(sliding_window=8), "'sliding_window' is 8, but only None"),
    ("phi3", dict(rope_scaling={"type": "linear", "factor": 2.0}), "of a phi3 model are 'default' or 'longrope'"),
    ("phi3", dict(partial_rotary_factor=0.4), "0.4 of head_dim 8 is to turn .*, 3 numbers, .* even number"),
    ("phi3-longrope-partial-tied", dict(partial_rotary_factor=0.5), "short_factor .* has 6 entries, but 4 pairs turn"),
])
def test_what_is_not_understood_is_refused_by_name(name, fields, says, variants):
    with pytest.raises(ConfigError, match=f"config.json.*{says}"):
        parse_config({**variants[name], **fields})


def test_phi_is_written_as_transformers_4_reads_it_too(variants):
    """Its versions take three fields of `rope_scaling`, and the original positions beside it."""
    values = variants["phi3-longrope-partial-tied"]
    written = format_config(parse_config(values), "float32")
    assert written["rope_scaling"] == values["rope_scaling"]
    assert written["original_max_position_embeddings"] == 48 and written["partial_rotary_factor"] == 0.75
    for kind in ("su", "yarn"):  # of early files
        early = {**values["rope_scaling"], "type": kind}
        assert parse_config({**values, "rope_scaling": early}) == parse_config(values)
    own = {**values["rope_scaling"], "attention_factor": 1.5}
    written = format_config(parse_config({**values, "rope_scaling": own}), "float32")
    assert written["rope_scaling"] == own  # or versions 5, which prefer it to rope_parameters, would compute another


def test_an_exit_heads_mlp_has_the_models_own_form(tiny_folder, tmp_path):
    plain = load_folder(tiny_folder("gpt2"))
    decoder = plain.with_exit_heads(ExitHeads((1, 2), "mlp"))
    mlp = decoder.exit_heads[0].mlp
    assert mlp.gate is None and mlp.up.bias is not None
    h_TD = jnp.asarray(np.random.RandomState(0).standard_normal((4, 32)), jnp.float32)
    np.testing.assert_array_equal(decoder.exit_head(1).read(h_TD), plain.normalise(h_TD))
    mlp.down.weight[...] = mlp.down.weight[...].at[:, 0].set(1.0)
    read = load_folder(save_folder(decoder, tmp_path / "saved"))
    np.testing.assert_array_equal(read.exit_head(1).read(h_TD), decoder.exit_head(1).read(h_TD))
    assert not jnp.allclose(read.exit_head(1).read(h_TD), plain.normalise(h_TD))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_transformers_can_leave_early(family, tiny_folder, transformers):
    """A family says so of its class there: drafts of the first layer leave the text as it is, or it fails."""
    import torch

    folder = tiny_folder(family if family != "mistral" else "mistral-window")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    runs = []
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 3)
    layers[2].register_forward_hook(lambda *_: runs.append(1))

    def generate(**early):
        return model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=6, min_new_tokens=6, do_sample=False, **early)

    expected, plain = generate(), len(runs)
    if FAMILIES[family].early_exit:
        assert torch.equal(generate(assistant_early_exit=1), expected)
        assert len(runs) <= 2 * plain  # drafts do not go through it
    else:
        with pytest.raises(IndexError):
            generate(assistant_early_exit=1)


def test_the_card_shows_transformers_no_exit_that_it_cannot_take(tiny_folder, tmp_path):
    line = {"step": 3, "held_out": [1.0] * 3, "held_out_accuracy": [0.5, 0.9, 0.9]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    settings = dict(model={"name": "new"}, data=dict(name="demo", digest="cd"), held_out=None, recipe={},
                    prompt_weight=0)
    for name in ("gpt2", "olmo2"):
        model = read_source(tiny_folder(name))._replace(run=tmp_path, step=3, settings=settings)
        card = model_card(Card(), model, model.decoder, name, None)
        assert "SelfSpeculation(2)" in card and ("assistant_early_exit=2" in card) == (name == "olmo2")
        assert ("transformers' class of gpt2 models has no early exit" in card) == (name == "gpt2")
