"""transformers with a decoder's own weights: the rival of the decoding benchmarks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sled.models import Decoder, save_folder

NOT_INSTALLED = "{} is not installed, so transformers was not measured; pip install 'sled-jax[parity]' adds it."


def transformers_twin(decoder: Decoder):
    """The same model in transformers, float32, for inference. Raises ImportError without torch and transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_folder(decoder, Path(folder) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()


def greedy(twin, prompts, max_new_tokens: int, **how):
    """The new tokens [B, T] of transformers' greedy `generate` after prompts of one length."""
    import torch

    ids_BT = torch.tensor(prompts)
    with torch.no_grad():
        out_BT = twin.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=False,
                               max_new_tokens=max_new_tokens, **how)
    return out_BT[:, ids_BT.shape[1]:]
