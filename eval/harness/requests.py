"""Requests to generate a text: the harness's settings for one, read and checked, and which are decoded together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sled.decoding.sampling import Sampling
from sled.errors import EvaluationError, SettingError
from sled.settings.describe import describe

OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
KNOWN = ("until", "max_gen_toks", "do_sample", *OF_SAMPLING)
DEFAULT_MAX = 256  # tokens to make where a task does not say, as the harness's own models have it


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """A task's `generation_kwargs`, read and checked. until: the strings that end a text."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, given: Mapping[str, Any], *, at_most: int | None = None, eos: str | None = None,
           sampling: Sampling | None = None) -> GenerationSettings:
        """Reads them as the harness's own models do (`lm_eval.models.utils.normalize_gen_kwargs`).

        at_most: the most new tokens, whatever the task asks for; eos: a stop string besides the task's; sampling: used
        in place of the task's.
        Raises EvaluationError for names that mean nothing here, and for sampling without a temperature.
        """
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        asked = normalize_gen_kwargs({name: value for name, value in given.items() if value is not None},
                                     default_max_gen_toks=DEFAULT_MAX if at_most is None else at_most)
        if unknown := sorted(asked.keys() - set(KNOWN)):
            raise EvaluationError(f"the task's generation_kwargs have {', '.join(unknown)}, which mean nothing here; "
                                  f"give only {', '.join(KNOWN)}")
        if asked["do_sample"] and not asked.get("temperature"):
            raise EvaluationError("the task's generation_kwargs have do_sample, but no temperature above 0, so nothing "
                                  "says how to draw; give a temperature, such as 1.0, or leave do_sample out")
        until = tuple(s for s in handle_stop_sequences(asked["until"], eos) if s)
        if any(not isinstance(s, str) for s in until):
            raise EvaluationError(f"the task's stop strings are {list(until)!r}; give strings")
        most = asked["max_gen_toks"] if at_most is None else min(asked["max_gen_toks"], at_most)
        if sampling is None:
            names = OF_SAMPLING if asked["do_sample"] else ("repetition_penalty",)  # all that greedy decoding reads
            try:
                sampling = Sampling(**{name: asked[name] for name in names if name in asked})
            except SettingError as reason:
                raise EvaluationError(f"the task's generation_kwargs cannot be followed: {reason}") from reason
        return cls(until, most, sampling)


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. ids: its tokens. seed: of its random stream, None where nothing is drawn."""

    ids: tuple[int, ...]
    settings: GenerationSettings
    seed: int | None

    def described(self) -> dict[str, Any]:
        """The fields as JSON has them: with model and method, they decide the text."""
        return {"ids": self.ids, **vars(self.settings), "sampling": describe(self.settings.sampling), "seed": self.seed}


def batches(requests: list[GenerationRequest], which: Iterable[int], size: int) -> Iterator[list[int]]:
    """Indices of requests to decode together, `size` at a time, all of the same settings: the longest prompts first;
    those that draw, by their random streams, because prompt i draws from the stream of the first plus i.

    What is left over at the end goes with the batch before it, so that `LM.generate` fills it up to a height that is
    compiled already.
    """
    shared = {i: repr(requests[i].described() | {"ids": None, "seed": None}) for i in which}
    order = lambda i: -len(requests[i].ids) if requests[i].seed is None else requests[i].seed  # noqa: E731
    ordered = sorted(shared, key=lambda i: (shared[i], order(i)))
    begun = [at for at, i in enumerate(ordered) if not at or shared[ordered[at - 1]] != shared[i]
             or (requests[i].seed is not None and requests[i].seed != requests[ordered[at - 1]].seed + 1)]
    for begin, end in itertools.pairwise([*begun, len(ordered)]):
        full = max(1, (end - begin) // size)
        cuts = [*(begin + size * n for n in range(full)), end]
        yield from (ordered[at:until] for at, until in itertools.pairwise(cuts))
