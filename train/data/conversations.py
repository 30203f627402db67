"""Conversations as documents: written out by the model's chat template; the assistant's answers are learnt."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import NamedTuple

from sled.errors import DataError
from sled.text.chat import ChatTemplates, Messages
from sled.text.tokenizer import Tokenizer

# Templates that write the date get this one: else a run that goes on tomorrow would find other data.
DAY = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Written(NamedTuple):
    """Text, and the characters from and to which it is learnt, in order; it ends with the last of these."""

    text: str
    learnt: list[tuple[int, int]]


def written(messages: Messages, chats: ChatTemplates) -> list[Written]:
    """The documents of a conversation, in which every answer of the assistant's is learnt once.

    A template that marks answers by `{% generation %}` says itself what is learnt. Else an answer is what the template
    adds to the messages before, behind the beginning of an answer, up to the end of its text: so the token that ends
    it, which is what stops a generation, is learnt too, and white space behind it is not. All answers stand in one
    document as long as the template only adds to what it wrote; where it changes that, as some take an earlier answer's
    reasoning out, another document begins, so that each is learnt behind what it will be asked behind. What comes
    behind the last answer is left out, and so is an answer to nothing. Raises DataError, TemplateError.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not answers:
        return []
    if MARKS.search(chats.template({})):
        [whole] = chats.write([(messages, False)], now=DAY)
        return _kept([Written(whole.text, [_trimmed(whole.text, *span) for span in whole.generated])])
    asked = [part for i in answers for part in ((messages[:i], False), (messages[:i], True), (messages[:i + 1], False))]
    texts = [each.text for each in chats.write(asked, now=DAY)]
    found: list[Written] = []
    for before, begun, after in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
        # Where they part: some templates begin an answer by what they do not show of one that was given.
        start = next((at for at, pair in enumerate(zip(begun, after, strict=False)) if pair[0] != pair[1]),
                     min(len(begun), len(after)))
        if start < len(before):
            raise DataError("the model's chat template changes what is before an answer when the answer comes, so that "
                            "no part of its text is the answer; train on text that was written out before")
        span = _trimmed(after, start, len(after))
        if found and after.startswith(found[-1].text):
            found[-1] = Written(after, [*found[-1].learnt, span])
        else:
            found.append(Written(after, [span]))
    return _kept(found)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The part without white space at its end."""
    return start, start + len(text[start:end].rstrip())


def _kept(found: Sequence[Written]) -> list[Written]:
    """What is left without answers that are empty, cut at the last answer's end."""
    clean = [(text, [(start, end) for start, end in learnt if end > start]) for text, learnt in found]
    return [Written(text[:learnt[-1][1]], learnt) for text, learnt in clean if learnt]


def tokenised(documents: Sequence[Written], text: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    """Ids of each document, and which of them are learnt: those with a character of what is learnt."""
    found = []
    for (ids, places), document in zip(text.encode_written([each.text for each in documents]), documents, strict=True):
        spans, at, learnt = document.learnt, 0, []
        for start, end in places:
            while at < len(spans) and spans[at][1] <= start:
                at += 1
            learnt.append(at < len(spans) and spans[at][0] < end)
        found.append((ids, learnt))
    return found
