"""Run by test_staged.py, python mesh_of_pipeline.py OUT STAGES: a model cut over stages says what it says whole."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_lm import CAPACITY, CONFIG, PROMPTS, settling

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
BY_ROW = np.arange(len(PROMPTS), dtype=np.float32)
SAMPLED = sled.Sampling(temperature=0.5 + 0.2 * BY_ROW, top_k=10 + BY_ROW.astype(np.int32), top_p=0.95,
                        repetition_penalty=1 + 0.1 * BY_ROW)
# Layers with a window keep a ring of K/V; in every stage the first has one.
WINDOWED = {4: dict(family="mistral", windows=(8,) * 4), 2: dict(family="qwen2", windows=(8, None) * 2, qkv_bias=True)}
save_folder(settling(dataclasses.replace(CONFIG, **WINDOWED[stages]), 0.35), out / "model")
ALONE = sled.load(out / "model")
THRESHOLDS = np.array([[0.0], [0.5], [0.9], [1.0], [0.4]], np.float32)


def exits_at(layers: tuple[int, ...], threshold=THRESHOLDS) -> sled.EarlyExit:
    return sled.EarlyExit(layers, threshold=threshold)


def check_texts(split: LM, ends: tuple[int, ...]) -> None:
    """Texts, and the layers that chose their tokens, alone and in a batch, at once and in chunks."""
    for way in (dict(fusion=sled.SLED(0.5 + BY_ROW)), dict(exits=exits_at(ends)),
                dict(exits=exits_at(ends[-1:]), fusion=sled.SLED(0.5 + BY_ROW)),
                dict(exits=exits_at(ends[:1], 0.3), sampling=SAMPLED)):
        one, other = (lm.generate(PROMPTS, **way, max_new_tokens=20) for lm in (ALONE, split))
        assert (one.tokens, one.exit_layers, one.finish_reasons) == (other.tokens, other.exit_layers,
                                                                     other.finish_reasons)
        if "sampling" in way:  # 3 batches follow each other, or 2
            following = split.generate(PROMPTS, **way, max_new_tokens=20, batch_size=2)
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

    def begin(*microbatches: list[int]) -> StagedGeneration:
        rows = [row for microbatch in microbatches for row in microbatch]
        return StagedGeneration(split.build, split.params, [np.array(PROMPTS[i]) for i in rows],
                                decoding.take_rows(rows), limits=[20] * len(rows), seeds=[0] * len(rows), stop_ids=(),
                                microbatches=len(microbatches))

    every = [*range(len(PROMPTS))]
    run = begin(every)
    run.advance(2)
    run.stop([3])
    run.advance()
    layers, alone = zip(*((made.exit_layers, made.tokens) for made in map(run.emitted, every)), strict=True)
    assert run.steps == [sum(layer // per for layer in of_row) for of_row in layers]
    assert [len(of_row) for of_row in layers] == [20, 20, 20, 2, 20]

    for count in sorted({3, stages}):
        run = begin(every, [0] * len(every), *[every] * (count - 2))  # the second of single tokens: nothing to prefill
        run.advance()
        takes = [[layer // per for layer in run.emitted(row).exit_layers] for row in range(len(run.steps))]
        assert run.steps == schedule(takes, count)
    others = run
    run = begin(every, [0] * len(every), *[every] * (count - 2))
    run.advance(2)
    run.stop([1])
    for _ in range(6):
        run.advance(3)
    assert run.emitted(1).tokens == others.emitted(1).tokens[:2]
    for row in set(range(len(run.steps))) - {1}:
        assert run.emitted(row).tokens == others.emitted(row).tokens
        assert row == 3 or row >= len(every) or run.emitted(row).tokens == alone[row]


def schedule(takes: list[list[int]], microbatches: int) -> list[int]:
    """The clock when each row's last token is known. takes: of every row's tokens, the stages up to the exit."""
    left, known_at, turn, clock = list(map(list, takes)), [0] * len(takes), 0, 0
    height = len(takes) // microbatches
    while any(left):
        shares = {}
        for microbatch in (n % microbatches for n in range(turn, turn + microbatches)):
            unfinished = [row for row in range(microbatch * height, (microbatch + 1) * height)
                          if left[row] or known_at[row] > clock]
            ready = [row for row in unfinished if known_at[row] <= clock]
            shares[microbatch] = len(ready) / max(len(unfinished), 1), ready
        first = max(shares, key=lambda microbatch: shares[microbatch][0])  # of equal ones the first in turn
        for row in shares[first][1]:
            known_at[row] = clock + left[row].pop(0)
        turn = first + 1 if shares[first][1] else turn
        clock += 1
    return known_at


def check_refusals(split: LM, ends: tuple[int, ...]) -> None:
    only = f"lies on {split.mesh.shape['stage']} stages of a pipeline, over which it generates texts without"
    within = (1, 2) if 1 not in ends else (1, 2, 4)  # of which one is no end of a stage, or no early exit
    for call, says in (
            (lambda: split.generate(PROMPTS, exits=sled.SelfSpeculation(ends[0])), "SelfSpeculation, which verifies"),
            (lambda: split.generate(PROMPTS, exits=sled.EarlyExit(ends, kv="propagate")), "makes K/V from the exit's"),
            (lambda: split.generate(PROMPTS, exits=sled.EarlyExit(within)), "layer 1, but the stages end after layers 2"
             if 1 not in ends else "4 is no early exit"),
            (lambda: split.check(Decoding(exits=sled.SelfSpeculation(ends[0]))), "SelfSpeculation, which verifies"),
            (lambda: split.score(PROMPTS[1], PROMPTS[0]), only), (lambda: split.lens(PROMPTS[2]), only),
            (lambda: sled.Engine(split, slots=2), only),
            (lambda: sled.load(out / "model", mesh=sled.Mesh(2, 1, 1, 2)), "Mesh.stage is 2 and Mesh.data 2, but")):
        with pytest.raises(SettingError, match=re.escape(says)):
            call()
    fields = dict(family="llama", vocab_size=61, width=32, mlp_width=48, num_heads=4, num_kv_heads=2, head_dim=8,
                  max_positions=CAPACITY)
    with pytest.raises(SettingError, match="does not divide the model's 6 layers"):
        check_stages(DecoderConfig(num_layers=6, **fields), 4)
    with pytest.raises(SettingError, match="windows of the layers differ between stages of 2; give 1, as"):
        check_stages(DecoderConfig(num_layers=4, windows=(8, None, 8, 8), **fields), 2)


split, ends = sled.load(out / "model", mesh=sled.Mesh(1, 1, 4 // stages, stages)), {4: (1, 2, 3), 2: (2,)}[stages]
assert split.weights_digest() == ALONE.weights_digest()
folder = split.save(out / "saved")
assert (folder / "model.safetensors").read_bytes() == (out / "model" / "model.safetensors").read_bytes()
check_texts(split, ends)
check_clock(split, ends)
check_refusals(split, ends)
