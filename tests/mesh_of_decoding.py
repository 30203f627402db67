"""Run by test_mesh_decoding.py: python mesh_of_decoding.py DATA TENSOR KV_HEADS OUT WAYS FOLDERS...

Eight devices in DATA groups of TENSOR decode, score and look as one device does: a small model with so many K/V heads
in these ways (or "all"), and the models in the folders in two.
"""

import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_lm import CAPACITY, SAMPLED, settling

import sled
from sled.decoding import loop, state
from sled.decoding.batch import Generation
from sled.decoding.options import Decoding
from sled.errors import SledError
from sled.lm import LM
from sled.models import DecoderConfig, save_folder

data, tensor, kv_heads = map(int, sys.argv[1:4])
out, ways, folders = Path(sys.argv[4]), sys.argv[5], [Path(folder) for folder in sys.argv[6:]]
MESH = sled.Mesh(data=data, tensor=tensor)
LAYERS, WIDTH = 3, 32
VOCABULARY = 4099  # which the devices do not divide; and so large that SLED looks at the first tokens by themselves
CONFIG = DecoderConfig(family="llama", vocab_size=VOCABULARY, width=WIDTH, mlp_width=48, num_layers=LAYERS, num_heads=8,
                       num_kv_heads=kv_heads, head_dim=8, max_positions=CAPACITY, eos_ids=(5,))
PROMPTS = [np.random.default_rng(n).integers(6, 48, size=n).tolist() for n in (1, 3, 17, 9, 4, 12, 7)]
EXITS = (1, 2)
THRESHOLDS = np.array([[0.2], [0.5], [0.9], [0.3], [1.0], [0.0], [0.6]], np.float32)  # an entry per prompt
WAYS = {
    "plain": {},
    "SLED": dict(fusion=sled.SLED()),
    "early exit": dict(exits=sled.EarlyExit(EXITS, threshold=THRESHOLDS), fusion=sled.SLED()),
    "early exit, propagated": dict(exits=sled.EarlyExit(EXITS, threshold=0.3, kv="propagate")),
    "speculation": dict(exits=sled.SelfSpeculation(1, 3, first_ids=1502), fusion=sled.SLED()),
    "sampling": dict(sampling=SAMPLED, fusion=sled.DoLa()),
}


def same(one, other) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), one, other)


def check_texts(alone: LM, split: LM, way: dict, prompts=PROMPTS, **settings) -> None:
    one, other = (lm.generate(prompts, **{"max_new_tokens": 20, **settings}, **way) for lm in (alone, split))
    assert (one.tokens, one.exit_layers, one.finish_reasons) == (other.tokens, other.exit_layers, other.finish_reasons)


def check_scores(alone: LM, split: LM, fusion) -> None:
    prompts = [PROMPTS[n] for n in (3, 1, 3, 2, 0)]
    continuations = [PROMPTS[n] for n in (0, 1, 2, 4, 6)]
    one, other = (lm.score(prompts, continuations, fusion=fusion, batch_size=3) for lm in (alone, split))
    same(one.logprobs, other.logprobs)
    assert one.greedy == other.greedy


def check_lens(alone: LM, split: LM) -> None:
    one, other = (lm.lens(PROMPTS[2], fusion=sled.SLED()) for lm in (alone, split))
    np.testing.assert_array_equal(one.best, other.best)
    np.testing.assert_array_equal(one.fused, other.fused)
    same([one.best_probability, one.entropy], [other.best_probability, other.entropy])


def check_engine(alone: LM, split: LM) -> None:
    """Requests come and go in the slots of every group."""
    engine = sled.Engine(split, slots=data, capacity=CAPACITY, **WAYS["early exit"] | dict(exits=sled.EarlyExit(EXITS)))
    requests = [engine.submit(prompt, exits=sled.EarlyExit(EXITS, float(threshold)), max_new_tokens=20)
                for prompt, [threshold] in zip(PROMPTS, THRESHOLDS, strict=True)]
    engine.run()
    served = [request.result().tokens for request in requests]
    assert served == alone.generate(PROMPTS, **WAYS["early exit"], max_new_tokens=20).tokens


ROWS = 8 // tensor if tensor < 8 else 2
OWN = ROWS // data if ROWS % data == 0 else ROWS  # of each group
EXCHANGE = re.compile(r"= \(?(\w+\[[\d,]*\])\S* (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
                      r"(?:-start)?\(.*?(?:replica_groups|source_target_pairs)=([^a-z].*?|mesh.*?\}), \w")


def exchanges(lowered) -> list[tuple[str, str]]:
    """What passes between devices in a program, shape and kind, once it is seen that nothing passes between groups."""
    found = EXCHANGE.findall(lowered.compile().as_text())
    for _, kind, devices in found:
        # Groups are not at the same place of a program, and on some machines all devices would take part in this one.
        assert kind != "collective-permute"
        pairs = re.findall(r"\{([\d,]+)\}", devices)
        assert all(len({int(n) // tensor for n in pair.split(",")}) == 1 for pair in pairs), devices
        assert pairs or data == 1 or devices in (
            f"[{data},{tensor}]<=[8]", f"mesh['axis_0'={data},'axis_1'={tensor}] {{'axis_1'}}"), devices
    assert tensor > 1 or not found
    # No weights and no K/V: what is gathered are a row's logits, to be sorted.
    assert all(re.search(r"[\[,](4099|410\d)\]$", shape) for shape, kind, _ in found if kind != "all-reduce"), found
    return [(shape, kind) for shape, kind, _ in found]


def check_exchanges(split: LM, way: dict) -> None:
    run = Generation(split.build, split.params, [np.array(PROMPTS[3])] * ROWS, Decoding(**way).take_rows([0] * ROWS),
                     limits=[4] * ROWS, seeds=[0] * ROWS, stop_ids=())
    found = exchanges(loop.decode._jitted[False].lower(**run.arguments(np.full(ROWS, 13))))
    exchanges(state.prefill._jitted[False].lower(split.build, split.params, run._state, np.int32(0), block=16))
    if not way and tensor > 1:  # what is summed over a group: once for the embeddings, twice a layer
        assert found.count((f"f32[{OWN},1,{WIDTH}]", "all-reduce")) == 1 + 2 * LAYERS, found


def check_refusals(split: LM) -> None:
    assert sled.Mesh().build_for_decoding().shape["data"] == 8  # what is left is no fsdp's, as in training
    for call, why in ((lambda: sled.load(out / "model", mesh=sled.Mesh(fsdp=8)), "Mesh.fsdp is 8, but"),
                      (lambda: sled.load(out / "model", mesh=sled.Mesh(data=3, tensor=2)), "a multiple of 6"),
                      (lambda: sled.load(out / "model", mesh="2x4"), "mesh is '2x4', but must be an instance"),
                      *[(lambda: sled.Engine(split, slots=data + 1), f"slots is {data + 1}, but the model lies")] * (
                          data > 1)):
        with pytest.raises(SledError, match=re.escape(why)):
            call()


decoder = settling(CONFIG, 0.35)
save_folder(decoder, out / "model")
alone, split = sled.load(out / "model"), sled.load(out / "model", mesh=MESH)
for leaf in jax.tree.leaves(split.params):  # nothing but norms and K/V heads that do not divide lies whole
    assert leaf.ndim == 1 or not leaf.sharding.is_fully_replicated or tensor == 1 or leaf.shape[1] == 8 * kv_heads
assert split.weights_digest() == alone.weights_digest()
split.save(out / "saved")
assert (out / "saved" / "model.safetensors").read_bytes() == (out / "model" / "model.safetensors").read_bytes()
for way in WAYS.values() if ways == "all" else [WAYS[name] for name in ways.split(",")]:
    check_texts(alone, split, way)
    check_exchanges(split, way)
if ways == "all":  # a row that all groups have, and batches that leave rows of some idle
    check_texts(alone, split, {}, prompts=PROMPTS[2], max_new_tokens=5)
    check_texts(alone, split, WAYS["early exit"] | dict(exits=sled.EarlyExit(EXITS, 0.3)), batch_size=3)
check_scores(alone, split, sled.SLED())
check_lens(alone, split)
check_engine(alone, split)
check_refusals(split)
for folder in folders:
    alone, split = sled.load(folder), sled.load(folder, mesh=MESH)
    assert split.weights_digest() == alone.weights_digest()
    for way in ({}, dict(exits=sled.SelfSpeculation(1, 3), fusion=sled.SLED())):
        check_texts(alone, split, way, max_new_tokens=10)
    check_scores(alone, split, sled.FinalLayer())
