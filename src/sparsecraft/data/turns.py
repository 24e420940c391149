"""The turns of a chat as people write them -> canonical messages.

A canonical message is {role, content} and, where it has such, `reasoning_content`, `tool_calls`,
`name`, `tool_call_id` for the chat template, and `train: False` where no loss is to fall on it.
"""

from __future__ import annotations

from typing import Any

from sparsecraft.data.files import strict_json
from sparsecraft.errors import DataError

# What a role is called -> the role of transformers' chat templates.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call", "tool_calls")  # as a role: the content is the calls
TEXT_COLUMNS = ("data", "dialog", "dialogue")  # whose turns may be texts, the user's first
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Whether a turn is trained: OpenAI's, Axolotl's, ms-swift's and others' words for it.
FLAGS = ("weight", "train", "training", "trainable", "train_on_turn", "loss")
# Which part of a turn is trained, or how much: nothing here can do that.
MASKS = ("mask", "masked", "loss_mask", "train_detail", "loss_scale", "loss_weight")


def messages_of(turns: Any, column: str, unused: list[str]) -> list[dict[str, Any]]:
    """Canonical messages; what they hold and nothing uses is added to `unused` by name.

    Turns are objects of role and content (or from and value), pairs of input and output, or, in
    `TEXT_COLUMNS`, texts of the user and the assistant in turn.
    """
    checked: list[dict[str, Any]] = []
    for number, turn in enumerate(_listed(turns), 1):
        if isinstance(turn, str) and column in TEXT_COLUMNS:
            turn = {"role": ("assistant", "user")[number % 2], "content": turn}
        if not isinstance(turn, dict):
            raise DataError(f"found {turn!r:.40} where a message belongs")
        turn = {key: value for key, value in turn.items() if value is not None}
        names = [key for key in turn if key in (*ROLE_KEYS, "input", "output")]
        if {"input", "output"} & set(names) and not set(ROLE_KEYS) & set(names):
            checked += _pair_of(turn, number, column, unused)
        else:
            checked.append(_Turn(turn, f"message {number}", column, unused).message())
    return checked


def pair(question: Any, answer: Any) -> list[dict[str, Any]]:
    """The messages of a question and its answer."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [
        _Turn(turn, f"message {n}", "messages", []).message() for n, turn in enumerate(turns, 1)
    ]


def _pair_of(turn: dict, number: int, column: str, unused: list[str]) -> list[dict[str, Any]]:
    """PESC's and XTuner's turns: {system?, input, output}."""
    _name_unused(turn, ("system", "input", "output"), column, unused)
    system = turn.get("system") if number == 1 else None
    if number > 1 and turn.get("system"):
        raise DataError(f"turn {number} has a system prompt of its own; give it in the first")
    head = [{"role": "system", "content": text(system, "system")}] if system else []
    return head + pair(turn.get("input"), turn.get("output"))


def _listed(turns: Any) -> list:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"found {turns!r:.40} where a non-empty list of messages belongs")
    return turns


def _name_unused(turn: dict, used: tuple[str, ...], column: str, unused: list[str]) -> None:
    unused += [f"{column}[].{key}" for key in turn if key not in used and not is_empty(turn[key])]


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict, tuple)) and not value)


class _Turn:
    """One turn that is read: where it stands, what is still unread of it."""

    def __init__(self, turn: dict[str, Any], where: str, column: str, unused: list[str]):
        self.turn, self.where, self.column, self.unused = turn, where, column, unused
        self.calls: list[dict] = []
        self.role = self._role()
        self.where += f" ({self.role})"

    def message(self) -> dict[str, Any]:
        """The canonical message.

        Raises:
            DataError: it is malformed.
        """
        found: dict[str, Any] = {"role": self.role, "content": ""}
        extras = {"reasoning_content": self._reasoning(), "tool_calls": self._calls()}
        found["content"] = self._content(bool(extras["tool_calls"]), extras)
        extras |= {key: self.turn.get(key) for key in ("name", "tool_call_id")}
        found |= {key: value for key, value in extras.items() if not is_empty(value)}
        if not self._trains():
            found["train"] = False
        used = (*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, *FLAGS, *MASKS)
        used += ("tool_calls", "function_call", "name", "tool_call_id")
        _name_unused(self.turn, used, self.column, self.unused)
        return found

    def _one_of(self, keys: tuple[str, ...]) -> Any:
        """The value of the one key of `keys` that the turn has, or of several that agree."""
        found = {key: self.turn[key] for key in keys if not is_empty(self.turn.get(key))}
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise DataError(f"{self.where} has {' and '.join(found)}, and they differ; keep one")
        return values[0] if values else None

    def _role(self) -> str:
        name = self._one_of(ROLE_KEYS)
        name = name.lower() if isinstance(name, str) else name
        if name in CALLS:
            self.calls = _read_calls(self._one_of(CONTENT_KEYS), self.where, name)
            self.turn = {key: self.turn[key] for key in self.turn if key not in CONTENT_KEYS}
            return "assistant"
        if not isinstance(name, str) or name not in ROLES:
            known = ", ".join([*ROLES, *CALLS])
            raise DataError(f"{self.where} has the role {name!r:.40}; known: {known}")
        return ROLES[name]

    def _content(self, calls: bool, extras: dict[str, Any]) -> str:
        content = self._one_of(CONTENT_KEYS)
        if content is None:  # or an empty one, which is no fault of a user's or tool's turn
            content = next((self.turn[key] for key in CONTENT_KEYS if key in self.turn), None)
        if isinstance(content, list):
            content = self._joined(content, extras)
        speaks = calls or extras["reasoning_content"]
        if content is None and speaks:
            content = ""
        silent = self.role == "assistant" and not speaks
        if not isinstance(content, str) or (silent and not content.strip()):
            raise DataError(f"{self.where} has the content {content!r:.60}")
        return unicode(content)

    def _joined(self, parts: list, extras: dict[str, Any]) -> str:
        """The text of a content in parts, as chat templates print it: one after the other."""
        texts = []
        for part in parts:
            part = {"type": "text", "text": part} if isinstance(part, str) else part
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind in ("text", "input_text", "output_text"):
                texts.append(text(part.get("text"), f"a text part of {self.where}", empty=True))
            elif kind in ("thinking", "reasoning") and not extras["reasoning_content"]:
                extras["reasoning_content"] = text(part.get(kind), f"a part of {self.where}")
            else:
                raise DataError(
                    f"{self.where} has a part of the type {kind!r:.40}; only text parts are read"
                )
        return "".join(texts)

    def _reasoning(self) -> str | None:
        found = self._one_of(REASONING_KEYS)
        return None if found is None else text(found, f"the reasoning of {self.where}")

    def _calls(self) -> list[dict]:
        for key in ("tool_calls", "function_call"):
            if not is_empty(self.turn.get(key)):
                self.calls = self.calls + _read_calls(self.turn[key], self.where, key)
        if self.calls and self.role != "assistant":
            raise DataError(f"{self.where} has tool calls; only an assistant calls tools")
        return self.calls

    def _trains(self) -> bool:
        for key in MASKS:
            if self.turn.get(key):
                raise DataError(
                    f"{self.where} has {key} {self.turn[key]!r:.40}: which part of a turn is "
                    "trained cannot be chosen here; give weight 0 to turns that are not"
                )
        trains = [flag(key, self.turn[key], self.where) for key in FLAGS if key in self.turn]
        if self.role != "assistant":  # never trained, whatever it says
            asked = [key for key in FLAGS if key in self.turn and flag(key, self.turn[key], "")]
            self.unused += [f"{self.column}[].{key} ({self.role})" for key in asked]
            return True
        return all(trains)


def flag(key: str, value: Any, where: str) -> bool:
    """Whether a turn is trained, from 0, 1, 0.0, 1.0, true or false."""
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise DataError(
            f"{where} has {key} {value!r:.40}; a turn is trained (1, true) or not (0, false)"
        )
    return bool(value)


# ------------------------------------------------------------------ tools
def _read_calls(value: Any, where: str, key: str) -> list[dict]:
    """[{id?, type, function: {name, arguments}}] of one call or several, or JSON of such."""
    value = parsed(value)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where} has the {key} {call!r:.60}, and a call of a tool is {{name, arguments}}"
            )
        # Templates print arguments as JSON: of a string they would print a quoted string.
        arguments = parsed(function.get("arguments", function.get("parameters", {})))
        calls.append(
            {key: call[key] for key in ("id",) if not is_empty(call.get(key))}
            | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    json_unicode(calls)
    return calls


def tools_of(value: Any, key: str) -> list[dict]:
    """[{type, function: {name, description, parameters}}] of a column of tools, or JSON of it."""
    value = parsed(value)
    if is_empty(value):
        return []
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        tool = parsed(tool)
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": tool}
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{key!r} holds {tool!r:.60}, which is no tool with a name")
        tools.append(tool)
    json_unicode(tools)
    return tools


def parsed(value: Any) -> Any:
    """What a string of JSON holds, or the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value)
    except ValueError:
        return value


# ------------------------------------------------------------------ text
def text(value: Any, what: str, empty: bool = False) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise DataError(f"{what} is {value!r:.40}, not text")
    return unicode(value)


def unicode(text: str) -> str:
    """`text`, refused if it holds half of a surrogate pair: no tokenizer and no file takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        found, at = text[err.start], err.start
        raise DataError(
            f"the lone surrogate {found!r} stands at character {at} of a text; remove it"
        ) from None
    return text


def json_unicode(value: Any) -> None:
    """The same for every text in a value of JSON."""
    if isinstance(value, str):
        unicode(value)
    elif isinstance(value, dict):
        for item in value.items():
            json_unicode(list(item))
    elif isinstance(value, list):
        for item in value:
            json_unicode(item)
