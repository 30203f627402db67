"""Decoding speed: greedy and SLED here, greedy in transformers, on the same weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

import sled
from sled.bench.report import BenchReport, column
from sled.bench.rival import NOT_INSTALLED, greedy, transformers_twin
from sled.fusion import SLED, FinalLayer
from sled.lm import LM
from sled.models import Decoder, DecoderConfig
from sled.settings.rules import Whole
from sled.timing import interleave

CONFIG = DecoderConfig(family="llama", vocab_size=32_000, width=768, mlp_width=2048, num_layers=12, num_heads=12,
                       num_kv_heads=12, head_dim=64, max_positions=1024)
BATCHES = (1, 8)
PROMPT_TOKENS = 32
TRANSFORMERS = "transformers greedy"


@dataclasses.dataclass
class DecodeRow:
    """One way to decode at one batch size. Seconds; `first_call` includes compilation."""

    batch: int = column("batch")
    way: str = column("way")
    first_call: float = column("first call s")
    best: float = column("best s")
    median: float = column("median s")
    first_token: float = column("first token s")
    tokens_per_second: float = column("tokens/s")
    over_greedy: float = column("x greedy")
    transformers_over_this: float | None = column("transformers / this")


def run_decode_bench(*, model: str | None = None, new_tokens: int = 64, rounds: int = 4, config: DecoderConfig = CONFIG,
                     batches: tuple[int, ...] = BATCHES) -> BenchReport:
    """Measures every way at every batch size. Without torch and transformers, only this library's.

    model: as for `sled.load`; None: random weights of `config`. No text ends before all its tokens are made.
    Raises SettingError for less than one token or round, or more tokens than the model's context holds.
    """
    Whole(1, hint="it counts the repetitions")("rounds", rounds)
    lm = None if model is None else sled.load(model, dtype="float32")
    config = lm.config if lm else config
    Whole(1, config.context - PROMPT_TOKENS, hint="prompt and new tokens lie in the model's context")(
        "new_tokens", new_tokens)
    lm = lm or LM(Decoder.init(config, rngs=nnx.Rngs(0)), name="random weights")
    lm.config = dataclasses.replace(config, eos_ids=())
    parameters = sum(x.size for x in jax.tree.leaves(lm.params))
    ways = _own_ways(lm)
    notes = []
    try:
        ways[TRANSFORMERS] = _transformers_way(lm.build(lm.params))
    except ImportError as missing:
        notes.append(NOT_INSTALLED.format(missing.name))
    rows = []
    with tqdm(total=len(batches) * len(ways) * (rounds + 3), unit="run") as bar:
        for batch in batches:
            rows += _measure(ways, batch, new_tokens, rounds, lm.config.vocab_size, bar)
    title = (f"Decoding {new_tokens} tokens after {PROMPT_TOKENS}, {lm.name}, {parameters / 1e6:.0f}M parameters, "
             "float32; best, median and tokens/s without compilation")
    return BenchReport(title, {"model": lm.name, "parameters": parameters, "new_tokens": new_tokens}, rows, notes)


def _measure(ways, batch: int, new_tokens: int, rounds: int, vocabulary: int, bar) -> list[DecodeRow]:
    prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, PROMPT_TOKENS))

    def run(way, tokens):
        made = way(prompts, tokens)
        assert made == batch * tokens, f"{made} tokens made instead of {batch * tokens}"

    def timed(tokens, rounds):
        return interleave({name: functools.partial(run, way, tokens) for name, way in ways.items()}, rounds, bar)

    first, one_token, times = timed(new_tokens, 1), timed(1, 2), timed(new_tokens, rounds)
    best = {name: of.best for name, of in times.items()}
    rival = best.get(TRANSFORMERS)
    # One token alone is a smaller program, which its first call compiles: the second counts.
    return [DecodeRow(batch=batch, way=name, first_call=first[name].best, best=best[name],
                      median=times[name].median, first_token=one_token[name].seconds[1],
                      tokens_per_second=batch * new_tokens / best[name], over_greedy=best[name] / best["greedy"],
                      transformers_over_this=rival and rival / best[name]) for name in ways]


def _own_ways(lm: LM):
    way = lambda fusion: lambda prompts, tokens: lm.generate(  # noqa: E731
        prompts.tolist(), max_new_tokens=tokens, fusion=fusion).stats.new_tokens
    return {"greedy": way(FinalLayer()), "SLED": way(SLED())}


def _transformers_way(model: Decoder):
    twin = transformers_twin(model)
    twin.generation_config.update(eos_token_id=None, pad_token_id=0)
    return lambda prompts, tokens: greedy(twin, prompts, tokens).numel()
