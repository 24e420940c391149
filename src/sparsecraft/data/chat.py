"""Chats -> text, by the tokenizer's chat template; what the template does not print is named."""

from __future__ import annotations

import functools
import re
from typing import Any

from sparsecraft.errors import DataError

OURS = ("train",)  # of a message: for the loss, not for the template
GIVEN = ("tools", "documents")  # what a template is given beside the messages
# Of messages and calls: what training can do without.
ASIDE = {
    "name": "messages[].name",
    "tool_call_id": "messages[].tool_call_id",
    "id": "messages[].tool_calls[].id",
}
MARK = "qzxmark"  # no template prints this by itself


def render(
    messages: list[dict],
    tokenizer: Any,
    generate: bool = False,
    given: dict[str, Any] | None = None,
) -> str:
    """The text of a chat; `generate` appends the header that invites the assistant's answer.

    The tokenizer's own chat template or, where it has none, `plain_chat`. Raises DataError where
    the template refuses the messages.

    Args:
        given: what the template gets beside the messages, see `given_of`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return plain_chat(messages, tokenizer.eos_token or "", generate)
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, **(given or {})
        )
    except Exception as err:  # a template is a program of a third party: anything may come
        raise DataError(f"the tokenizer's chat template refuses the row: {err}") from err


def plain_chat(messages: list[dict], eos: str, generate: bool = False) -> str:
    """The template for tokenizers that have none; `eos` ends an answer.

    PESC's (github.com/wuhy68/Parameter-Efficient-MoE), which handles one turn, carried on.
    """
    names = {"user": "Human", "assistant": "Assistant", "developer": "System"}
    text = ""
    for message in messages:
        name = names.get(message["role"], message["role"].title())
        end = eos if message["role"] == "assistant" else ""
        text += f"### {name}:\n{message['content']}{end}\n"
    return text + "### Assistant:\n" if generate else text


def render_row(row: dict, tokenizer: Any) -> str:
    """The text of a canonical chat row."""
    return render(for_template(row, tokenizer), tokenizer, given=given_of(row))


def given_of(row: dict) -> dict[str, Any]:
    """What a chat template gets of a canonical row beside its messages."""
    given = {key: row[key] for key in GIVEN if row.get(key)}
    return given | (row.get("chat_template_kwargs") or {})


def for_template(row: dict, tokenizer: Any) -> list[dict]:
    """The messages of a canonical row as its chat template reads them.

    Raises:
        DataError: a control token stands in a content, or the template does not print what the
            row has beside contents: training would lose it.
    """
    check_contents(row["messages"], tokenizer)
    fields = {key for message in row["messages"] for key in message}
    needed = [key for key in ("reasoning_content", "tool_calls") if key in fields]
    needed += [key for key in GIVEN if row.get(key)]
    for key in needed:
        if not _spelling(tokenizer, key):
            raise DataError(
                f"the row has {key}, which the tokenizer's chat template does not print; take a "
                "tokenizer whose template does, or leave the field out of the rows"
            )
    names = {"reasoning_content": _spelling(tokenizer, "reasoning_content")}
    return [
        {names.get(key) or key: value for key, value in message.items() if key not in OURS}
        for message in row["messages"]
    ]


def unprinted(row: dict, tokenizer: Any) -> list[str]:
    """Fields of a canonical chat row that its template leaves out, though training can go on.

    Names of speakers and ids of calls, which few templates print; thoughts of earlier turns, which
    templates of reasoning models drop as they do when the model answers; arguments that no template
    reads.
    """
    text = functools.cache(lambda: render_row(row, tokenizer))
    found = []
    for field, where in ASIDE.items():
        messages = [_without(field, message) for message in row["messages"]]
        if (
            messages != row["messages"]
            and _tries(row | {"messages": messages}, tokenizer) == text()
        ):
            found.append(where)
    thoughts = [message.get("reasoning_content") for message in row["messages"]]
    if any(thought and thought.strip() not in text() for thought in thoughts):
        found.append("messages[].reasoning_content (of earlier turns)")
    source = str(getattr(tokenizer, "chat_template", ""))
    arguments = row.get("chat_template_kwargs") or {}
    return found + [
        f"chat_template_kwargs.{key}"
        for key in arguments
        if not re.search(rf"\b{re.escape(key)}\b", source)
    ]


def _without(field: str, message: dict) -> dict:
    """A message, and its calls, without a field."""
    left = {key: value for key, value in message.items() if key != field}
    calls = [_without(field, call) for call in left.get("tool_calls", ())]
    return left | ({"tool_calls": calls} if calls else {})


def _tries(row: dict, tokenizer: Any) -> str | None:
    """The text of a row, or None where the template refuses it."""
    try:
        return render_row(row, tokenizer)
    except DataError:
        return None


# ------------------------------------------------------------------ what a template prints
def check_printed(messages: list[dict], text: str) -> None:
    """Refuse a chat of which a template leaves out what others than the assistant say.

    Raises:
        DataError: which message; some templates pass over roles that they do not know.
    """
    for number, message in enumerate(messages, 1):
        said = message["content"].strip()
        if message["role"] == "assistant" or said in text:
            continue
        if squeezed(said) not in squeezed(text):
            raise DataError(
                f"the chat template does not print what message {number} ({message['role']}) "
                "says; leave it out, or give it in a role that the template knows"
            )


def squeezed(text: str) -> str:
    """`text` without blanks, of which templates add and take some."""
    return "".join(text.split())


def _spelling(tokenizer: Any, field: str) -> str | None:
    """Under which name the chat template prints a field; None if it does not."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    names = {"reasoning_content": ("reasoning_content", "thinking", "reasoning")}
    for name in names.get(field, (field,)):
        if template and name in template and _prints(tokenizer, template, name):
            return name
    return None


@functools.lru_cache(maxsize=256)
def _prints(tokenizer: Any, template: str, field: str) -> bool:
    """Whether a small chat with the field, in one of the places where templates look, shows it."""
    function = {"name": MARK, "arguments": {}}
    tool = {"name": MARK, "description": MARK, "parameters": {"type": "object", "properties": {}}}
    user, reply = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    call = [{"id": "123456789", "type": "function", "function": function}]
    chats = {
        "tools": ([user, reply], {"tools": [{"type": "function", "function": tool}]}),
        "documents": ([user, reply], {"documents": [{"title": MARK, "text": MARK}]}),
        "tool_calls": ([user, {"role": "assistant", "content": "", "tool_calls": call}], {}),
    }
    messages, given = chats.get(field, ([user, reply | {field: MARK}], {}))
    called = messages
    if field not in chats:  # some templates print the thoughts before calls only
        other = [{**call[0], "function": function | {"name": "f"}}]
        called = [user, {"role": "assistant", "content": "", field: MARK, "tool_calls": other}]
    for chat in (messages, [*messages, user, reply], called):
        try:
            if MARK in render(chat, tokenizer, given=given):
                return True
        except DataError:
            continue
    return False


# ------------------------------------------------------------------ control tokens
def check_contents(messages: list[dict], tokenizer: Any) -> None:
    """Refuse contents that would be read as control tokens: they forge the ends of turns.

    Raises:
        DataError: which message holds which token.
    """
    pattern = _control(tokenizer, len(tokenizer.get_added_vocab()))
    for number, message in enumerate(messages, 1) if pattern else ():
        for key in ("content", "reasoning_content"):
            if found := pattern.search(message.get(key) or ""):
                raise DataError(
                    f"message {number} ({message['role']}) holds {found[0]!r}, a control token of "
                    "the tokenizer, which would end or begin a turn; remove it or write it in "
                    "other characters"
                )


def has_control(text: str, tokenizer: Any) -> bool:
    """Whether a text holds a control token of the tokenizer."""
    pattern = _control(tokenizer, len(tokenizer.get_added_vocab()))
    return bool(pattern and pattern.search(text))


@functools.lru_cache(maxsize=16)
def _control(tokenizer: Any, size: int) -> re.Pattern | None:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    # Thoughts are written into contents; templates look for their tags there.
    tokens = {token for token in tokens if token.strip() and "think" not in token.lower()}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len)[::-1]))) if tokens else None
