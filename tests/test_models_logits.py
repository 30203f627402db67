"""Logits and hidden states of every family and variant, against transformers, live and recorded."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sled.models import load_folder

RECORDED = Path(__file__).parent / "fixtures" / "decoder_logits.npz"
TOKENS_BT = np.random.RandomState(1).randint(0, 48, (2, 24))  # longer than every window
POSITIONS = [0, 7, 23]  # whose logits, of row 1, are recorded


@functools.cache
def ours(folder):
    """The hidden states (the last one normed) and logits for TOKENS_BT."""
    decoder = load_folder(folder)
    states = decoder.hidden_states(jnp.asarray(TOKENS_BT))
    return [*states[:-1], decoder.normalise(states[-1])], np.asarray(decoder.logits(states[-1]))


def theirs(folder, transformers):
    """The same of transformers."""
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager",
                                                              dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.tensor(TOKENS_BT), output_hidden_states=True, use_cache=False)
    return [h.numpy() for h in out.hidden_states], out.logits.numpy()


def record(tiny_folder, variants, transformers):
    """Writes the recorded logits anew. Call it where a variant was added."""
    np.savez_compressed(RECORDED, **{
        name: theirs(tiny_folder(name), transformers)[1][1, POSITIONS] for name in variants})


def test_logits_equal_the_recorded_ones(variant, tiny_folder):
    with np.load(RECORDED) as recorded:
        np.testing.assert_allclose(ours(tiny_folder(variant))[1][1, POSITIONS], recorded[variant], atol=1e-4, rtol=0)


def test_every_hidden_state_equals_transformers(variant, tiny_folder, transformers):
    (states, logits), (hidden, expected) = ours(tiny_folder(variant)), theirs(tiny_folder(variant), transformers)
    for n, (h, other) in enumerate(zip(states, hidden, strict=True)):
        np.testing.assert_allclose(h, other, atol=1e-4, rtol=0, err_msg=f"hidden state {n}")
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1  # or the comparison says nothing
