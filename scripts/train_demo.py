"""Train the bundled model from nothing: tokenizer, weights, Hugging Face folder. About an hour on two cores.

    python scripts/train_demo.py --out demo_run

writes the folder demo_run/model, which `sled.load("demo_run/model")` reads, and asks it held-out
problems. Run it again with the same settings after an interruption: it goes on from its last
checkpoint, on the same problems. The defaults are those of the model in sled/demo/model.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx
from tokenizers import Tokenizer
from tqdm import tqdm

import sled
from sled.demo.problems import Problem, problems, prompt
from sled.eval.answers import exact_match
from sled.models import save_folder
from sled.models.config import DecoderConfig
from sled.models.decoder import Decoder
from sled.train.checkpoint import Checkpoints
from sled.train.same_run import anything, same_rates
from sled.train.steps import init_state, make_evaluation, make_train_step, muon, schedule
from sled.train.tokenizer import END_OF_TEXT, train_tokenizer, write_tokenizer

POOL = 32  # batches whose problems are drawn together and sorted by length, to waste little on padding
QUESTION_WEIGHT = 0.1  # of a question's token in the loss, where a solution's counts 1
CONTEXT = 256


@dataclasses.dataclass
class Settings:
    out: Path
    """Folder for the model, log.txt and the checkpoints."""
    layers: int = 8
    """Deep and narrow: leaving early means something."""
    width: int = 128
    """Width of the hidden states; heads are 32 wide, the MLP is 2.75 times as wide."""
    steps: int = 5000
    """Train steps. A run that is still before its last quarter may go on with another number."""
    batch: int = 32
    """Problems in a step (about 58 tokens each)."""
    rate: float = 3e-3
    """Learning rate after the warm-up; over the last quarter of the steps it falls to 0."""
    exit_weight: float = 0.2
    """Weight of the loss of one earlier layer, another one every step."""
    vocabulary: int = 1000
    """Tokens, of which 256 are the bytes and one is <|endoftext|>."""
    every: int = 100
    """Steps between two checkpoints, with loss and solved share on held-out problems."""
    seed: int = 0
    """For the initial weights."""


def encode(batch: list[Problem], tokenizer: Tokenizer) -> list[tuple[list[int], list[float]]]:
    """Tokens of question, solution and end of text, and each token's weight in the loss."""
    questions = tokenizer.encode_batch([prompt(p.question) for p in batch])
    solutions = tokenizer.encode_batch([f" {p.solution}{END_OF_TEXT}" for p in batch])
    return [(q.ids + s.ids, [QUESTION_WEIGHT] * len(q.ids) + [1.0] * len(s.ids))
            for q, s in zip(questions, solutions, strict=True)]


def pad(rows: list[tuple[list[int], list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights [B, T], zeros to the right; T - 1 a multiple of 16: few shapes compile."""
    length = 16 * -(-max(len(tokens) - 1 for tokens, _ in rows) // 16) + 1
    tokens_BT, weights_BT = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.float32)
    for i, (tokens, weights) in enumerate(rows):
        tokens_BT[i, :len(tokens)], weights_BT[i, :len(tokens)] = tokens, weights
    return tokens_BT, weights_BT


def batches(size: int, tokenizer: Tokenizer, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless fresh batches from step `start` on. Pool i is drawn with seed i, so any step can be resumed."""
    for pool in itertools.count(start // POOL):
        rows = encode(problems("train", size * POOL, seed=pool), tokenizer)
        rows.sort(key=lambda row: len(row[0]))
        order = np.random.default_rng(pool).permutation(POOL)
        for i in order[max(0, start - pool * POOL):]:
            yield pad(rows[i * size:(i + 1) * size])


def main(s: Settings) -> None:
    texts = (f"{prompt(p.question)} {p.solution}" for p in problems("train", 20_000, seed=-1))
    tokenizer = train_tokenizer(texts, s.vocabulary)
    heads, end = s.width // 32, tokenizer.token_to_id(END_OF_TEXT)
    config = DecoderConfig(
        "llama", vocab_size=tokenizer.get_vocab_size(), width=s.width, mlp_width=s.width * 11 // 4,
        num_layers=s.layers, num_heads=heads, num_kv_heads=heads, head_dim=32, max_positions=CONTEXT,
        tied_head=True, eos_ids=(end,), pad_id=end)
    model = Decoder.init(config, rngs=nnx.Rngs(s.seed)).stack()
    s.out.mkdir(parents=True, exist_ok=True)
    optimizer = muon(s.rate, s.steps)
    state = init_state(model, optimizer)
    settings = {name: value for name, value in dataclasses.asdict(s).items() if name != "out"}
    checkpoints = Checkpoints(s.out / "checkpoints", settings, every=s.every, may_change={
        "every": anything, "steps": same_rates(lambda steps: schedule(s.rate, steps))})
    if checkpoints.steps:
        state = checkpoints.restore(state).state

    train, evaluate = make_train_step(model, optimizer, exit_weight=s.exit_weight), make_evaluation(model)
    held_out = pad(encode(problems("heldout", 256), tokenizer))
    start, tokens, began = int(state.step), 0, time.time()
    steps = range(start + 1, s.steps + 1)
    with checkpoints, open(s.out / "log.txt", "a") as log, tqdm(total=s.steps, initial=start, unit="step") as bar:

        def tell(line: str):
            tqdm.write(line)
            print(line, file=log, flush=True)

        count = sum(leaf.size for leaf in jax.tree.leaves(state.weights))
        tell(f"{count:,} parameters on {jax.devices()}")
        for step, batch in zip(steps, batches(s.batch, tokenizer, start), strict=False):
            state, losses = train(state, *batch)
            tokens += int(np.count_nonzero(batch[1]))
            bar.update()
            if step % s.every == 0 or step == s.steps:
                last, early = losses
                held, solved = (np.asarray(x) for x in evaluate(state.weights, *held_out))
                checkpoints.save(step, state, {}, force=True)
                tell(f"step {step}: loss {last:.4f} (early {early:.3f}), held out {held[-1]:.4f}, "
                     f"solved {solved[-1]:.1%}, by layer {' '.join(f'{x:.2f}' for x in solved)}, "
                     f"{tokens / (time.time() - began):,.0f} tokens/s")

        nnx.update(model, state.weights)
        save_folder(model, s.out / "model")
        write_tokenizer(tokenizer, s.out / "model", CONTEXT)
        asked = problems("heldout", 500, seed=1)
        answers = sled.load(s.out / "model").generate([prompt(p.question) for p in asked], max_new_tokens=96)
        tell(f"exact match on {len(asked)} held-out problems: "
             f"{exact_match(answers.texts, [p.answer for p in asked]):.1%}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
