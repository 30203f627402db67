"""Run by test_staged.py, python mesh_of_pipeline.py OUT STAGES: a model cut over stages says what it says whole."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_lm import CAPACITY, CONFIG, PROMPTS, SAMPLED, settling

import sled
from sled.decoding.options import Decoding
from sled.decoding.staged import StagedGeneration
from sled.errors import SettingError
from sled.lm import LM
from sled.models import DecoderConfig, save_folder
from sled.models.sharding.stages import check_stages

out, stages = Path(sys.argv[1]), int(sys.argv[2])
assert jax.device_count() == 4
sled.decoding.staged.PREFILL_BLOCK = 16  # prompts of several blocks follow each other through the stages
PROMPTS = [*PROMPTS, np.random.default_rng(0).integers(6, 61, size=36).tolist()]
# Layers with a window keep a ring of K/V; in every stage the first has one.
WINDOWED = {4: dict(family="mistral", windows=(8,) * 4), 2: dict(family="qwen2", windows=(8, None) * 2, qkv_bias=True)}
save_folder(settling(dataclasses.replace(CONFIG, **WINDOWED[stages]), 0.35), out / "model")
ALONE = sled.load(out / "model")
THRESHOLDS = np.array([[0.0], [0.5], [0.9], [1.0], [0.4]], np.float32)


def exits_at(layers: tuple[int, ...], threshold=THRESHOLDS) -> sled.EarlyExit:
    return sled.EarlyExit(layers, threshold=threshold)


def check_texts(split: LM, ends: tuple[int, ...]) -> None:
    """Texts, and the layers that chose their tokens, alone and in a batch, at once and in chunks."""
    for way in (dict(fusion=sled.SLED()), dict(exits=exits_at(ends)),
                dict(exits=exits_at(ends[-1:]), fusion=sled.SLED()),
                dict(exits=exits_at(ends[:1], 0.3), sampling=SAMPLED)):
        one, other = (lm.generate(PROMPTS, **way, max_new_tokens=20) for lm in (ALONE, split))
        assert (one.tokens, one.exit_layers, one.finish_reasons) == (other.tokens, other.exit_layers,
                                                                     other.finish_reasons)
        following = split.generate(PROMPTS, **way, max_new_tokens=20, batch_size=2)  # 3 batches follow each other, or 2
        assert (one.tokens, one.exit_layers) == (following.tokens, following.exit_layers)
    settings = dict(exits=exits_at(ends), max_new_tokens=20)
    chunks = list(split.stream(PROMPTS, chunk=3, **settings))
    whole = [[token for chunk in chunks for token in chunk.tokens[row]] for row in range(len(PROMPTS))]
    assert whole == ALONE.generate(PROMPTS, **settings).tokens


def check_clock(split: LM, ends: tuple[int, ...]) -> None:
    """A token takes as many steps of the clock as there are stages up to its exit, and those until it is its
    microbatch's turn, of those that have a row that is ready; a row that is stopped takes none more, and is not waited
    for."""
    stages = split.mesh.shape["stage"]
    per, decoding = CONFIG.num_layers // stages, Decoding(exits=exits_at(ends))

    def begin(copies: int) -> StagedGeneration:
        rows = [*range(len(PROMPTS))] * copies
        return StagedGeneration(split.build, split.params, [np.array(PROMPTS[i]) for i in rows],
                                decoding.take_rows(rows), limits=[20] * len(rows), seeds=[0] * len(rows), stop_ids=(),
                                microbatches=copies)

    run = begin(1)
    run.advance(2)
    run.stop([3])
    run.advance()
    layers = [run.emitted(row).exit_layers for row in range(len(PROMPTS))]
    assert run.steps == [sum(layer // per for layer in of_row) for of_row in layers]
    assert [len(of_row) for of_row in layers] == [20, 20, 20, 2, 20]

    run = begin(stages)
    run.advance()
    takes = [[layer // per for layer in run.emitted(row).exit_layers] for row in range(len(run.steps))]
    known_at, turn, clock = [0] * len(takes), 0, 0
    while any(takes):
        for microbatch in range(turn, turn + stages):
            rows = range(microbatch % stages * len(PROMPTS), (microbatch % stages + 1) * len(PROMPTS))
            ready = [row for row in rows if takes[row] and known_at[row] <= clock]
            known_at = [clock + takes[row].pop(0) if row in ready else known for row, known in enumerate(known_at)]
            if ready:
                turn = microbatch + 1
                break
        clock += 1
    assert run.steps == known_at


def check_refusals(split: LM, ends: tuple[int, ...]) -> None:
    only = f"lies on {split.mesh.shape['stage']} stages of a pipeline, over which it generates texts without"
    within = (1, 2) if 1 not in ends else (1, 2, 4)  # of which one is no end of a stage, or no early exit
    for call, says in (
            (lambda: split.generate(PROMPTS, exits=sled.SelfSpeculation(ends[0])), "SelfSpeculation, which verifies"),
            (lambda: split.generate(PROMPTS, exits=sled.EarlyExit(ends, kv="propagate")), "makes K/V from the exit's"),
            (lambda: split.generate(PROMPTS, exits=sled.EarlyExit(within)), "layer 1, but the stages end after layers 2"
             if 1 not in ends else "4 is no early exit"),
            (lambda: split.score(PROMPTS[1], PROMPTS[0]), only), (lambda: split.lens(PROMPTS[2]), only),
            (lambda: sled.Engine(split, slots=2), only),
            (lambda: sled.load(out / "model", mesh=sled.Mesh(2, 1, 1, 2)), "Mesh.stage is 2 and Mesh.data 2, but")):
        with pytest.raises(SettingError, match=re.escape(says)):
            call()
    fields = dict(family="llama", vocab_size=61, width=32, mlp_width=48, num_heads=4, num_kv_heads=2, head_dim=8,
                  max_positions=CAPACITY)
    with pytest.raises(SettingError, match="does not divide the model's 6 layers"):
        check_stages(DecoderConfig(num_layers=6, **fields), 4)
    with pytest.raises(SettingError, match="windows of the layers differ between stages of 2"):
        check_stages(DecoderConfig(num_layers=4, windows=(8, None, 8, 8), **fields), 2)


split, ends = sled.load(out / "model", mesh=sled.Mesh(1, 1, 4 // stages, stages)), {4: (1, 2, 3), 2: (2,)}[stages]
assert split.weights_digest() == ALONE.weights_digest()
folder = split.save(out / "saved")
assert (folder / "model.safetensors").read_bytes() == (out / "model" / "model.safetensors").read_bytes()
check_texts(split, ends)
check_clock(split, ends)
check_refusals(split, ends)
