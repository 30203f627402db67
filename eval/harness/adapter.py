"""`SledLM`: a model and a method, as lm-evaluation-harness sees models.

Texts become tokens, windows and stop strings as with the harness's own `HFLM` at its defaults, so that plain decoding
has the scores that `lm_eval --model hf` has. Every answer is looked up in a `Cache` first, and written there in the
batch in which it was made.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sled.decoding.groups import stages_of
from sled.decoding.memory import naming_shortage
from sled.decoding.options import A_SAMPLING
from sled.decoding.scoring import score_pairs
from sled.errors import EvaluationError, SledError, TemplateError
from sled.eval.harness.cache import Cache, RequestCounts
from sled.eval.harness.requests import GenerationRequest, GenerationSettings, batches
from sled.eval.methods import Method, deciding_versions
from sled.eval.protocols.choices import Scored
from sled.io import json_digest
from sled.lm import LM
from sled.settings.describe import describe
from sled.settings.rules import Flag, Whole

GREEDY_METHOD = Method("greedy")
Found = Iterator[dict[int, Any]]  # answers by the request's index, batch by batch


class SledLM(TemplateLM):
    """`lm`, decoding by `method`, for `lm_eval.evaluate` and `lm_eval.simple_evaluate`.

    batch_size: prompts decoded, and continuations scored, together.
    max_new_tokens: the most tokens for an answer, whatever the task asks for; None: what it asks for, or 256.
    normalise: True makes scores log-probabilities, False the fusion's own values as they are (`LM.score`).
    seed: of methods and tasks that draw; text r of document d draws from random stream seed + d * repeats + r.
    cache: answers made before; None keeps them in memory.
    weights: the digest of `lm`'s weights, where it is known already.
    progress: shows a bar over the requests.
    now: the day for chat templates that write one, the same in all prompts; None: when this is made.

    Early exit and self-speculation are about making tokens: no log-likelihood depends on them, nor on sampling. A task
    of log-likelihoods is refused under such a method, for the figures would be the baseline's under its name.
    """

    def __init__(self, lm: LM, method: Method = GREEDY_METHOD, *, batch_size: int = 16,
                 max_new_tokens: int | None = None, normalise: bool = True, seed: int = 0, cache: Cache | None = None,
                 weights: str | None = None, progress: bool = True, now: datetime.datetime | None = None):
        super().__init__()
        self.lm, self.method, self.progress = lm, method, progress
        self.batch_size = Whole(1, hint="prompts are decoded in batches")("batch_size", batch_size)
        self.max_new_tokens = None if max_new_tokens is None else Whole(
            1, hint="it counts the tokens to generate")("max_new_tokens", max_new_tokens)
        self.seed = Whole(0, 2**31, hint="it begins the random streams")("seed", seed)
        self.normalise = Flag(hint="True gives log-probabilities")("normalise", normalise)
        self.special = lm.text.chats
        self.weights = weights or lm.weights_digest()
        self.now = now or datetime.datetime.now().astimezone()
        self.counts = RequestCounts()
        self.finish_reasons: dict[tuple[str, int], list[str]] = {}  # of generated texts, by task and document
        self._asked: list[tuple[str, list]] = []  # requests, with the names of the methods that they came by
        self._answers = (cache or Cache()).under(self.settings())

    def settings(self) -> dict[str, Any]:
        """The settings that decide an answer besides the request, as JSON has them."""
        return {"weights": self.weights, "model": describe(self.lm.config), "tokenizer": self.lm.text.digest,
                "dtype": str(jax.tree.leaves(self.lm.params)[0].dtype), "method": self.method.settings(),
                "normalise": self.normalise, "device": jax.devices()[0].device_kind,
                "versions": deciding_versions()}

    def check_scoring(self, what: str) -> None:
        """Raises EvaluationError where no log-likelihood depends on the settings, most are minus infinity, or the model
        gives none."""
        if stages_of(self.lm.mesh) > 1:
            raise EvaluationError(f"{what} asks for log-likelihoods, which a model on the stages of a pipeline does "
                                  "not give; load it over tensor and data, or take tasks that generate")
        idle = [name for name, there in (("exits", self.method.leaves_early), ("sampling", self.method.samples))
                if there]
        if idle:
            raise EvaluationError(f"{what} asks for log-likelihoods, which never depend on the {' and '.join(idle)} of "
                                  f"a method: the figures of {self.method.name!r} would be those of the same method "
                                  f"without; leave {' and '.join(idle)} out, or take tasks that generate")
        if getattr(self.method.decoding.fusion, "lower_bound", 0) == -math.inf:
            raise EvaluationError(f"{what} asks for log-likelihoods, but {self.method.name!r} gives minus infinity to "
                                  "an answer with a token that it leaves out, so that answers could not be told apart; "
                                  "give it a finite lower bound: DoLa's authors have -1000 (--fusion \"dola "
                                  "--lower-bound -1000\")")

    def check_texts(self, what: str) -> None:
        """Raises EvaluationError where whole texts cannot be scored: most have tokens that the fusion leaves out."""
        if hasattr(self.method.decoding.fusion, "lower_bound"):
            raise EvaluationError(f"{what} asks for the log-likelihood of whole texts, but {self.method.name!r} leaves "
                                  "tokens out, each of which counts as its lower bound: their number is all that a "
                                  "perplexity would show; take tasks of choices, or a fusion that leaves none out")
        self.check_scoring(what)

    # Tokens.

    @functools.cached_property
    def eot_token_id(self) -> int:
        return self._named_id("eos_token", self.lm.config.eos_ids[:1])

    @functools.cached_property
    def _eos(self) -> str | None:
        """The tokenizer's EOS token as written, where the model does not end at it by itself; it ends texts too."""
        token = self.special.tokens.get("eos_token")
        known = token and self.lm.text.id_of(token)
        return None if known is None or known in self.lm.config.eos_ids else token

    @functools.cached_property
    def prefix_token_id(self) -> int:
        """The token of an empty context: the model's BOS token, or else its EOS token."""
        return self._named_id("bos_token", ()) if "bos_token" in self.special.tokens else self.eot_token_id

    def _named_id(self, name: str, otherwise: Sequence[int]) -> int:
        token = self.special.tokens.get(name)
        found = [self.lm.text.id_of(token)] if token else list(otherwise)
        if not found or found[0] is None:
            raise EvaluationError(f"{self.lm.name} names no {name}, with which texts begin or end for the harness; put "
                                  "it into tokenizer_config.json in the model's folder")
        return found[0]

    @property
    def max_length(self) -> int:
        return self.lm.config.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids. None: the tokenizer's special tokens, unless the text begins with the prefix token already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.lm.text.spelling(self.prefix_token_id))
        return self.lm.text.encode(string, special=add_special_tokens)

    # Chat.

    @property
    def tokenizer_name(self) -> str:
        return self.lm.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = True) -> str | None:
        """The model's chat template; None where none is to be used. Raises TemplateError where it has none."""
        return None if chat_template is False or chat_template is None else self.special.template({})

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of these messages. Where the template takes no system message, it goes without, as in HFLM."""
        show = functools.partial(self.special.prompt, goes_on=not add_generation_prompt, now=self.now)
        try:
            return show(chat_history)
        except TemplateError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return show(rest)

    # Log-likelihoods.

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.check_scoring("this task")
        self._asked.append(("loglikelihood", requests))
        pairs = []
        for request in requests:
            with _naming_sample(request):
                pairs.append(self._window(*self._encoded(*request.args)))
        return self._scored(pairs)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        self.check_texts("this task")
        self._asked.append(("loglikelihood_rolling", requests))
        texts = []
        for request in requests:
            with _naming_sample(request):
                texts.append([self._window(*make_disjoint_window(window)) for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length, context_len=1)])
        scored = iter(self._scored([window for of_text in texts for window in of_text]))
        return [sum(next(scored)[0] for _ in of_text) for of_text in texts]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        return self._scored([self._window(context, continuation) for _, context, continuation in requests])

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, the prefix token in place of an empty context."""
        if not continuation:
            raise EvaluationError(f"the log-likelihood of an empty text is asked for, after {context[-40:]!r}; every "
                                  "choice must have at least one token")
        if context:
            before, scored = self._encode_pair(context, continuation)
        else:
            before, scored = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            scored = scored[1:] if scored[:1] == before else scored
        if not before:
            raise EvaluationError(f"its context, {context!r}, is white space alone, which the harness moves to the "
                                  "text that is scored, so that no token stands before it; change the task's "
                                  "doc_to_text, or leave the sample out")
        if not scored:
            raise EvaluationError(f"the text to score, {continuation[:40]!r}, shares its only token with the context; "
                                  "change the task, or leave the sample out")
        return before, scored

    def _scored(self, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple[float, bool]]:
        answers = self._answer([{"context": context, "continuation": continuation} for context, continuation in pairs],
                               lambda which: self._score(pairs, which))
        found = [Scored(total, greedy, len(continuation), left_out)
                 for (total, greedy, left_out), (_, continuation) in zip(answers, pairs, strict=True)]
        self.counts.scored += len(found)
        self.counts.left_out += sum(each.left_out > 0 for each in found)
        return found

    def _window(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A context cut from the left so that it and the continuation fit; the last token takes no place."""
        if len(continuation) > self.max_length:
            raise EvaluationError(f"the text to score is {len(continuation)} tokens long, but the model's context "
                                  f"holds {self.max_length}; change the task, or leave the sample out")
        cut = max(0, len(context) + len(continuation) - self.max_length - 1)
        self.counts.cut(cut)
        return tuple(context[cut:]), tuple(continuation)

    def _score(self, pairs, which: list[int]) -> Found:
        of_context: dict[tuple[int, ...], list[int]] = {}
        for index in which:
            of_context.setdefault(pairs[index][0], []).append(index)
        contexts = sorted(of_context, key=lambda context: -len(context))
        for begin in range(0, len(contexts), self.batch_size):
            some = [i for context in contexts[begin:begin + self.batch_size] for i in of_context[context]]
            asked = [tuple(np.array(ids, np.int32) for ids in pairs[i]) for i in some]
            scored = score_pairs(self.lm.build, self.lm.params, asked, fusion=self.method.decoding.fusion,
                                 batch_size=self.batch_size, normalise=self.normalise)
            with naming_shortage("scoring", "lower batch_size (--batch-size), or take fewer layers"):
                while found := {some[at]: (float(logp_T.sum()), bool((best_T == asked[at][1]).all()), int(left_T.sum()))
                                for at, logp_T, best_T, left_T in itertools.islice(scored, self.batch_size)}:
                    yield found

    def answer_again(self, samples: int) -> None:
        """Answers anew what was asked of the first so many samples of each task; for the time that it takes."""
        other = copy.copy(self)
        other._answers, other._asked, other.counts, other.progress = Cache().under({}), [], RequestCounts(), False
        other.finish_reasons = {}
        for kind, requests in self._asked:
            getattr(other, kind)([request for request in requests if request.doc_id < samples])

    def _answer(self, described: list[dict[str, Any]], compute: Callable[[list[int]], Found]) -> list[Any]:
        """The answer of each request. Those not kept yet are computed, equal ones once; each batch is kept at once.

        described: all that decides each answer, besides `settings()`. compute: takes the indices of requests.
        """
        keys = [json_digest(request) for request in described]
        answers = self._answers.find(dict.fromkeys(keys))
        new = [i for i, key in enumerate(keys) if key not in answers]
        first = {keys[i]: i for i in reversed(new)}
        self.counts.requests += len(keys)
        self.counts.repeated += len(new) - len(first)
        with tqdm(total=len(keys), initial=len(keys) - len(first), unit="request", desc=self.method.name,
                  disable=not self.progress) as bar:
            for found in compute(sorted(first.values())):
                computed = {keys[i]: answer for i, answer in found.items()}
                self._answers.add(computed)
                answers |= computed
                self.counts.computed += len(computed)
                bar.update(len(computed))
        return [answers[key] for key in keys]

    # Texts.

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self._asked.append(("generate_until", requests))
        repeats: dict[tuple, int] = {}
        wanted = []
        for request in requests:
            place = (request.task_name, request.doc_id, request.idx)
            again = repeats[place] = repeats.get(place, -1) + 1
            with _naming_sample(request):
                wanted.append(self._request(*request.args,
                                            number=(request.doc_id or 0) * (request.repeats or 1) + again))
        answers = self._answer([each.described() for each in wanted], lambda which: self._generate(wanted, which))
        for request, answer in zip(requests, answers, strict=True):
            self.counts.unfinished += answer["finish_reason"] == "length"
            self.counts.new_tokens += answer["tokens"]
            self.counts.layers += answer["layers"]
            self.finish_reasons.setdefault((request.task_name, request.doc_id), []).append(answer["finish_reason"])
        return [answer["text"] for answer in answers]

    def _request(self, context: str, gen_kwargs: dict[str, Any], *, number: int) -> GenerationRequest:
        settings = GenerationSettings.of(gen_kwargs, at_most=self.max_new_tokens, eos=self._eos,
                                         sampling=self.method.decoding.sampling if self.method.samples else None)
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise EvaluationError(f"the task lets an answer be {settings.max_new_tokens} tokens long, but the context "
                                  f"of {self.lm.name} holds {self.max_length}, the prompt included; allow fewer by "
                                  "max_new_tokens (--max-new-tokens)")
        bos = self.special.tokens.get("bos_token")
        ids = self.lm.text.encode(context, special=bos is None or not context.startswith(bos))
        if not ids:
            raise EvaluationError("the prompt is empty, and the tokenizer adds no token of its own, so "
                                  "there is nothing to start from; change the task's doc_to_text")
        self.counts.cut(max(0, len(ids) - room))
        warm = A_SAMPLING("sampling", settings.sampling).temperature > 0
        return GenerationRequest(tuple(ids[-room:]), settings, self.seed + number if warm else None)

    def _generate(self, requests: list[GenerationRequest], which: list[int]) -> Found:
        for batch in batches(requests, which, self.batch_size):
            settings, seed = requests[batch[0]].settings, requests[batch[0]].seed
            out = self.lm.decode([requests[i].ids for i in batch], self.method.decoding.replace(
                max_new_tokens=settings.max_new_tokens, stop=settings.until, sampling=settings.sampling),
                seed=seed or 0, batch_size=self.batch_size)
            yield {i: {"text": text, "tokens": len(tokens), "finish_reason": reason, "layers": sum(layers)}
                   for i, text, tokens, reason, layers in zip(batch, out.texts, out.tokens, out.finish_reasons,
                                                              out.exit_layers, strict=True)}


@contextlib.contextmanager
def _naming_sample(request) -> Iterator[None]:
    """Errors begin with the sample that this request of the harness is of, by its number in the report's samples."""
    try:
        yield
    except SledError as error:
        if request.doc_id is None:
            raise
        raise type(error)(f"sample {request.doc_id} of the task {request.task_name!r}: {error}") from error
