"""Mixtral, Qwen3-MoE and gpt-oss: against transformers, and what experts must keep to."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BASE
from safetensors.numpy import load_file

import sled
from sled.models import load_folder, save_folder
from sled.models.mxfp4 import dequantised
from sled.train.objective.balance import balance_loss
from sled.train.objective.forward import states_and_routing

EXPERTS = dict(num_experts_per_tok=2, num_local_experts=4, router_aux_loss_coef=0.02)
MIXTRAL = dict(BASE, model_type="mixtral", architectures=["MixtralForCausalLM"], sliding_window=None, **EXPERTS)
QWEN3 = dict(BASE, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], head_dim=16, num_experts=6,
             num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True)
GPT_OSS = dict(BASE, model_type="gpt_oss", architectures=["GptOssForCausalLM"], head_dim=16, sliding_window=6,
               **EXPERTS, rope_parameters=dict(rope_type="default", rope_theta=150000.0),
               layer_types=["sliding_attention", "full_attention", "sliding_attention"])
VARIANTS = {
    "mixtral": MIXTRAL,
    "mixtral-window": dict(MIXTRAL, sliding_window=6, head_dim=16),
    "qwen3-moe": QWEN3,
    "qwen3-moe-not-normalised": dict(QWEN3, norm_topk_prob=False, attention_bias=True, tie_word_embeddings=True),
    "gpt-oss": GPT_OSS,
    "gpt-oss-low-clamp": dict(GPT_OSS, swiglu_limit=0.5, attention_bias=False, num_key_value_heads=4),
}
TOKENS_BT = np.random.RandomState(1).randint(0, 48, (2, 24))


@pytest.fixture(scope="module")
def models(transformers, tmp_path_factory):
    """`models(name)`: a folder that transformers has written, and its model."""
    import torch

    threads, made = torch.get_num_threads(), {}
    torch.set_num_threads(1)

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("experts") / name
            values = dict(VARIANTS[name])
            config = transformers.AutoConfig.for_model(**values)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
            torch.manual_seed(0)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
            model.save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps(values))
            made[name] = folder, model
        return made[name]

    yield make
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_and_logits_equal_transformers(name, models):
    import torch

    folder, model = models(name)
    with torch.no_grad():
        out = model(torch.tensor(TOKENS_BT), output_hidden_states=True, use_cache=False)
    decoder = load_folder(folder)
    states = decoder.hidden_states(jnp.asarray(TOKENS_BT))
    for n, (h, other) in enumerate(zip([*states[:-1], decoder.normalise(states[-1])], out.hidden_states, strict=True)):
        np.testing.assert_allclose(h, other.numpy(), atol=1e-4, rtol=0, err_msg=f"hidden state {n}")
    np.testing.assert_allclose(decoder.logits(states[-1]), out.logits.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mixtral-window", "gpt-oss"])
def test_greedy_tokens_of_ragged_prompts_equal_transformers(name, models):
    import torch

    folder, model = models(name)
    lm, prompts = sled.load(folder), [TOKENS_BT[0, :n].tolist() for n in (3, 14, 9)]
    for prompt, ours in zip(prompts, lm.generate(prompts, max_new_tokens=12).tokens, strict=True):
        with torch.no_grad():
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
        ours = [int(token) for token in ours]
        assert ours == tokens[len(prompt):][:len(ours)] and len(ours) >= len(tokens) - len(prompt) - 1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_is_written_back_as_it_was_read(name, models, tmp_path, transformers):
    folder, model = models(name)
    decoder = load_folder(folder)
    written = save_folder(decoder, tmp_path / "saved")
    one, other = (load_file(where / "model.safetensors") for where in (folder, written))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert load_folder(written).config == decoder.config
    read = transformers.AutoModelForCausalLM.from_pretrained(written).state_dict()
    assert all((read[name] == tensor).all() for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_the_balance_loss_equals_transformers(name, models):
    """Of padded rows."""
    import torch

    folder, model = models(name)
    mask_BT = np.arange(24)[None] < np.array([[24], [15]])
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS_BT), attention_mask=torch.tensor(mask_BT.astype(int)),
                         output_router_logits=True).aux_loss
    decoder = load_folder(folder).stack()
    routed = states_and_routing(decoder, jnp.asarray(TOKENS_BT), (3,), segments_BT=jnp.asarray(mask_BT))[1]
    np.testing.assert_allclose(balance_loss(routed), float(expected), rtol=1e-5)


def test_matrices_in_four_bits_are_what_transformers_makes_of_them(transformers):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.RandomState(0)
    blocks, scales = (random.randint(0, most, shape).astype(np.uint8) for most, shape in
                      ((256, (3, 10, 2, 16)), (255, (3, 10, 2))))
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
    np.testing.assert_array_equal(dequantised(blocks, scales).swapaxes(1, 2), expected)
