"""Chats: from a prompt's messages, tools and documents to the text that the chat template renders.

The text equals that of `apply_chat_template` with the same arguments. Content that a template would silently drop, or
print as a Python object, is passed in another form; if no form works, the prompt is refused by name.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, meta, nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from moewh.warehouse.errors import MoewhError, UsageError, short_message

CLOCK = "strftime_now"
"""The function with which a template reads the time."""
GENERATION_PROMPT = "add_generation_prompt"
Messages = list[dict[str, Any]]

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Role of each speaker in ShareGPT's `from`."""
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class ChatRules:
    """Inputs of the chat template besides a prompt's own messages, tools and documents."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """From --chat-argument."""
    generation_prompt: bool = False
    """Whether the text ends with the start of the model's answer."""
    now: datetime | None = None
    """The time that the template sees; None: the current time."""


@dataclass(frozen=True)
class _Chat:
    messages: Messages
    tools: list[Any] | None
    documents: list[Any] | None


class ChatRenderer:
    """Renders chats with a tokenizer's template. Prompts have names for use in messages."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rules: ChatRules, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._warn = warn
        self._warned: set[str] = set()
        self.saw_clock = False
        """Whether a template has asked for the time so far."""

    def text(self, payload: str, name: str) -> str:
        """Return a chat as text. Raises MoewhError, with the prompt's name, if it cannot be rendered."""
        if not self._tokenizer.chat_template:
            raise MoewhError(
                f"{name} is chat messages, but the tokenizer has no chat template. Give one with --chat-template, or "
                "a text column."
            )
        try:
            chat = _read_chat(json.loads(payload))
            return self._best(chat, name)
        except _UnusableChatError as error:
            raise MoewhError(f"{name}: {error}") from error

    def _best(self, chat: _Chat, name: str) -> str:
        """Render the chat as given, or in another form if the template refuses it or drops some of its text."""
        texts, plain = _texts(chat.messages), _is_plain(chat)
        kept, best = -1, ""
        refusals: list[_UnusableChatError] = []
        for form in _forms(chat):
            try:
                text = self._render(form, name)
            except _UnusableChatError as error:
                refusals.append(error)
                continue
            found = sum(part in text for part in texts)
            if found > kept:
                kept, best = found, text
            if found == len(texts) or (plain and found):
                break
        if kept < 0:
            raise refusals[0 if plain else -1]
        return best

    def _render(self, chat: _Chat, name: str) -> str:
        """Apply the template. Raises _UnusableChatError if it fails, or prints a list or object as Python does."""
        try:
            template = self._tokenizer.get_chat_template(None, chat.tools)
            self._warn_of_unused(chat, template, name)
            with self._clock(template):
                text = str(
                    self._tokenizer.apply_chat_template(
                        chat.messages,
                        tools=chat.tools,
                        documents=chat.documents,
                        tokenize=False,
                        add_generation_prompt=self._rules.generation_prompt,
                        **self._rules.arguments,
                    )
                )
        except Exception as error:  # a template is a program, which may raise anything; the prompt is refused
            raise _UnusableChatError(f"the chat template refuses its messages: {short_message(error)}.") from error
        given = [chat.messages, chat.tools, chat.documents]
        strings = list(_strings(given))
        for part in _containers(given):
            printed = str(part)
            if printed in text and printed != json.dumps(part) and not any(printed in own for own in strings):
                raise _UnusableChatError(
                    f"the chat template writes {printed[:60]} as Python prints it. Give text there, or another "
                    "--chat-template."
                )
        return text

    @contextmanager
    def _clock(self, template: str) -> Iterator[None]:
        """Give the template the run's time instead of the clock's, and note whether it asks for it."""
        functions = _compile_jinja_template(template).environment.globals
        clock = functions[CLOCK]

        def strftime_now(format: str) -> str:
            self.saw_clock = True
            return str(clock(format) if self._rules.now is None else self._rules.now.strftime(format))

        functions[CLOCK] = strftime_now
        try:
            yield
        finally:
            functions[CLOCK] = clock

    def _warn_of_unused(self, chat: _Chat, template: str, name: str) -> None:
        for what, given in (("tools", chat.tools), ("documents", chat.documents)):
            if given and what not in self._warned and what not in _variables(template):
                self._warned.add(what)
                self._warn(f"{name} has {what}, but the chat template does not use them: they are not in its text.")


class _UnusableChatError(Exception):
    """A fault in a chat, described without the prompt's name."""


def _read_chat(payload: Any) -> _Chat:
    parts = payload if isinstance(payload, dict) else {"messages": payload}
    messages = parts.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _UnusableChatError("its messages are not a list of at least one message.")
    return _Chat(
        [_message(message, index) for index, message in enumerate(messages)],
        _objects(parts.get("tools"), "tools"),
        _objects(parts.get("documents"), "documents"),
    )


def _message(given: Any, index: int) -> dict[str, Any]:
    """Return a message with role and content, without the keys that hold null: templates print them as None."""
    if not isinstance(given, dict):
        raise _UnusableChatError(
            f"the chat template refuses message {index}: it is {_kind(given)}, not an object with role and content."
        )
    message = _without_nulls(given)
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, index)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise _UnusableChatError(f"message {index} has no role.")
    if content is None:
        if not (message.get("tool_calls") or message.get("function_call")):
            raise _UnusableChatError(f"message {index} ({role}) has no content.")
    elif isinstance(content, list):
        message["content"] = [_text_part(part, index) for part in content] or ""
    elif not isinstance(content, str | dict):
        raise _UnusableChatError(f"message {index} ({role}) has content that is {_kind(content)}, not text.")
    return message


def _from_sharegpt(message: dict[str, Any], index: int) -> dict[str, Any]:
    """Return a message of ShareGPT (`from`, `value`) with `role` and `content`."""
    speaker = message["from"]
    role = _SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise _UnusableChatError(f"message {index} is from {speaker!r}. Use {', '.join(sorted(_SPEAKERS))}.")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message.get("value"), **others}


def _text_part(given: Any, index: int) -> dict[str, Any]:
    """Return one part of multi-part content. Raises _UnusableChatError unless it is text."""
    if isinstance(given, str):
        return {"type": "text", "text": given}
    if not isinstance(given, dict):
        raise _UnusableChatError(f"message {index} has a part that is {_kind(given)}, not text.")
    part = _without_nulls(given)
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise _UnusableChatError(f"message {index} has a part of type {kind!r}. Only text parts are supported.")
    return part


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _objects(value: Any, what: str) -> list[Any] | None:
    """Return tools or documents as a list of objects, from JSON text or nested values."""
    try:
        value = json.loads(value or "null") if isinstance(value, str) else value
        if isinstance(value, list):
            value = [json.loads(item) if isinstance(item, str) else item for item in value]
    except ValueError as error:
        raise _UnusableChatError(f"its {what} are not valid JSON: {error}.") from error
    if value is None or (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        return value
    raise _UnusableChatError(f"its {what} are not a list of objects.")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _forms(chat: _Chat) -> Iterator[_Chat]:
    """Yield a chat as given, then in the other form: parts joined into a string, or strings as one-part lists."""
    yield chat
    if _is_plain(chat):
        yield _Chat([_as_parts(message) for message in chat.messages], chat.tools, chat.documents)
    else:
        yield _Chat([_joined(message) for message in chat.messages], chat.tools, chat.documents)


def _is_plain(chat: _Chat) -> bool:
    return not any(isinstance(message.get("content"), list) for message in chat.messages)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": "".join(part["text"] for part in content)} if isinstance(content, list) else message


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _texts(messages: Messages) -> list[str]:
    """Return the text of every message, part by part, without surrounding space, which templates strip."""
    contents = [message.get("content") for message in messages]
    texts = [
        part if isinstance(part, str) else part["text"]
        for content in contents
        for part in (content if isinstance(content, list) else [content])
        if isinstance(part, str) or (isinstance(content, list) and part)
    ]
    return [text.strip() for text in texts if text.strip()]


def _containers(value: Any) -> Iterator[Any]:
    """Yield every list and object within a value, itself included."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


@lru_cache(16)
def _variables(template: str) -> frozenset[str]:
    """Return the names that a template reads but does not set; of the functions given to it, only the clock."""
    tree = _compile_jinja_template(template).environment.parse(template)
    asks = {CLOCK for name in tree.find_all(nodes.Name) if name.name == CLOCK and name.ctx == "load"}
    return frozenset(meta.find_undeclared_variables(tree) | asks)


def template_variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the names that the tokenizer's templates read; empty without one. Raises MoewhError for a broken one."""
    templates = tokenizer.chat_template or {}
    named = {"default": templates} if isinstance(templates, str) else templates
    if not isinstance(named, dict) or not all(isinstance(one, str) for one in named.values()):
        raise MoewhError("the tokenizer's chat template is not text. Give another one with --chat-template.")
    if named and "default" not in named:
        raise MoewhError(
            f"the tokenizer has chat templates for {', '.join(sorted(named))}, and no default one. Save the one you "
            "mean as a file, and give it with --chat-template."
        )
    try:
        used = [_variables(one) for one in named.values()]
    except TemplateError as error:
        raise MoewhError(
            f"the chat template is not valid Jinja: {error}. Give another one with --chat-template."
        ) from error
    return frozenset().union(*used)


def chat_arguments(given: tuple[str, ...]) -> dict[str, Any]:
    """Return {name: value} from `name=value`; a value is JSON if it parses as JSON, else text.

    Raises UsageError for a malformed or repeated argument, or one that moewh sets itself.
    """
    arguments: dict[str, Any] = {}
    reserved = _reserved()
    for argument in given:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--chat-argument {argument!r} is not name=value.")
        if name in arguments:
            raise UsageError(f"--chat-argument {name} is given twice.")
        if name in reserved:
            raise UsageError(f"--chat-argument {name} is set by moewh or the prompts. Choose another name.")
        arguments[name] = _value(value)
    return dict(sorted(arguments.items()))


def _reserved() -> frozenset[str]:
    """Return the names taken by apply_chat_template, the renderer or the template's functions."""
    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    taken = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(taken | set(_compile_jinja_template("").environment.globals) | {"messages", CLOCK})


def _value(text: str) -> Any:
    def no_number(name: str) -> Any:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=no_number)
    except ValueError:
        return text
