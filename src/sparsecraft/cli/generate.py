"""`sparsecraft generate`."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Budget, Fast, Folder, make_fast, set_for


@dataclass(frozen=True, kw_only=True)
class GenerateCommand(Command, Based, Fast):
    """Answer one prompt."""

    folder: Folder
    """Checkpoint, or the name of a dense model."""
    prompt: str
    """The user's message."""
    system: str | None = None
    """A system message before it."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 takes the most likely token each time."""
    stream: bool = False
    """Print tokens as they come."""
    seed: int = 0
    """Of sampling."""
    budget: Budget | None = None
    """Share of experts of a split model to run, or `recipe`; otherwise as saved."""


def run(command: GenerateCommand, say: Say) -> None:
    """Load, answer, print."""
    from sparsecraft.serving.generation import answer, load_generator

    model, tokenizer = load_generator(command.folder, command.base)
    set_for(model, command.budget)
    make_fast(model, command.fast)
    messages = [{"role": "system", "content": command.system}] if command.system else []
    messages.append({"role": "user", "content": command.prompt})
    text = answer(
        model,
        tokenizer,
        messages,
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        stream=command.stream,
        seed=command.seed,
    )
    if not command.stream:
        say(text)
