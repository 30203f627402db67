"""Special tokens and the chat template of a model's folder: its tokenizer's settings besides `tokenizer.json`.

Read as transformers reads it, and without it: `tokenizer_config.json`, `special_tokens_map.json`,
`chat_template.jinja`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sled.errors import EvaluationError, TokenizerError
from sled.io import read_object, read_text
from sled.text.added_tokens import NAMED_TOKENS

CONTINUE = "<<the message goes on here>> "  # the blank tells whether a template strips the end of a message


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """tokens: the special tokens by name (`bos_token`, ...). template: the chat template, or None.

    Nothing else of these files is read: the tokens that begin and end texts are in `tokenizer.json`, and
    transformers, too, drops `add_bos_token` and `add_eos_token` where there is one.
    """

    tokens: Mapping[str, str]
    template: str | None

    @classmethod
    def read(cls, folder: Path | None) -> TokenizerSettings:
        """Raises TokenizerError for a file that is no JSON object, EvaluationError for templates without a default."""
        if folder is None:
            return cls({}, None)
        config = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
        tokens = {name: config[name]["content"] if isinstance(config[name], dict) else config[name]
                  for name in NAMED_TOKENS if config.get(name)}
        own = folder / "chat_template.jinja"
        template = read_text(own, TokenizerError) if own.exists() else config.get("chat_template")
        if isinstance(template, list):  # folders of older models keep several under names
            by_name = {entry["name"]: entry["template"] for entry in template}
            if "default" not in by_name:
                raise EvaluationError(f"{folder} has the chat templates {', '.join(by_name)}, none of them the default;"
                                      " put the one to use into chat_template.jinja in the model's folder")
            template = by_name["default"]
        return cls(tokens, template)


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, TokenizerError) if path.exists() else {}


def render(template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str], *,
           add_generation_prompt: bool, now: datetime.datetime) -> str:
    """The prompt that a chat template makes of messages.

    tokens: special tokens by name, which templates write. now: the day that some write, too (`strftime_now`).
    add_generation_prompt: begin the assistant's answer; else the last message is left open, to be gone on with.

    Raises EvaluationError where the template refuses the messages, or does not show the last one.
    """
    import jinja2

    messages = [dict(message) for message in messages]
    if not add_generation_prompt:
        messages[-1]["content"] += CONTINUE
    try:
        text = _compiled(template).render(messages=messages, tools=None, documents=None,
                                          add_generation_prompt=add_generation_prompt, strftime_now=now.strftime,
                                          **tokens)
    except jinja2.exceptions.TemplateError as reason:
        raise EvaluationError(f"the model's chat template refuses these messages ({reason}); leave out what it does "
                              "not take, such as a system instruction, or go without the template") from reason
    if add_generation_prompt:
        return text
    before, mark, _ = text.rpartition(CONTINUE.strip())
    if not mark:
        raise EvaluationError("the model's chat template does not show the beginning of the answer that the task "
                              "gives; go without the template, or take a task without gen_prefix")
    return before if text[len(before):].startswith(CONTINUE) else before.rstrip()


@functools.cache
def _compiled(template: str):
    """A template in the environment that transformers gives it: sandboxed, blocks trimmed, and a few functions."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what is trained on, and shows what it holds."""

        tags = {"generation"}  # noqa: RUF012  jinja2's interface

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def as_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template)
    except jinja2.exceptions.TemplateError as reason:
        raise EvaluationError(f"the model's chat template cannot be read ({reason}); fetch the model again") from reason
