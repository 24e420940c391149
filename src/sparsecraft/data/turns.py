"""The turns of a chat as people write them -> canonical messages.

A canonical message is {role, content} and, where it has such, `reasoning_content`, `tool_calls`,
`name`, `tool_call_id` for the chat template, and `train: False` where no loss is to fall on it.
"""

from __future__ import annotations

from typing import Any

from sparsecraft.dense.jsonfile import parse
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
# Whether a turn is trained, in the words of OpenAI, Mistral and OpenChat (weight), Axolotl (train,
# training), Tinker (trainable), ms-swift (loss, loss_scale), verl (loss_mask), slime
# (step_loss_mask), NeMo (message_loss_mask), LlamaFactory (loss_weight) and XTuner.
FLAGS = (
    *("weight", "train", "training", "trainable", "train_on_turn", "loss", "output_with_loss"),
    *("loss_mask", "step_loss_mask", "message_loss_mask", "loss_weight", "loss_scale"),
)
DENIALS = ("masked", "ignore_loss")  # torchtune's and others': what is true here is not trained
# Which part of a turn is trained, which nothing here can do, or words that are used both ways.
MASKS = ("mask", "train_detail", "token_loss_mask")


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


def pair(question: Any, answer: Any, **beside: Any) -> list[dict[str, Any]]:
    """The messages of a question and its answer, with what stands `beside` the answer."""
    reply = {"role": "assistant", "content": answer, **beside}
    turns = [{"role": "user", "content": question}, reply]
    return [
        _Turn(turn, f"message {n}", "messages", []).message() for n, turn in enumerate(turns, 1)
    ]


def thoughts_of(left: dict[str, Any]) -> dict[str, Any]:
    """The reasoning beside an answer, taken from `left`; on, off and numbers are settings."""
    settings = [key for key in REASONING_KEYS if left.get(key) in (None, "on", "off")]
    settings += [key for key in REASONING_KEYS if isinstance(left.get(key), (bool, int, float))]
    return {key: left.pop(key) for key in REASONING_KEYS if key not in settings}


def _pair_of(turn: dict, number: int, column: str, unused: list[str]) -> list[dict[str, Any]]:
    """PESC's and XTuner's turns: {system?, input, output}."""
    left = dict(turn)
    system, asked, answer = (left.pop(key, None) for key in ("system", "input", "output"))
    if number > 1 and system:
        raise DataError(f"turn {number} has a system prompt of its own; give it in the first")
    found = [{"role": "system", "content": text(system, "system")}] if system else []
    found += pair(asked, answer, **thoughts_of(left))
    if not all(flags_of(left, f"turn {number}").values()):
        found[-1]["train"] = False
    _name_unused(left, f"{column}[]", unused)
    return found


def _listed(turns: Any) -> list:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"found {turns!r:.40} where a non-empty list of messages belongs")
    return turns


def _name_unused(left: dict, where: str, unused: list[str]) -> None:
    unused += [f"{where}.{key}" for key, value in left.items() if not is_empty(value)]


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict, tuple)) and not value)


class _Turn:
    """One turn that is read: `left` is what nothing has taken yet."""

    def __init__(self, turn: dict[str, Any], where: str, column: str, unused: list[str]):
        self.left, self.where, self.column, self.unused = dict(turn), where, f"{column}[]", unused
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
        extras |= {key: self.left.pop(key, None) for key in ("name", "tool_call_id")}
        found |= {key: value for key, value in extras.items() if not is_empty(value)}
        if not self._trains():
            found["train"] = False
        _name_unused(self.left, self.column, self.unused)
        return found

    def _one_of(self, keys: tuple[str, ...]) -> Any:
        """The value of the one key of `keys` that the turn has, or of several that agree."""
        given = {key: self.left.pop(key) for key in keys if key in self.left}
        found = {key: value for key, value in given.items() if not is_empty(value)}
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise DataError(f"{self.where} has {' and '.join(found)}, and they differ; keep one")
        return next(iter(values or given.values()), None)

    def _role(self) -> str:
        name = self._one_of(ROLE_KEYS)
        name = name.lower() if isinstance(name, str) else name
        if name in CALLS:
            self.calls = self._read(self._one_of(CONTENT_KEYS), name)
            return "assistant"
        if not isinstance(name, str) or name not in ROLES:
            known = ", ".join([*ROLES, *CALLS])
            raise DataError(f"{self.where} has the role {name!r:.40}; known: {known}")
        return ROLES[name]

    def _content(self, calls: bool, extras: dict[str, Any]) -> str:
        content = self._one_of(CONTENT_KEYS)  # an empty one is no fault of a user's or tool's turn
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
            left = dict(part) if isinstance(part, dict) else {"type": type(part).__name__}
            kind = left.pop("type", None)
            if kind in ("text", "input_text", "output_text"):
                part = left.pop("text", None)
                texts.append(text(part, f"a text part of {self.where}", empty=True))
            elif kind in ("thinking", "reasoning") and not extras["reasoning_content"]:
                extras["reasoning_content"] = text(left.pop(kind, None), f"a part of {self.where}")
            else:
                raise DataError(
                    f"{self.where} has a part of the type {kind!r:.40}; only text parts are read"
                )
            if self.role == "assistant":
                _refuse_masks(left, f"a part of {self.where}", (*FLAGS, *DENIALS, *MASKS))
            _name_unused(left, f"{self.column}.content[]", self.unused)
        return "".join(texts)

    def _reasoning(self) -> str | None:
        found = self._one_of(REASONING_KEYS)
        return None if is_empty(found) else text(found, f"the reasoning of {self.where}")

    def _calls(self) -> list[dict]:
        for key in ("tool_calls", "function_call"):
            value = self.left.pop(key, None)
            if not is_empty(value):
                self.calls = self.calls + self._read(value, key)
        if self.calls and self.role != "assistant":
            raise DataError(f"{self.where} has tool calls; only an assistant calls tools")
        return self.calls

    def _read(self, value: Any, key: str) -> list[dict]:
        return _read_calls(value, self.where, key, f"{self.column}.{key}", self.unused)

    def _trains(self) -> bool:
        flags = flags_of(self.left, self.where)
        if self.role != "assistant":  # never trained, whatever it says
            asked = [key for key, trains in flags.items() if trains]
            self.unused += [f"{self.column}.{key} ({self.role})" for key in asked]
            return True
        return all(flags.values())


def flags_of(left: dict[str, Any], where: str) -> dict[str, bool]:
    """Word -> whether it lets the turn be trained; they are taken from `left`.

    Raises:
        DataError: a word says something else, or how much or which part of the turn is trained.
    """
    _refuse_masks(left, where, MASKS)
    given = [key for key in (*FLAGS, *DENIALS) if key in left]
    values = {key: left.pop(key) for key in given}
    return {
        key: flag(key, value, where) != (key in DENIALS)
        for key, value in values.items()
        if not is_empty(value)
    }


def _refuse_masks(left: dict[str, Any], where: str, words: tuple[str, ...]) -> None:
    for key in words:
        if not is_empty(left.get(key)):
            raise DataError(
                f"{where} has {key} {left[key]!r:.40}: which part of a turn is trained cannot be "
                "chosen here; give weight 0 to turns that are not"
            )


def flag(key: str, value: Any, where: str) -> bool:
    """Whether a turn is trained, from 0, 1, 0.0, 1.0, true or false."""
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise DataError(
            f"{where} has {key} {value!r:.40}; a turn is trained (1, true) or not (0, false)"
        )
    return bool(value)


# ------------------------------------------------------------------ tools
def _read_calls(value: Any, where: str, key: str, path: str, unused: list[str]) -> list[dict]:
    """[{id?, type, function: {name, arguments}}] of one call or several, or JSON of such."""
    value = parsed(value)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        left = dict(call) if isinstance(call, dict) else {}
        identity, _ = left.pop("id", None), left.pop("type", None)
        nested = left.pop("function", None)
        function, left = (left, {}) if nested is None else (nested, left)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where} has the {key} {call!r:.60}, and a call of a tool is {{name, arguments}}"
            )
        named = {} if is_empty(identity) else {"id": identity}
        rest = {word: value for word, value in function.items() if word != "name"}
        # Templates print arguments as JSON: of a string they would print a quoted string.
        arguments = parsed(rest.pop("arguments" if "arguments" in rest else "parameters", {}))
        function = {"name": function["name"], "arguments": arguments}
        calls.append(named | {"type": "function", "function": function})
        _name_unused(left | rest, f"{path}[]", unused)
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
        return parse(value, DataError)
    except ValueError:
        return value
    except RecursionError:
        raise DataError(f"{value!r:.40} is JSON nested too deeply to be read; flatten it") from None


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
