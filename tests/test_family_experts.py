"""Mixtral, Qwen3-MoE and gpt-oss against transformers, beyond what the table of families compares."""

import jax.numpy as jnp
import numpy as np
import pytest

import sled
from sled.models import load_folder
from sled.models.mxfp4 import dequantised
from sled.train.objective.balance import balance_loss
from sled.train.objective.forward import states_and_routing

TOKENS_BT = np.random.RandomState(1).randint(3, 48, (2, 24))


@pytest.fixture
def theirs(transformers, tiny_folder):
    """`theirs(name)`: transformers' model of a variant, run on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda name: transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(name)).eval()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["mixtral-window", "gpt_oss"])
def test_greedy_tokens_of_ragged_prompts_equal_transformers(name, theirs, tiny_folder):
    import torch

    model, prompts = theirs(name), [TOKENS_BT[0, :n].tolist() for n in (3, 14, 9)]
    for prompt, ours in zip(prompts, sled.load(tiny_folder(name)).generate(prompts, max_new_tokens=12).tokens,
                            strict=True):
        with torch.no_grad():
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
        assert [int(token) for token in ours] == tokens[len(prompt):]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_balance_loss_equals_transformers(name, theirs, tiny_folder):
    """Of padded rows."""
    import torch

    mask_BT = np.arange(24)[None] < np.array([[24], [15]])
    with torch.no_grad():
        expected = theirs(name)(torch.tensor(TOKENS_BT), attention_mask=torch.tensor(mask_BT.astype(int)),
                                output_router_logits=True).aux_loss
    model = load_folder(tiny_folder(name)).stack()
    routed = states_and_routing(model, jnp.asarray(TOKENS_BT), (3,), segments_BT=jnp.asarray(mask_BT))[1]
    np.testing.assert_allclose(balance_loss(routed), float(expected), rtol=1e-5)


def test_matrices_in_four_bits_are_what_transformers_makes_of_them(transformers):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.RandomState(0)
    blocks, scales = (random.randint(0, most, shape).astype(np.uint8) for most, shape in
                      ((256, (3, 10, 2, 16)), (255, (3, 10, 2))))
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
    np.testing.assert_array_equal(dequantised(blocks, scales).swapaxes(1, 2), expected)
