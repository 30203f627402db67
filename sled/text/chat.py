"""Conversations as prompts, written out by the chat template in a model's folder, as transformers writes them."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sled.errors import PromptError, TemplateError
from sled.io import read_text, shown
from sled.text.added_tokens import NAMED_TOKENS, read_if_there
from sled.text.renderer import LONGEST_TEMPLATE, Rendered, render_template

GOES_ON = "<<the message goes on here>> "  # the blank tells whether a template strips the end of a message
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that datasets and templates have for one thing
Messages = Sequence[Mapping[str, Any]]
OWN = ("messages", "add_generation_prompt")


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation, in place of a prompt: what follows is the assistant's next message.

    Everything that takes prompts takes it: `LM.generate`, `LM.stream`, `LM.score`, `LM.lens`, `Engine.submit`,
    `sled.calibrate`, `sled.tune`. The model's chat template writes it out, and its special tokens are those that the
    template writes, a BOS token among them: none is added.

    messages: such as {"role": "user", "content": "Hello"}, in order, with whatever else the template reads of them;
        or a string, which is a user's one message. A last message of the assistant's is left open, and goes on.
    system: a system message to put before them.
    variables: further variables of the template, such as {"enable_thinking": False}; tools and documents are given so,
        and "chat_template" chooses one of several templates by its name.

    Raises PromptError.
    """

    messages: str | Sequence[Mapping[str, Any]]
    system: str | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        messages = [{"role": "user", "content": self.messages}] if isinstance(self.messages, str) else self.messages
        messages = checked_messages(messages)
        if self.system is not None:
            if not isinstance(self.system, str):
                raise PromptError(f"system is {shown(self.system, 60)}, but must be a string")
            if messages[0]["role"] == "system":
                raise PromptError("system was given, but the conversation has a system message of its own; leave one "
                                  "of them out")
            messages = [{"role": "system", "content": self.system}, *messages]
        if not isinstance(self.variables, Mapping) or any(name in self.variables for name in OWN):
            raise PromptError(f"variables is {shown(self.variables, 60)}, but must be a dict of variables of "
                              f"the template, by name, without {' and '.join(OWN)}")
        object.__setattr__(self, "messages", tuple(messages))

    def answered(self, text: str) -> Chat:
        """The conversation with the beginning of an answer, to go on."""
        return Chat([*self.messages, {"role": "assistant", "content": text}], variables=self.variables)


def conversations(messages, system: str | None, variables: Mapping[str, Any] | None) -> Chat | list[Chat]:
    """A conversation (a string, or a list of messages), or several (a list of either), as prompts."""
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"messages is {shown(messages, 60)}, but must be a string, a list of messages such "
                          'as {"role": "user", "content": "Hello"}, or a list of these')
    one = isinstance(messages, str) or (bool(messages) and all(isinstance(message, Mapping) for message in messages))
    chats = [Chat(each, system, variables or {}) for each in ([messages] if one else messages)]
    return chats[0] if one else chats


def checked_messages(messages) -> list[dict[str, Any]]:
    """Messages as templates take them. Raises PromptError.

    As in transformers, what is None is left out, and the assistant's reasoning, by whatever name, has both names that
    templates read.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(f"a conversation is {shown(messages, 60)}, but must be a list of messages, at least "
                          'one, such as {"role": "user", "content": "Hello"}')
    return [_checked(message) for message in messages]


def _checked(message) -> dict[str, Any]:
    given = message if isinstance(message, Mapping) else {}
    clean = {name: value for name, value in given.items() if value is not None}
    reasoning = next((clean[name] for name in REASONING if name in clean), None)
    lacks = [] if isinstance(clean.get("role"), str) else ["a role, such as user"]
    silent = clean.get("role") == "assistant" and (reasoning is not None or "tool_calls" in clean)
    if not isinstance(clean.get("content", "" if silent else None), str | Sequence | Mapping):
        lacks.append("its text as content")
    if lacks:
        raise PromptError(f"a message is {shown(message, 60)}, but must have {' and '.join(lacks)}: write "
                          '{"role": "user", "content": "Hello"}')
    return clean if reasoning is None else {"thinking": reasoning, **clean, "reasoning_content": reasoning}


@dataclasses.dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of a model's folder, and the special tokens that they write.

    templates: by name; a folder with one has it as "default". tokens: the special tokens by name (`bos_token`, ...),
    also for those who need them without a chat. Nothing else of the tokenizer's settings is read here: the tokens that
    begin and end texts are in `tokenizer.json`, and transformers, too, drops `add_bos_token` and `add_eos_token`
    where there is one.
    """

    source: str
    templates: Mapping[str, str]
    tokens: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path | None) -> ChatTemplates:
        """As transformers reads them: files of their own (`chat_template.jinja`, `additional_chat_templates/`) count,
        or else `chat_template` of `tokenizer_config.json`. Raises TemplateError and TokenizerError."""
        if folder is None:
            return cls("the model", {}, {})
        config = read_if_there(folder / "tokenizer_config.json")
        older = {} if "added_tokens_decoder" in config else read_if_there(folder / "special_tokens_map.json")
        tokens = {name: token["content"] if isinstance(token, Mapping) else token
                  for name, token in {**config, **older}.items() if name in NAMED_TOKENS and token}
        files = {"default": folder / "chat_template.jinja"}
        files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        templates = {name: _text(file) for name, file in files.items() if file.exists()}
        if not templates:
            templates = _in_settings(config.get("chat_template"), folder / "tokenizer_config.json")
        return cls(str(folder), templates, tokens)

    def template(self, variables: Mapping[str, Any]) -> str:
        """The one that is meant: by name, else "tool_use" where there are tools, else the default.

        Raises TemplateError.
        """
        wanted = variables.get("chat_template")
        if wanted is None:
            wanted = "tool_use" if variables.get("tools") is not None and "tool_use" in self.templates else "default"
        if not self.templates:
            raise TemplateError(f"{self.source} has no chat template (chat_template.jinja, or chat_template in "
                                "tokenizer_config.json); go without a chat, or take a model tuned for chats")
        if wanted not in self.templates:
            raise TemplateError(f"{self.source} has no chat template {wanted!r}, but {', '.join(self.templates)}; name "
                                "one of them as the variable chat_template, or put one into chat_template.jinja")
        return self.templates[wanted]

    def write(self, parts: Sequence[tuple[Messages, bool]], variables: Mapping[str, Any] = {}, *,
              now: datetime.datetime) -> list[Rendered]:
        """Of each pair, the messages written out and, where it says True, the beginning of the assistant's next.

        now: the time that some templates write. Raises TemplateError, PromptError.
        """
        settings = dict(tools=None, documents=None) | dict(self.tokens)
        settings |= {name: value for name, value in variables.items() if name != "chat_template"}
        each = [settings | dict(messages=list(messages), add_generation_prompt=begin) for messages, begin in parts]
        return render_template(self.template(variables), each, now=now)

    def prompt(self, messages: Messages, variables: Mapping[str, Any] = {}, *, goes_on: bool | None = None,
               now: datetime.datetime | None = None) -> str:
        """The text after which the assistant's next message begins, or the last message goes on.

        goes_on: whether the last does; None: where it is the assistant's. now: None is this moment.

        Raises TemplateError, PromptError.
        """
        now = now or datetime.datetime.now().astimezone()
        if not (messages[-1]["role"] == "assistant" if goes_on is None else goes_on):
            return self.write([(messages, True)], variables, now=now)[0].text
        last, beginning = _going_on(messages[-1])
        [written] = self.write([([*messages[:-1], last], False)], variables, now=now)
        before, mark, _ = written.text.rpartition(GOES_ON.strip())
        if not mark or beginning.strip() not in before:
            raise TemplateError("the model's chat template does not show the answer that is to go on, or not all of "
                                "it; leave it out, or go without the template")
        return before if written.text[len(before):].startswith(GOES_ON) else before.rstrip()


def _going_on(message: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The message with a mark where its text ends, that of its last part with text if it has parts; and that text."""
    said = message.get("content")
    if isinstance(said, str):
        return {**message, "content": said + GOES_ON}, said
    at = max((i for i, part in enumerate(said or ()) if isinstance(part, Mapping) and "text" in part), default=None)
    if at is None:
        raise PromptError("the last message is the assistant's, to go on, but it has no text; leave it out")
    marked = {**said[at], "text": f"{said[at]['text']}{GOES_ON}"}
    return {**message, "content": [*said[:at], marked, *said[at + 1:]]}, str(said[at]["text"])


def _in_settings(value: Any, path: Path) -> dict[str, str]:
    """The templates in `tokenizer_config.json`: one, or a list of them by name, which older models have."""
    if value is None:
        return {}
    try:
        named = {"default": value} if isinstance(value, str) else {each["name"]: each["template"] for each in value}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(name, str) and isinstance(template, str) for name, template in named.items()):
        raise TemplateError(f"{path}: chat_template is neither a template nor a list of templates, each with a name; "
                            "fetch the file again")
    return named


def _text(path: Path) -> str:
    if path.stat().st_size > 4 * LONGEST_TEMPLATE:  # bytes of a character, at most
        raise TemplateError(f"{path} has {path.stat().st_size:,} bytes, more than any chat template; fetch it again")
    return read_text(path, TemplateError)

