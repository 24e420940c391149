"""`sparsecraft chat`."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Budget, Fast, Folder, make_fast, set_for


@dataclass(frozen=True, kw_only=True)
class ChatCommand(Command, Based, Fast):
    """Talk with a model; an empty line ends it."""

    folder: Folder
    """Checkpoint, or the name of a dense model."""
    system: str | None = None
    """A system message before the conversation."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 takes the most likely token each time."""
    budget: Budget | None = None
    """Share of experts of a split model to run, or `recipe`; otherwise as saved."""


def run(command: ChatCommand, say: Say) -> None:
    """Ask for a line and answer it, until a line is empty. The conversation is kept."""
    from sparsecraft.serving.generation import answer, load_generator

    model, tokenizer = load_generator(command.folder, command.base)
    set_for(model, command.budget)
    make_fast(model, command.fast)
    messages = [{"role": "system", "content": command.system}] if command.system else []
    options = {"max_new_tokens": command.max_new_tokens, "temperature": command.temperature}
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        print("model: ", end="", flush=True)  # the answer follows on the same line
        text = answer(model, tokenizer, messages, stream=True, **options)
        messages.append({"role": "assistant", "content": text})
