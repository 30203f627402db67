"""`LM`: a model and its tokenizer, with what one does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx
from tqdm import tqdm

from sled.calibration.calibrate import calibrate
from sled.calibration.record import Calibration
from sled.calibration.tune import Tuned, tune
from sled.decoding.generation import Generation
from sled.decoding.options import (
    A_POLICY,
    A_SAMPLING,
    A_STRATEGY,
    FINAL_LAYER,
    FULL_DEPTH,
    GREEDY,
    NEW_TOKENS,
    stop_strings,
    which_schedule,
)
from sled.decoding.sampling import Sampling
from sled.decoding.scoring import score_pairs
from sled.errors import PromptError
from sled.exits import EarlyExit, Policy, Schedule
from sled.lens.lens import Lens, look
from sled.models import Decoder
from sled.results import Chunk, Output, Scores, Stats
from sled.settings.per_row import check_rows, take_rows
from sled.settings.rules import Flag, Whole
from sled.text.prompts import Prompts, is_one, pair_ids, prompt_ids
from sled.text.stop_strings import Row
from sled.text.tokenizer import Text

STOP_CHUNK = 16  # tokens between two looks at the text for stop strings


class Merge:
    """Builds the network from its parameters; equal graphs share compiled programs.

    The hash is taken once: it walks the whole graph (milliseconds), and every jitted call asks for it.
    """

    def __init__(self, graph: nnx.GraphDef):
        self._graph = graph
        self._hash = hash(graph)

    def __call__(self, params):
        return nnx.merge(self._graph, params)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or (isinstance(other, Merge) and self._graph == other._graph)


class LM:
    """A decoder with its tokenizer. Made by `sled.load`, or from a `Decoder` of one's own."""

    def __init__(self, model: Decoder, text: Text | None = None, *, name: str = "the model"):
        self.config = model.config
        self.name = name
        self.text = text or Text(None, name)
        graph, self.params = nnx.split(model)
        self.build = Merge(graph)

    def generate(self, prompts: Prompts, *, max_new_tokens: int = NEW_TOKENS, fusion=FINAL_LAYER,
                 exits: Policy = FULL_DEPTH, schedule: Schedule | None = None, sampling: Sampling = GREEDY,
                 seed: int = 0, stop: str | Sequence[str] = (), batch_size: int = 32,
                 progress: bool = False) -> Output:
        """Continues each prompt.

        prompts: a string, a list of token ids, or a list of either.
        max_new_tokens: the most tokens a row gets, within the model's context.
        fusion: how the layers decide together (`sled.SLED()`, `sled.DoLa()`, ...).
        exits: whether a token may leave before the last layer (`sled.EarlyExit(...)`), or be guessed there
            and verified (`sled.SelfSpeculation(...)`); by default it goes through all layers.
        schedule: when deeper layers run, for the batch; changes the time, never the text. None: the exits' own.
        sampling: greedy unless told otherwise.
            Where fusion, exits or sampling take an array with one entry per row, the rows are the prompts.
        seed: prompt i draws from random stream seed + i, in whatever batch it lies.
        stop: strings that end a text.
        batch_size: prompts decoded together; a row's tokens do not depend on the others.
        progress: shows a bar over the prompts.

        Raises: PromptError, SettingError, TokenizerError (text needed, but no tokenizer).
        """
        batch_size = Whole(1, hint="prompts are decoded in batches")("batch_size", batch_size)
        ids = prompt_ids(prompts, self.text, self.config)
        seed, stop = _first_seed(seed, len(ids)), stop_strings(stop)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # rows of like length share a batch
        batches = [order[at:at + batch_size] for at in range(0, len(order), batch_size)]
        rows: dict[int, Row] = {}
        layers: dict[int, list[int]] = {}
        runs = []
        with tqdm(total=len(ids), unit="prompt", disable=not progress) as bar:
            for batch in batches:
                run = self._begin(ids, batch, max_new_tokens, height=min(batch_size, len(ids)), seed=seed,
                                  fusion=fusion, exits=exits, schedule=schedule, sampling=sampling)
                for done in self._advance(run, len(batch), stop, STOP_CHUNK if stop else None):
                    rows.update(zip(batch, done, strict=True))
                layers.update({i: run.exit_layers(at)[:len(rows[i].tokens)] for at, i in enumerate(batch)})
                runs.append(run)
                bar.update(len(batch))
        rows_in_order = [rows[i] for i in range(len(ids))]
        return Output(
            texts=[row.text() for row in rows_in_order] if self.text.available else None,
            tokens=[row.tokens for row in rows_in_order],
            finish_reasons=[row.finish_reason() for row in rows_in_order],
            exit_layers=[layers[i] for i in range(len(ids))],
            stats=Stats.of(runs, prompt_tokens=sum(map(len, ids)), exit_layers=layers.values(),
                           num_layers=self.config.num_layers))

    def stream(self, prompts: Prompts, *, chunk: int = 8, max_new_tokens: int = NEW_TOKENS, fusion=FINAL_LAYER,
               exits: Policy = FULL_DEPTH, schedule: Schedule | None = None, sampling: Sampling = GREEDY, seed: int = 0,
               stop: str | Sequence[str] = ()) -> Iterator[Chunk]:
        """As `generate`, all prompts in one batch, yielding what is new every `chunk` tokens.

        The prompts are read before it returns, and errors raised; new tokens are made as chunks are taken.
        """
        chunk = Whole(1, hint="it counts the tokens between two outputs")("chunk", chunk)
        ids = prompt_ids(prompts, self.text, self.config)
        seed, stop = _first_seed(seed, len(ids)), stop_strings(stop)
        run = self._begin(ids, range(len(ids)), max_new_tokens, height=len(ids), seed=seed, fusion=fusion,
                          exits=exits, schedule=schedule, sampling=sampling)
        return self._chunks(run, ids, stop, chunk)

    def _chunks(self, run: Generation, ids: list[np.ndarray], stop: Sequence[str], chunk: int) -> Iterator[Chunk]:
        sent_tokens, sent_text = [0] * len(ids), [""] * len(ids)
        for rows in self._advance(run, len(ids), stop, chunk):
            layers = [run.exit_layers(i)[:len(row.tokens)] for i, row in enumerate(rows)]
            tokens = [row.tokens[sent:] for row, sent in zip(rows, sent_tokens, strict=True)]
            exit_layers = [of_row[sent:] for of_row, sent in zip(layers, sent_tokens, strict=True)]
            sent_tokens = [len(row.tokens) for row in rows]
            texts = None
            if self.text.available:
                now = [row.settled_text() if going else row.text()
                       for row, going in zip(rows, run.active, strict=True)]
                texts = [text[len(sent):] for text, sent in zip(now, sent_text, strict=True)]
                sent_text = now
            yield Chunk(texts=texts, tokens=tokens, exit_layers=exit_layers,
                        stats=Stats.of([run], prompt_tokens=sum(map(len, ids)), exit_layers=layers,
                                       num_layers=self.config.num_layers))

    def score(self, prompts: Prompts, continuations: Prompts | Sequence[Prompts], *, fusion=FINAL_LAYER,
              normalise: bool = True, batch_size: int = 16, progress: bool = False) -> Scores:
        """Log-probabilities of given continuations; each distinct prompt is run once.

        Give one prompt with one continuation or a list of them, or a list of prompts with, for
        each, one continuation or a list of them. Continuations are strings or token ids, like their
        prompts. The result has the shape of `continuations` (one continuation: a list of one).

        Fused scores are normalised by a log-softmax over the vocabulary; the lower bound of SLED and
        of the clamp shows as a very low log-probability of the tokens outside the top-k.

        fusion: its settings are the same for all; an array with an entry per row is refused.
        normalise: False leaves the log-softmax out and gives the fusion's own values, logits for `sled.FinalLayer()`;
            SLED's and DoLa's published TruthfulQA scores are sums of such.

        Raises: PromptError, SettingError, TokenizerError.
        """
        normalise = Flag(hint="True gives log-probabilities, False the fusion's own values")("normalise", normalise)
        batch_size = Whole(1, hint="continuations are scored in batches")("batch_size", batch_size)
        single = is_one(continuations, "a continuation")
        if is_one(prompts):
            nested, groups = False, [[(prompts, c)] for c in ([continuations] if single else continuations)]
        else:
            if len(prompts) != len(continuations):
                raise PromptError(f"{len(prompts)} prompts but {len(continuations)} continuations; give one "
                                  "continuation, or one list of them, for each prompt")
            one = [is_one(c, "a continuation") for c in continuations]
            nested = not all(one)
            groups = [[(p, c)] if alone else [(p, x) for x in c]
                      for p, c, alone in zip(prompts, continuations, one, strict=True)]
        pairs = [pair_ids(p, c, self.text, self.config) for group in groups for p, c in group]
        if not pairs:
            raise PromptError("no continuation was given; give at least one for the prompt")
        check_rows(A_STRATEGY("fusion", fusion), 1,
                   hint="a continuation's score is the same in any company, so give one value for all")
        scored = score_pairs(self.build, self.params, pairs, fusion=fusion, batch_size=batch_size,
                             normalise=normalise)
        results = {}
        for index, logp_T, best_T in tqdm(scored, total=len(pairs), unit="text", disable=not progress):
            tokens_T = pairs[index][1]
            results[index] = (tokens_T.tolist(), logp_T.tolist(), float(logp_T.sum()), bool((best_T == tokens_T).all()))
        columns = [list(column) for column in zip(*(results[i] for i in range(len(pairs))), strict=True)]
        if nested:
            columns = [_regroup(column, [len(group) for group in groups]) for column in columns]
        return Scores(*columns)

    def lens(self, text: str | Sequence[int], *, fusion=None) -> Lens:
        """What each layer would say after every token of `text`: see `sled.Lens`.

        fusion: a strategy whose choice is shown beside the layers', such as `sled.SLED()`.
        """
        [ids, *more] = prompt_ids(text, self.text, self.config)
        if more:
            raise PromptError(f"the lens reads one text, but {1 + len(more)} were given; look at each by itself")
        if fusion is not None:
            check_rows(A_STRATEGY("fusion", fusion), 1, hint="the lens reads one text, so give one value")
        name = self.text.token if self.text.available else str
        return look(self.build, self.params, ids, fusion=fusion, name_token=name)

    def calibrate(self, prompts: Prompts, *, exits: EarlyExit, delta: float = 0.1, epsilon: float = 0.05,
                  grid: Iterable[float] | None = None, loss: str | Callable | None = None,
                  references: Sequence[Any] | None = None, risk: Callable | None = None, fusion=FINAL_LAYER,
                  schedule: Schedule | None = None, sampling: Sampling = GREEDY, max_new_tokens: int = NEW_TOKENS,
                  seed: int = 0, stop: str | Sequence[str] = (), batch_size: int = 32,
                  progress: bool = True) -> Calibration:
        """The lowest threshold of `exits` that can be shown to keep the expected loss at `delta` or below.

        The guarantee (Learn-then-Test, Angelopoulos et al. 2021; for early exit CALM, Schuster et al. 2022): if
        these prompts are independent draws from the source of those to come, the choice exceeds `delta` with
        probability `epsilon` at most. Fix the settings before you look at results; see docs/calibration.md.

        prompts: as for `generate`, at least ln(epsilon) / ln(1 - delta) of them; a few hundred are usual.
        exits: the early exit meant; its own threshold is not read.
        grid: thresholds, descending; tried one after the other, down to the first that fails.
        loss: what is bounded, in [0, 1] per prompt. "rouge" (None means it): 1 - ROUGE-L between the token ids of
            the early and the full model's output; "exact": whether they differ; or a function of both texts
            (token ids, without a tokenizer).
        references, risk: instead of a loss, what a right answer is, one per prompt, and risk(text, reference) in
            [0, 1]; the loss is then max(0, risk of the early text - risk of the full model's).
        fusion, schedule, sampling, max_new_tokens, stop, batch_size: as for `generate`, and as you will serve. Prompt
            i draws from stream seed + i at every threshold.
        progress: shows a bar over the runs.

        Raises: CalibrationError (too few prompts, a loss outside [0, 1]), PromptError, SettingError, TokenizerError.
        """
        return calibrate(self, prompts, exits=exits, delta=delta, epsilon=epsilon, grid=grid, loss=loss,
                         references=references, risk=risk, fusion=fusion, schedule=schedule, sampling=sampling,
                         max_new_tokens=max_new_tokens, seed=seed, stop=stop, batch_size=batch_size, progress=progress)

    def tune(self, prompts: Prompts, *, exits: Policy | Sequence[Policy], rounds: int = 5, fusion=FINAL_LAYER,
             sampling: Sampling = GREEDY, max_new_tokens: int = NEW_TOKENS, seed: int = 0,
             stop: str | Sequence[str] = (), batch_size: int = 32, progress: bool = True) -> Tuned:
        """The fastest way to leave early here: every policy with every schedule, and no early exit, timed side by side.

        Whether leaving early pays depends on model, machine, batch and prompts; where it does not, the result's
        `exits` leaves nothing early. Texts under `sled.EarlyExit` are as far from the full model's as its threshold
        lets them be: `calibrate` that first.

        prompts: like those to come; enough to fill a batch. exits: one policy or several.
        rounds: how often every way is timed, after one run that compiles; the fastest counts.
        fusion, sampling, max_new_tokens, seed, stop, batch_size: as you will serve.

        Raises: PromptError, SettingError, TokenizerError.
        """
        return tune(self, prompts, exits=exits, rounds=rounds, fusion=fusion, sampling=sampling,
                    max_new_tokens=max_new_tokens, seed=seed, stop=stop, batch_size=batch_size, progress=progress)

    def _begin(self, ids: list[np.ndarray], batch: Sequence[int], max_new_tokens: int, *, height: int, seed: int,
               fusion, exits, schedule, sampling) -> Generation:
        """A run of `height` rows: prompts `batch` of `ids`, and idle rows so that the shape is one compiled before.

        Settings with an entry per prompt follow their prompts; an idle row repeats the first one's.
        """
        new = Whole(1, hint="it counts the tokens to generate")("max_new_tokens", max_new_tokens)
        for rule, name, settings in ((A_STRATEGY, "fusion", fusion), (A_POLICY, "exits", exits),
                                     (A_SAMPLING, "sampling", sampling)):
            check_rows(rule(name, settings), len(ids), hint="give one value for all prompts, or an entry for each")
        rows = [*batch, *[batch[0]] * (height - len(batch))]
        limits = [min(new, self.config.max_positions - len(ids[i])) for i in batch]
        return Generation(self.build, self.params, [ids[i] for i in rows],
                          limits=[*limits, *[0] * (height - len(batch))], seeds=[seed + i for i in rows],
                          policy=take_rows(exits, rows), schedule=which_schedule(schedule, exits),
                          fusion=take_rows(fusion, rows), sampling=take_rows(sampling, rows),
                          stop_ids=self.config.eos_ids)

    def _advance(self, run: Generation, count: int, stop: Sequence[str], chunk: int | None) -> Iterator[list[Row]]:
        """Runs to the end, yielding the first `count` rows after every `chunk` tokens."""
        rows = [Row(self.text, stop, self.config.eos_ids) for _ in range(count)]
        while run.active.any():
            run.advance(chunk)
            for i, row in enumerate(rows):
                row.update(run.new_tokens(i))
            ended = [i for i, row in enumerate(rows) if row.stopped and run.active[i]]
            if ended:
                run.stop(ended)
            yield rows


def _first_seed(seed: int, prompts: int) -> int:
    return Whole(0, 2**32 - prompts, hint="prompt i draws from stream seed + i, one of 2**32")("seed", seed)


def _regroup(flat: list, sizes: list[int]) -> list[list]:
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in sizes]
