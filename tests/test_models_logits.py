"""Logits and hidden states of every family and variant, against transformers, live and recorded."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sled.models import load_folder

RECORDED = Path(__file__).parent / "fixtures" / "decoder_logits.npz"
TOKENS_BT = np.random.RandomState(1).randint(0, 48, (2, 24))  # longer than every window
POSITIONS = [0, 7, 23]  # whose logits, of row 1, are recorded


def oracle(folder):
    """transformers' hidden states (the last one normed) and logits for TOKENS_BT."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install sled-jax[parity]")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install sled-jax[parity]")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager",
                                                              dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.tensor(TOKENS_BT), output_hidden_states=True, use_cache=False)
    return [h.numpy() for h in out.hidden_states], out.logits.numpy()


def record(tiny_folder, variants):
    """Writes the recorded logits anew. Call it where a variant was added."""
    np.savez_compressed(RECORDED, **{name: oracle(tiny_folder(name))[1][1, POSITIONS] for name in variants})


@pytest.fixture
def recorded():
    with np.load(RECORDED) as file:
        return dict(file)


def test_logits_equal_the_recorded_ones(variant, tiny_folder, recorded):
    decoder = load_folder(tiny_folder(variant))
    logits = decoder.logits(decoder.hidden_states(jnp.asarray(TOKENS_BT))[-1])
    np.testing.assert_allclose(np.asarray(logits)[1, POSITIONS], recorded[variant], atol=1e-4, rtol=0)


def test_every_hidden_state_equals_transformers(variant, tiny_folder):
    hidden, logits = oracle(tiny_folder(variant))
    decoder = load_folder(tiny_folder(variant))
    states = decoder.hidden_states(jnp.asarray(TOKENS_BT))
    assert len(states) == len(hidden)
    seen = [*states[:-1], decoder.normalise(states[-1])]
    for n, (ours, theirs) in enumerate(zip(seen, hidden, strict=True)):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=f"hidden state {n}")
    np.testing.assert_allclose(decoder.logits(states[-1]), logits, atol=1e-4, rtol=0)
    assert np.abs(logits).max() > 1  # or the comparison says nothing
