"""`LM`: a model and its tokenizer, with what one does with them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from sled.decoding.batch import Emitted, Generation
from sled.decoding.checkpoint_sampling import WORD, checkpoint_sampling, listed
from sled.decoding.groups import stages_of
from sled.decoding.memory import naming_shortage
from sled.decoding.options import A_STRATEGY, FINAL_LAYER, FULL_DEPTH, GREEDY, NEW_TOKENS, Decoding, decoding_arguments
from sled.decoding.rows import RunShape, batch_height, begin_run, shape_of_runs
from sled.decoding.sampling import Sampling
from sled.decoding.scoring import score_pairs
from sled.decoding.staged import check_staged
from sled.decoding.state import Plan
from sled.errors import CheckpointWarning, DecodingWarning, PromptError, SettingError, warn
from sled.exits import Policy, Schedule
from sled.fusion import Strategy
from sled.io import shown
from sled.lens.lens import Lens, look
from sled.models import Decoder, save_folder
from sled.models.config import WEIGHT_TYPES
from sled.models.digest import digest_of_weights
from sled.models.generation import acting
from sled.models.hub import create_repository, upload
from sled.models.merge import Merge
from sled.models.sharding.mesh import spelled
from sled.models.sharding.stages import unstaged
from sled.models.stored import parameter_shapes
from sled.results import Chunk, Output, Scores, Stats
from sled.settings.per_row import check_rows
from sled.settings.rules import Flag, OneOf, OrNone, Whole
from sled.settings.unknown import naming_unknown
from sled.text.chat import Messages, conversations
from sled.text.prompts import Prompt, Prompts, check_room, is_one, pair_ids, prompt_ids
from sled.text.stop_strings import StopStrings
from sled.text.tokenizer import Tokenizer

FEW_VERIFICATIONS = 16  # drafts are judged by no fewer
LOW_ACCEPTANCE = 0.3  # of drafts; at it those of 4 tokens give 1.4 tokens per verification
STOP_CHUNK = 16  # tokens between two looks at the text for stop strings


class LM:
    """A decoder with its tokenizer. Made by `sled.load`, or from a `Decoder` of one's own.

    generation: settings of the checkpoint's `generation_config.json`, besides token ids.
    mesh: the devices over which the weights lie (`sled.models.sharding.load_sharded`); None: on one.
    """

    def __init__(self, model: Decoder, text: Tokenizer | None = None, *, name: str = "the model",
                 generation: Mapping[str, Any] | None = None, mesh: jax.sharding.Mesh | None = None):
        self.config = model.config
        self.name = name
        self.mesh = mesh
        self.text = text or Tokenizer(None, name)
        self.generation = dict(generation or {})
        self._told = False  # that the checkpoint has a sampling of its own
        self._told_of_drafts = False  # that they cost more than they save
        self._told_of_context = False  # that it ended texts
        graph, params = nnx.split(model)
        self.params = nnx.as_pure(params)  # arrays alone: variables are flattened in Python, at every call
        self.build = Merge(graph, self.params, mesh)

    @decoding_arguments
    def generate(self, prompts: Prompts, *, fusion: Strategy = FINAL_LAYER, exits: Policy = FULL_DEPTH,
                 schedule: Schedule | None = None, sampling: Sampling | Literal["checkpoint"] = GREEDY,
                 max_new_tokens: int = NEW_TOKENS, stop: str | Sequence[str] = (), seed: int = 0,
                 batch_size: int = 32, progress: bool = False) -> Output:
        """Continues each prompt.

        prompts: a string, a list of token ids, a `sled.Chat`, or a list of these.
        fusion, exits, schedule, sampling, max_new_tokens, stop: see `sled.Decoding`. Where fusion, exits or sampling
            take an array with one entry per row, the rows are the prompts. sampling="checkpoint" is
            `checkpoint_sampling`.
        seed: prompt i draws from random stream seed + i, in whatever batch it lies.
        batch_size: prompts decoded together; a row's tokens do not depend on the others, in float32 (`sled.Decoding`).
            Over the stages of a pipeline up to as many batches as there are stages follow each other, and are in
            memory.
        progress: shows a bar over the prompts.

        Raises: PromptError, SettingError, TemplateError, TokenizerError (text needed, but no tokenizer).
        """
        decoding = Decoding(fusion, exits, schedule, self.sampling_of(sampling), max_new_tokens, stop)
        return self.decode(prompts, decoding, seed=seed, batch_size=batch_size, progress=progress)

    def chat(self, messages: str | Messages | Sequence[str | Messages], *, system: str | None = None,
             variables: Mapping[str, Any] | None = None, **settings) -> Output:
        """The assistant's next message in a conversation, or in each of several.

        messages: a list such as [{"role": "user", "content": "Hello"}], a string, which is a user's one message, or a
            list of such conversations.
        system, variables: a system message before each, and further variables of the template: see `sled.Chat`, which
            is a conversation for everything else that takes prompts.
        settings: all that `generate` takes, with the same meaning.

        Raises: as `generate`; TemplateError where the model has no chat template, or it refuses these messages.
        """
        return self.generate(conversations(messages, system, variables), **settings)

    @naming_unknown
    def decode(self, prompts: Prompts, decoding: Decoding, *, seed: int = 0, batch_size: int = 32,
               progress: bool = False) -> Output:
        """As `generate`, with all settings as one value."""
        batch_size = Whole(1, hint="prompts are decoded in batches")("batch_size", batch_size)
        ids, decoding, seed = self._checked(prompts, decoding, seed)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # rows of like length share a batch
        shape = shape_of_runs(self.build, len(ids), decoding, batch_size=batch_size)
        batches = [order[at:at + shape.prompts] for at in range(0, len(order), shape.prompts)]
        rows: dict[int, StopStrings] = {}
        emitted: dict[int, Emitted] = {}
        runs = []
        with tqdm(total=len(ids), unit="prompt", disable=not progress) as bar:
            for batch in batches:
                run = self._begin(ids, batch, decoding, shape, seed)
                for done in self._advance(run, len(batch), decoding, STOP_CHUNK if decoding.stop else None):
                    rows.update(zip(batch, done, strict=True))
                emitted.update({i: run.emitted(at).first(len(rows[i].tokens)) for at, i in enumerate(batch)})
                runs.append(run)
                bar.update(len(batch))
        rows_in_order = [rows[i] for i in range(len(ids))]
        stats = self._stats(runs, ids, emitted.values())
        self._tell_of_drafts(decoding.exits, stats)
        return Output(
            texts=[row.text() for row in rows_in_order] if self.text.available else None,
            tokens=[row.tokens for row in rows_in_order],
            finish_reasons=[row.finish_reason() for row in rows_in_order],
            exit_layers=[emitted[i].exit_layers for i in range(len(ids))],
            stats=stats)

    @decoding_arguments
    def stream(self, prompts: Prompts, *, fusion: Strategy = FINAL_LAYER, exits: Policy = FULL_DEPTH,
               schedule: Schedule | None = None, sampling: Sampling | Literal["checkpoint"] = GREEDY,
               max_new_tokens: int = NEW_TOKENS, stop: str | Sequence[str] = (), seed: int = 0,
               chunk: int = 8) -> Iterator[Chunk]:
        """As `generate`, all prompts in one batch, yielding what is new every `chunk` tokens.

        Where drafts are verified, a chunk may have some more tokens: no block of drafts is cut.

        The prompts are read before it returns, and errors raised; new tokens are made as chunks are taken.
        """
        chunk = Whole(1, hint="it counts the tokens between two outputs")("chunk", chunk)
        decoding = Decoding(fusion, exits, schedule, self.sampling_of(sampling), max_new_tokens, stop)
        ids, decoding, seed = self._checked(prompts, decoding, seed)
        shape = shape_of_runs(self.build, len(ids), decoding, batch_size=batch_height(len(ids)))
        run = self._begin(ids, range(len(ids)), decoding, shape, seed)
        return self._chunks(run, ids, decoding, chunk)

    def _chunks(self, run: Generation, ids: list[np.ndarray], decoding: Decoding, chunk: int) -> Iterator[Chunk]:
        sent_tokens, sent_text = [0] * len(ids), [""] * len(ids)
        for rows in self._advance(run, len(ids), decoding, chunk):
            emitted = [run.emitted(i).first(len(row.tokens)) for i, row in enumerate(rows)]
            tokens = [row.tokens[sent:] for row, sent in zip(rows, sent_tokens, strict=True)]
            exit_layers = [row.exit_layers[sent:] for row, sent in zip(emitted, sent_tokens, strict=True)]
            sent_tokens = [len(row.tokens) for row in rows]
            texts = None
            if self.text.available:
                now = [row.final_text() if going else row.text()
                       for row, going in zip(rows, run.active[:len(rows)], strict=True)]
                texts = [text[len(sent):] for text, sent in zip(now, sent_text, strict=True)]
                sent_text = now
            stats = self._stats([run], ids, emitted)
            yield Chunk(texts=texts, tokens=tokens, exit_layers=exit_layers, stats=stats)
        self._tell_of_drafts(decoding.exits, stats)

    @decoding_arguments
    @naming_shortage("scoring", "lower batch_size, or give shorter texts or fewer layers")
    def score(self, prompts: Prompts, continuations: Prompts | Sequence[Prompts], *, fusion: Strategy = FINAL_LAYER,
              normalise: bool = True, batch_size: int = 16, progress: bool = False) -> Scores:
        """Log-probabilities of given continuations; each distinct prompt is run once.

        Give one prompt with one continuation or a list of them, or a list of prompts with, for
        each, one continuation or a list of them. Continuations are strings or token ids, like their
        prompts; after a `sled.Chat` they are either, and answers to it. The result has the shape of
        `continuations` (one continuation: a list of one).

        Fused scores are normalised by a log-softmax over the vocabulary. A token that the fusion leaves out, as SLED
        does outside its top tokens, has the fusion's lower bound, which is no probability: `Scores.left_out` marks it.

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
            if single:
                raise PromptError("a list of prompts was given, but one continuation by itself, "
                                  f"{shown(continuations)}; give a list of continuations, one or several for each "
                                  "prompt")
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
        for index, logp_T, best_T, left_T in tqdm(scored, total=len(pairs), unit="text", disable=not progress):
            tokens_T = pairs[index][1]
            results[index] = (tokens_T.tolist(), logp_T.tolist(), float(logp_T.sum()),
                              bool((best_T == tokens_T).all()), left_T.tolist())
        columns = [list(column) for column in zip(*(results[i] for i in range(len(pairs))), strict=True)]
        if nested:
            columns = [_regroup(column, [len(group) for group in groups]) for column in columns]
        return Scores(*columns)

    @decoding_arguments
    @naming_shortage("the lens", "give a shorter text")
    def lens(self, text: Prompt, *, fusion=None) -> Lens:
        """Every layer's own next tokens after every token of `text`: see `sled.Lens`.

        fusion: a strategy whose choice is shown beside the layers', such as `sled.SLED()`.
        """
        [ids, *more] = prompt_ids(text, self.text, self.config)
        if more:
            raise PromptError(f"the lens reads one text, but {1 + len(more)} were given; look at each by itself")
        if fusion is not None:
            check_rows(A_STRATEGY("fusion", fusion), 1, hint="the lens reads one text, so give one value")
        name = self.text.token if self.text.available else str
        return look(self.build, self.params, ids, fusion=fusion, name_token=name)

    @property
    def checkpoint_sampling(self) -> Sampling:
        """The sampling that the checkpoint's `generation_config.json` asks for, as transformers' `generate` reads it.

        Greedy where it asks for none. It can be given wherever there is a sampling (`sled.Engine`, `sled.calibrate`,
        methods of an evaluation). Lengths and stop strings are not part of it.
        Raises SettingError for settings that are not to be had here, by name.
        """
        return checkpoint_sampling(self.generation, self.name)

    def weights_digest(self) -> str:
        """The digest by which answers, calibrations and exports know the weights: `sled.models.digest`.

        Reads all weights once: for a large model, seconds. It is the same on any mesh.
        """
        if self.mesh is None:
            return digest_of_weights(self.params)
        return digest_of_weights(nnx.state(self._decoder()), parameter_shapes(self.config))

    def _decoder(self) -> Decoder:
        """The model with its layers one after the other."""
        decoder, stages = self.build(self.params), stages_of(self.mesh)
        return decoder if stages == 1 else unstaged(decoder, stages)

    @naming_unknown
    def save(self, path: str | Path, *, dtype: str | None = None) -> Path:
        """Writes a Hugging Face folder with tokenizer and settings for generation: see `sled.models.save_folder`.

        dtype: None keeps the weights as they are here, which is float32 where `sled.load` widened them for a CPU.
        """
        dtype = OrNone(OneOf(WEIGHT_TYPES, hint="None keeps the weights as they are"))("dtype", dtype)
        return save_folder(self._decoder(), path, dtype=dtype, tokenizer_from=self.text.folder,
                           generation=self.generation)

    @naming_unknown
    def push_to_hub(self, repo_id: str, *, private: bool | None = None, message: str = "Upload the model") -> str:
        """Uploads what `save` writes to the Hugging Face hub; returns the address of the commit.

        repo_id: "owner/name", or a name alone for one of your own; made where there is none. Weights of an earlier
            model there are replaced. `sled export --push` writes a model card too.
        private: of a new repository, whether only its owner sees it; None: as the owner's account has it.
        message: of the commit.

        Raises UploadError, before anything is written, where nobody is logged in or the repository is another's; and
        what `save` raises.
        """
        repo_id = create_repository(repo_id, private=private)
        with tempfile.TemporaryDirectory() as folder:
            return upload(self.save(Path(folder) / "model"), repo_id, message)

    def __repr__(self) -> str:
        c, leaves = self.config, jax.tree.leaves(self.params)
        dtypes = " and ".join(sorted({leaf.dtype.name for leaf in leaves}))
        count, size = sum(map(math.prod, parameter_shapes(c).values())), sum(leaf.nbytes for leaf in leaves)
        ends = ", ".join(f"{i} {self.text.token(i)!r}" if self.text.available else str(i) for i in c.eos_ids)
        heads = c.exit_heads and f"{c.exit_heads.kind}, after layers {', '.join(map(str, c.exit_heads.layers))}"
        rows = {
            "model": f"{c.family}, {c.num_layers} layers, {c.width} wide, {c.num_heads} heads, {c.num_kv_heads} of K/V",
            "parameters": f"{count:,}, {dtypes}, {size / 1e6:,.1f} MB",
            "vocabulary": f"{c.vocab_size:,} tokens, texts end at {ends or 'none of them'}",
            "context": f"{c.context:,} tokens" + (c.beyond and f"; {c.beyond}"),
            "exit heads": heads or "none: exits share the final norm and projection",
            "tokenizer": "yes" if self.text.available else "none: prompts are lists of token ids",
            "sampling": f"the checkpoint's: {listed(acting(self.generation)) or 'greedy'}",
            "folder": self.text.folder,
            "devices": self.mesh and spelled(self.mesh.shape),
        }
        return "\n".join([f"LM {self.name!r}", *(f"  {name:<11} {value}" for name, value in rows.items() if value)])

    def sampling_of(self, sampling: Sampling | Literal["checkpoint"]) -> Sampling:
        """The sampling that a user gave or named. Warns once that the checkpoint has its own, where none was given."""
        if isinstance(sampling, str):
            if sampling == WORD:
                return self.checkpoint_sampling
            raise SettingError(f"sampling is {shown(sampling)}, but must be {WORD!r}, the model's own, or a "
                               "sled.Sampling(...), of which sled.Sampling() is greedy")
        if sampling is GREEDY and not self._told and (own := acting(self.generation)):
            self._told = True
            warn(f"{self.name} is decoded greedily, though its generation_config.json has {listed(own)}; give "
                 f"sampling={WORD!r} (--sampling {WORD}) to follow it", CheckpointWarning)
        return sampling

    def check(self, decoding: Decoding) -> None:
        """Raises SettingError for what this model, as it lies on its devices, cannot decode by, whatever the prompts.
        """
        decoding.check_context(self.config.context)
        plan = Plan.of(decoding.exits, decoding.fusion, self.build.outline)
        if stages_of(self.mesh) > 1:
            check_staged(plan, decoding, self.build)

    def _checked(self, prompts: Prompts, decoding: Decoding, seed: int) -> tuple[list[np.ndarray], Decoding, int]:
        """The prompts' token ids, with settings that fit them and the first seed."""
        ids = prompt_ids(prompts, self.text, self.config)
        seed = Whole(0, 2**32 - len(ids), hint="prompt i draws from stream seed + i, one of 2**32")("seed", seed)
        decoding.check_context(self.config.context)
        check_room(ids, decoding.max_new_tokens, self.config)
        return ids, decoding.check_rows(len(ids), hint="give one value for all prompts, or an entry for each"), seed

    def _begin(self, ids: list[np.ndarray], rows: Sequence[int], decoding: Decoding, shape: RunShape,
               seed: int) -> Generation:
        return begin_run(self.build, self.params, ids, rows, decoding, shape, context=self.config.context, seed=seed,
                     stop_ids=self.config.eos_ids)

    def _stats(self, runs: Sequence[Generation], ids: list[np.ndarray], emitted: Collection[Emitted]) -> Stats:
        return Stats.of(runs, emitted, prompt_tokens=sum(map(len, ids)), num_layers=self.config.num_layers)

    def _tell_of_drafts(self, exits: Policy, stats: Stats) -> None:
        """Warns, once, where few drafts are right, or they cost more layers than they save."""
        if self._told_of_drafts or stats.verifications < FEW_VERIFICATIONS:
            return
        layer = exits.first_exit(self.config.num_layers)
        over, acceptance = stats.layers_over_plain(layer, self.config.num_layers), stats.acceptance or 0
        if over > 1 or acceptance < LOW_ACCEPTANCE:
            self._told_of_drafts = True
            warn(f"{acceptance:.0%} of {stats.drafted} drafts after layer {layer} were accepted, so {over:.1f} times "
                 "as many layers ran as without drafts; sled.layers(lm, prompts) (sled layers) tells after which layer "
                 "and how much to draft, if at all, or how to train a model for it", DecodingWarning)

    def _tell_of_context(self, rows: Sequence[StopStrings], most: int) -> None:
        """Warns, once, where texts ended with the model's context, before the `most` tokens that they might have."""
        cut = sum(row.finish_reason() == "length" and len(row.tokens) < most for row in rows)
        if cut and not self._told_of_context:
            self._told_of_context = True
            warn(f"{cut} of {len(rows)} texts ended where the model's context of {self.config.context:,} tokens did, "
                 f"before {most:,} new ones; give shorter prompts, or a model with a longer context", DecodingWarning)

    def _advance(self, run: Generation, count: int, decoding: Decoding,
                 chunk: int | None) -> Iterator[list[StopStrings]]:
        """Runs to the end, yielding the first `count` rows after every `chunk` tokens."""
        rows = [StopStrings(self.text, decoding.stop, self.config.eos_ids) for _ in range(count)]
        while run.active.any():
            run.advance(chunk)
            for i, row in enumerate(rows):
                row.update(run.emitted(i).tokens)
            ended = [i for i, row in enumerate(rows) if row.stopped and run.active[i]]
            if ended:
                run.stop(ended)
            yield rows
        self._tell_of_context(rows, decoding.max_new_tokens)


def _regroup(flat: list, sizes: list[int]) -> list[list]:
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in sizes]
