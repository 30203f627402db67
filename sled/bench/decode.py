"""Decoding speed: greedy and SLED here, greedy in transformers, on the same weights, beside the least a step can take.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

import sled
from sled.bench.floor import floors
from sled.bench.report import BenchReport, column
from sled.bench.rival import NOT_INSTALLED, greedy, transformers_twin
from sled.decoding.batch import Entry, Slots
from sled.decoding.options import Decoding
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
ROOM = 1024


@dataclasses.dataclass
class DecodeRow:
    """One way to decode at one batch size. Seconds; `first_call` includes compilation.

    step_ms: milliseconds from one token of the text to the next; None where there is only one.
    """

    batch: int = column("batch")
    way: str = column("way")
    first_call: float = column("first call s")
    best: float = column("best s")
    median: float = column("median s")
    first_token: float = column("first token s")
    step_ms: float | None = column("step ms")
    tokens_per_second: float = column("tokens/s")
    over_greedy: float = column("x greedy")
    transformers_over_this: float | None = column("transformers / this")


@dataclasses.dataclass
class FloorRow:
    """Work that no step can do without, at one batch size: milliseconds, and how many times as long a greedy step is.
    """

    batch: int = column("batch")
    work: str = column("alone")
    best_ms: float = column("best ms")
    greedy_over_this: float | None = column("greedy's step / this")


def run_decode_bench(*, model: str | None = None, new_tokens: int = 64, rounds: int = 4, config: DecoderConfig = CONFIG,
                     batches: tuple[int, ...] = BATCHES, profile: Path | None = None) -> BenchReport:
    """Measures every way at every batch size. Without torch and transformers, only this library's.

    model: as for `sled.load`; None: random weights of `config`. No text ends before all its tokens are made.
    profile: a folder for a trace of one more run of each of this library's ways, by the JAX profiler.
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
    ways, least = _own_ways(lm), floors(lm)
    own, notes = dict(ways), []
    try:
        ways[TRANSFORMERS] = _transformers_way(lm.build(lm.params))
    except ImportError as missing:
        notes.append(NOT_INSTALLED.format(missing.name))
    rows = []
    with tqdm(total=len(batches) * len(ways | least) * (rounds + 3), unit="run") as bar:
        for batch in batches:
            rows += _measure(ways, least, batch, new_tokens, rounds, lm.config.vocab_size, bar)
    rows.sort(key=lambda row: isinstance(row, FloorRow))
    if profile is not None:
        _trace(own, batches, new_tokens, lm.config.vocab_size, profile)
        notes.append(f"The trace is in {profile}: TensorBoard's profiler and Perfetto show it, the parts of a step by "
                     "the names of `jax.named_scope`.")
    title = (f"Decoding {new_tokens} tokens after {PROMPT_TOKENS}, {lm.name}, {parameters / 1e6:.0f}M parameters, "
             "float32; best, median and tokens/s without compilation")
    return BenchReport(title, {"model": lm.name, "parameters": parameters, "new_tokens": new_tokens}, rows, notes)


def _measure(ways, least, batch: int, new_tokens: int, rounds: int, vocabulary: int, bar) -> list:
    prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, PROMPT_TOKENS))

    def run(way, tokens):
        made = way(prompts, tokens)
        assert made == batch * tokens, f"{made} tokens made instead of {batch * tokens}"

    def timed(tokens, rounds):
        calls = {name: functools.partial(run, way, tokens) for name, way in (ways | least).items()}
        return interleave(calls, rounds, bar)

    first, one_token, times = timed(new_tokens, 1), timed(1, 2), timed(new_tokens, rounds)
    best = {name: of.best for name, of in times.items()}
    rival = best.get(TRANSFORMERS)
    # One token alone is a smaller program, which its first call compiles: the second counts.
    first_token = {name: of.seconds[1] for name, of in one_token.items()}
    step_ms = {name: 1e3 * (best[name] - first_token[name]) / (new_tokens - 1) if new_tokens > 1 else None
               for name in ways}
    return [*(DecodeRow(batch=batch, way=name, first_call=first[name].best, best=best[name],
                        median=times[name].median, first_token=first_token[name], step_ms=step_ms[name],
                        tokens_per_second=batch * new_tokens / best[name], over_greedy=best[name] / best["greedy"],
                        transformers_over_this=rival and rival / best[name]) for name in ways),
            *(FloorRow(batch=batch, work=name, best_ms=1e3 * best[name] / new_tokens,
                       greedy_over_this=step_ms["greedy"] and step_ms["greedy"] * new_tokens / best[name] / 1e3)
              for name in least)]


def _trace(ways, batches, new_tokens: int, vocabulary: int, folder: Path) -> None:
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        for batch in batches:
            prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, PROMPT_TOKENS))
            for name, way in ways.items():
                with jax.profiler.TraceAnnotation(f"{name}, batch {batch}"):
                    way(prompts, new_tokens)


def _own_ways(lm: LM):
    way = lambda fusion: lambda prompts, tokens: lm.generate(  # noqa: E731
        prompts.tolist(), max_new_tokens=tokens, fusion=fusion).stats.new_tokens
    return {"greedy": way(FinalLayer()), "SLED": way(SLED()), "SLED, rate 1": way(SLED(1.0)),
            f"greedy, room for {ROOM:,}": _roomy_way(lm)}


def _roomy_way(lm: LM):
    """Greedy, in caches of more positions than the text takes."""
    def way(prompts, tokens):
        decoding = Decoding(max_new_tokens=tokens)
        room = min(max(ROOM, PROMPT_TOKENS + tokens), lm.config.context)
        slots = Slots(lm.build, lm.params, decoding, slots=len(prompts), capacity=room, stop_ids=())
        slots.enter({row: Entry(prompt, tokens, seed=0, decoding=decoding) for row, prompt in enumerate(prompts)})
        slots.advance(tokens)
        return sum(len(slots.emitted(row).tokens) for row in range(len(prompts)))

    return way


def _transformers_way(model: Decoder):
    twin = transformers_twin(model)
    twin.generation_config.update(eos_token_id=None, pad_token_id=0)
    return lambda prompts, tokens: greedy(twin, prompts, tokens).numel()
