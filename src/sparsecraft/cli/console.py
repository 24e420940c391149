"""How the commands read their options, and what they say.

No tyro until a verb's options are read, no transformers until one runs.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, ClassVar, Self

Say = Callable[[str], None]

# Options of several values.
MULTIPLE = (
    "--set",
    "--data",
    "--old-data",
    "--sources",
    "--domains",
    "--prompts",
    "--weights",
    "--choice",
    "--tasks",
    "--trackers",
    "--stages",
)


class Command:
    """The options of one verb: a frozen dataclass whose docstrings are what `--help` prints.

    The function `run(command, say)` of the same file does what they ask.
    """

    light: ClassVar[bool] = False
    """Runs without torch and transformers, so that there is no library to quieten."""

    @classmethod
    def read(cls, verb: str, argv: list[str]) -> Self:
        """The command that the words after a verb ask for.

        Raises:
            SystemExit: with 0 after `--help`, with 2 after options that are wrong or missing.
        """
        return parse(cls, verb, argv)

    def option_names(self) -> tuple[str, ...]:
        """The names of its options, as Python spells them."""
        return tuple(field.name for field in fields(self))


def parse(target: type, name: str, argv: list[str]) -> Any:
    """The dataclass `target`, filled from words; `name` is what comes after `sparsecraft`."""
    import tyro

    return tyro.cli(target, prog=f"sparsecraft {name}", args=gathered(argv))


def gathered(argv: list[str]) -> list[str]:
    """`--set a=1 --set b=2` as `--set a=1 b=2`: of a repeated option only the last would count.

    Everything but the options that take several values stays as it is.
    """
    groups: list[list[str]] = [[]]
    several: dict[str, list[str]] = {}
    target = groups[0]
    for word in argv:
        name, equals, value = word.partition("=")
        if name in MULTIPLE:
            if name not in several:
                several[name] = [name]
                groups.append(several[name])
            target = several[name]
            target.extend([value] if equals else [])
        else:
            if word.startswith("--"):
                target = []
                groups.append(target)
            target.append(word)
    return [word for group in groups for word in group]


def quiet() -> None:
    """No bars and notes of other libraries: our own lines and the training bar say enough."""
    from transformers.utils import logging as transformers_logging

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when datasets is first imported
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # PEFT imports bitsandbytes, which then asks for kernels of the hub, quantized or not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def say(text: str) -> None:
    """Print a line, from the first of torchrun's processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def in_flags(text: str, names: Collection[str]) -> str:
    """An error's sentence about arguments of Python, about flags instead.

    `top_k is 9 with num_experts=8` becomes `--top-k is 9 with --num-experts 8`; where a sentence
    names both, as `unrelated=True (--unrelated)`, the flag is left. What stands in quotes, in a
    path or in a field such as `router.top_k` stays, and so does a name without an underscore that
    may be a word of the sentence. A list after `Known:` is of words to write as they are.
    """
    parts = re.split(r"(Known: .*?\.(?=\s|$))", text)
    return "".join(p if p.startswith("Known: ") else _in_flags(p, names) for p in parts)


def _in_flags(text: str, names: Collection[str]) -> str:
    text = re.sub(
        r"(?:\w+=\S+ or )?\w+=\S+ \((--[^)]*)\)", lambda m: m[1].replace(", ", " or "), text
    )
    text = re.sub(r"(--[a-z-]+) \(\w+=\w+\)", r"\1", text)
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        alone = r"(?<![\w.'\"`/=-])" + name + r"(?![\w.'\"`/-]*[\w'\"`/-])"
        text = re.sub(alone + "=False", f"--no-{flag[2:]}", text)
        text = re.sub(alone + r"=(?:True|\.\.\.)", flag, text)
        text = re.sub(alone + r"=(?=[\w'\"])", f"{flag} ", text)
        sure = rf"^{name}(?= is | has | holds )|(?<=pass ){name}(?=[.,;]|$)"
        text = re.sub(alone if "_" in name else sure, flag, text)
    return text
