"""The layers' benchmark on toy models, against their own logits one text at a time."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import sled
from sled.bench import layers
from sled.demo.problems import problems, prompt
from sled.errors import SettingError
from sled.lm import LM
from sled.models import Decoder, DecoderConfig
from sled.text.tokenizer import Tokenizer

CONFIG = DecoderConfig(family="llama", vocab_size=1000, width=16, mlp_width=24, num_layers=2, num_heads=2,
                       num_kv_heads=2, head_dim=8, max_positions=256, eos_ids=(0,), tied_head=True)


@pytest.fixture
def toy(monkeypatch):
    text = Tokenizer.from_folder(Path(sled.__file__).parent / "demo" / "model")
    made = Decoder.init(CONFIG, rngs=nnx.Rngs(0))
    monkeypatch.setattr(sled, "load", lambda *_, **__: LM(made, text))
    monkeypatch.setattr(layers, "MAX_NEW_TOKENS", 6)
    return made


def test_layers_are_measured_on_the_solutions_and_on_what_the_last_one_says(toy, tmp_path):
    report = layers.run_layers_bench(("one",), count=3, picture=tmp_path / "layers.png")
    assert [(row.model, row.layer) for row in report.rows] == [("one", 1), ("one", 2)]
    lm = sled.load("one")
    loss, right, same = [], [], []
    for problem in problems("heldout", 3):
        question = lm.text.encode(prompt(problem.question))
        answer = [*lm.text.encode(" " + problem.solution), 0]
        said = lm.generate(question, max_new_tokens=6).tokens[0]
        for text, of_text in ((answer, (loss, right)), (said, (same,))):
            states = toy.hidden_states(np.array([question + text]))[1:, 0, len(question) - 1:-1]
            logp_LTV = jax.nn.log_softmax(toy.logits(states))
            hits_LT = logp_LTV.argmax(-1) == np.array(text)
            for kept, value in zip(of_text, (-logp_LTV[:, np.arange(len(text)), text], hits_LT), strict=False):
                kept.append(value if of_text[-1] is right else hits_LT)
    means = [np.concatenate(each, axis=1).mean(1) for each in (loss, right, same)]
    rows = report.rows[:2]
    for name, expected in zip(("loss", "accuracy", "agreement"), means, strict=True):
        np.testing.assert_allclose([getattr(row, name) for row in rows], expected, rtol=1e-5)
    assert rows[1].agreement == 1 and all(0 <= row.solved <= 1 for row in report.rows)
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("models", [(), ("one", "one"), tuple("abcde")])
def test_one_to_four_different_models_are_measured(models):
    with pytest.raises(SettingError, match="must be 1 to 4 different ones"):
        layers.run_layers_bench(models)
