"""The shapes of rows that are read, each as one canonical row.

A canonical row is {messages, tools?, documents?, chat_template_kwargs?}, {text} or {text, label},
with `train: False` where no loss is to fall on it.
A shape is read where it means one thing only. What a row holds beside it is named, never lost.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from sparsecraft.data.turns import (
    FLAGS,
    flag,
    flags_of,
    is_empty,
    json_unicode,
    messages_of,
    pair,
    parsed,
    text,
    thoughts_of,
    tools_of,
)
from sparsecraft.errors import DataError

SHAPES = (
    "{messages: [{role, content}]}, {conversations: [{from, value}]}, {prompt, completion}, "
    "{instruction, input?, output, system?, history?}, {question, answer}, "
    "{instruction?, conversation: [{input, output}]}, {text}, {text, label}; docs/guides/rows.md "
    "has them all"
)
# Columns of turns, and pairs of columns, in the order in which they are looked for.
CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "data")
SURE = CHATS[:3]  # a column of another name may hold something else
PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("query", "response"),
    ("question", "response"),
    ("problem", "solution"),
    ("question", "answer"),
    ("question", "answers"),
    ("query", "answer"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("question", "output"),
    ("inputs", "targets"),
    ("input", "output"),
    ("prompt", "chosen"),
)
REJECTED, LABELS = ("rejected", "rejected_response"), ("label", "kto_tag")
SYSTEM, CONTEXT = ("system", "system_prompt", "system_message"), ("input", "context")


def canonical(row: Any, unused: list[str]) -> dict[str, Any]:
    """One row in canonical form; fields that it holds and nothing uses are added to `unused`.

    Raises:
        DataError: what is wrong with it.
    """
    if not isinstance(row, dict):
        raise DataError(f"found {type(row).__name__} {str(row)[:40]!r} where an object belongs")
    shape = _Shape(row, unused)
    found = shape.read()
    if not shape.trains():
        found["train"] = False
    shape.name_the_rest()
    return found


class _Shape:
    """A row that is read: `left` is what no part of a shape has taken yet."""

    def __init__(self, row: dict[str, Any], unused: list[str]):
        self.row, self.unused = row, unused
        # Some sets write their columns in capitals (INSTRUCTION, RESPONSE).
        counts = Counter(str(key).lower() for key in row)
        self.names = {
            str(key).lower() if counts[str(key).lower()] == 1 else str(key): key for key in row
        }
        self.left = {n: row[key] for n, key in self.names.items() if row[key] is not None}
        self.rejects = any(self.left.get(key) for key in REJECTED)
        self.asked: list[str] = []  # the parts of a pair's question, which `text` prints apart

    def read(self) -> dict[str, Any]:
        """The canonical row of the first shape that the row has."""
        left = self.left
        chats = [key for key in CHATS if key in left and not is_empty(left[key])]
        chats = [key for key in chats if key in SURE or _are_turns(left[key])]
        pairs = [names for names in PAIRS if set(names) <= left.keys()]
        if chats and not ({"text", "label"} <= left.keys() and chats[0] not in SURE):
            return self._chat(self._turns(chats))
        if left.get("corpus"):  # PESC's plain document
            return {"text": text(left.pop("corpus"), "'corpus'")}
        if self.rejects:
            raise DataError(_PREFERENCE)
        if pairs:
            return self._chat(self._pair(*pairs[0]))
        if isinstance(left.get("chosen"), list):
            return self._chat(messages_of(left.pop("chosen"), "chosen", self.unused))
        if "text" in left:
            return self._text()
        for key in set(SURE) & left.keys():  # an empty one
            messages_of(left[key], key, [])
        keys = ", ".join(k if v is not None else f"{k} (null)" for k, v in self.row.items())
        within = [key for key, value in self.row.items() if value and _are_objects(value)]
        hint = f"; if the rows are what {within[0]!r} holds, write them alone" if within else ""
        raise DataError(f"unknown row shape with {keys or 'no keys'}{hint}")

    def trains(self) -> bool:
        """What flags of the whole row say; a loss that is a measure is left."""
        given = {key: self.left[key] for key in FLAGS if key in self.left}
        loss = given.get("loss")
        if isinstance(loss, (int, float)) and loss not in (0, 1):
            given.pop("loss")
        self.left = {key: value for key, value in self.left.items() if key not in given}
        return all(flags_of(given, "the row").values())

    def name_the_rest(self) -> None:
        self.unused += [
            self.names.get(key, key) for key, value in self.left.items() if not is_empty(value)
        ]

    # -------------------------------------------------------------- text
    def _text(self) -> dict[str, Any]:
        if {"parent_id", "role"} <= self.left.keys():
            raise DataError(
                "the row is one message of a tree of them (parent_id, role); join every path of "
                "the tree to one row of messages"
            )
        label = self.left.pop("label", None)
        # type, not isinstance: True is an int. Labels are stored in 64 bits.
        if label is not None and (type(label) is not int or not 0 <= label < 2**63):
            raise DataError(f"the label is {label!r:.40}; labels are whole numbers from 0")
        answers = {key for _, key in PAIRS if not is_empty(self.left.get(key))}
        if label is None and answers:
            raise DataError(
                f"the row has text and {min(answers)}, and whether they are a question and its "
                f"answer is not clear; call the text prompt, or drop {min(answers)}"
            )
        # An empty text is legal (text corpora hold blank lines): it counts as untrainable later.
        found = {"text": text(self.left.pop("text"), "'text'", empty=True)}
        return found if label is None else found | {"label": label}

    # -------------------------------------------------------------- turns
    def _turns(self, columns: list[str]) -> list[dict[str, Any]]:
        first, *others = columns
        messages = messages_of(parsed(self.left.pop(first)), first, self.unused)
        if self.rejects and messages[-1]["role"] != "assistant":  # the answers stand beside it
            raise DataError(_PREFERENCE)
        for other in set(others) & set(SURE):
            if messages_of(parsed(self.left.pop(other)), other, []) != messages:
                raise DataError(f"the row has {first} and {other}, which differ; keep one of them")
        if first == "conversation" and "instruction" in self.left:
            self.left["system"] = self.left.pop("instruction")
        return messages

    def _pair(self, question: str, answer: str) -> list[dict[str, Any]]:
        asked, answered = self.left.pop(question), self.left.pop(answer)
        if answer == "answers":
            answered = _only_answer(answered)
        if isinstance(asked, list) or isinstance(answered, list):
            head = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
            tail = answered if isinstance(answered, list) else [_reply(answered, self.left)]
            # A chosen conversation holds its prompt as well.
            turns = tail if tail[: len(head)] == head else [*head, *tail]
            return messages_of(turns, question, self.unused)
        parts = [text(asked, repr(question))]
        for key in CONTEXT if question in ("instruction", "question", "query") else ():
            if not is_empty(self.left.get(key)):
                parts.append(text(self.left.pop(key), repr(key), empty=True))
        self.asked = [part for part in parts if part.strip()]
        return self._history() + pair("\n\n".join(self.asked), answered, **thoughts_of(self.left))

    def _history(self) -> list[dict[str, Any]]:
        """The turns before an Alpaca row's own: [[question, answer], ...]."""
        turns = self.left.pop("history", None) or []
        if not isinstance(turns, list) or not all(
            isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns
        ):
            raise DataError(f"'history' is {turns!r:.40}, not a list of [question, answer]")
        return [message for turn in turns for message in pair(*turn)]

    # -------------------------------------------------------------- what stands beside a chat
    def _chat(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        if any(_is_false(self.left.get(key)) for key in LABELS):
            raise DataError(_PREFERENCE)
        self._flag_turns(messages)
        found: dict[str, Any] = {"messages": self._with_system(messages)}
        for key in ("tools", "functions"):
            if tools := tools_of(self.left.pop(key, None), key):
                found["tools"] = found.get("tools", []) + tools
        for key, kind in (("documents", list), ("chat_template_kwargs", dict)):
            value = self.left.pop(key, None)
            if not is_empty(value):
                if not isinstance(value, kind):
                    raise DataError(f"{key!r} is {value!r:.40}, not a {kind.__name__}")
                json_unicode(value)
                found[key] = value
        self._check_text(messages)
        return found

    def _flag_turns(self, messages: list[dict[str, Any]]) -> None:
        """Flags of all turns in one list beside them, as of LlamaFactory and NeMo."""
        for key in [key for key in FLAGS if isinstance(self.left.get(key), list)]:
            flags = [
                flag(key, value, f"an entry of {key} of the row") for value in self.left.pop(key)
            ]
            if flags and len(flags) != len(messages):
                raise DataError(
                    f"the row has {key} with {len(flags)} entries and {len(messages)} messages; "
                    "give one for each message"
                )
            for message, trains in zip(messages, flags, strict=False):
                if message["role"] == "assistant":
                    message |= {} if trains else {"train": False}
                elif trains:
                    self.unused.append(f"{key}[] ({message['role']})")

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        given = {key: self.left.pop(key) for key in SYSTEM if not is_empty(self.left.get(key))}
        prompts = {text(value, repr(key)) for key, value in given.items()}
        own = [m["content"] for m in messages[:1] if m["role"] in ("system", "developer")]
        if len(prompts | set(own if given else ())) > 1:
            raise DataError(
                f"the row has {' and '.join(given)} beside another system prompt; keep one"
            )
        system = [{"role": "system", "content": prompt} for prompt in prompts]
        return messages if own else system + messages

    def _check_text(self, messages: list[dict[str, Any]]) -> None:
        """A `text` beside a chat is the same again, as a template printed it, or ambiguous."""
        other, at = self.left.get("text"), 0
        spoken = [[message["content"].strip()] for message in messages]
        if self.asked:
            spoken[-2] = [part.strip() for part in self.asked]
        for parts in spoken if isinstance(other, str) and other.strip() else ():
            starts = [other.find(part, at) for part in parts]
            if min(starts) < 0:
                raise DataError(
                    "the row has text and a chat, and which of them is to be trained is not "
                    "clear; keep one"
                )
            at = max(start + len(part) for start, part in zip(starts, parts, strict=True))


_PREFERENCE = (
    "the row holds answers that are not preferred (rejected, or label false or 0), and training "
    "here is on answers to give; keep the chosen one as {prompt, completion}"
)


def _is_false(label: Any) -> bool:
    """Whether a label says no, also as tables and classes write it."""
    return str(label).lower() in ("false", "0", "0.0")


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _are_turns(value: Any) -> bool:
    """Whether a column that may hold something else holds turns, and not rows."""
    return isinstance(value, list) and not (
        _are_objects(value) and all({"role", "from"}.isdisjoint(item) for item in value)
    )


def _reply(answer: Any, left: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": answer, **thoughts_of(left)}


def _only_answer(answers: Any) -> str:
    """The one of several answers that are equal, also as SQuAD writes them ({text: [...]})."""
    answers = answers.get("text") if isinstance(answers, dict) else answers
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or any(answer != answers[0] for answer in answers):
        raise DataError(f"'answers' is {answers!r:.60}; training is on one answer")
    return text(answers[0], "'answers'")
