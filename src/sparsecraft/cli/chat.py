"""The commands `generate` and `chat`."""

from __future__ import annotations

from tyro.conf import Positional

from sparsecraft.cli.budget import Budget, set_for
from sparsecraft.cli.console import quiet


def generate(
    folder: Positional[str],
    prompt: str,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    stream: bool = False,
    seed: int = 0,
    budget: Budget | None = None,
) -> None:
    """Answer one prompt.

    Args:
        folder: checkpoint, or the name of a dense model.
        prompt: the user's message.
        system: a system message before it.
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token each time.
        stream: print tokens as they come.
        seed: of sampling.
        budget: share of experts of a split model to run, or `recipe`; otherwise as saved.
    """
    from sparsecraft.serving.generation import answer, load_generator

    quiet()
    model, tokenizer = load_generator(folder)
    set_for(model, budget)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "stream": stream}
    text = answer(model, tokenizer, messages, seed=seed, **options)
    if not stream:
        print(text)


def chat(
    folder: Positional[str],
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    budget: Budget | None = None,
) -> None:
    """Talk with a model; an empty line ends it.

    Args:
        folder: checkpoint, or the name of a dense model.
        system: a system message before the conversation.
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token each time.
        budget: share of experts of a split model to run, or `recipe`; otherwise as saved.
    """
    from sparsecraft.serving.generation import answer, load_generator

    quiet()
    model, tokenizer = load_generator(folder)
    set_for(model, budget)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        print("model: ", end="", flush=True)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        text = answer(model, tokenizer, messages, stream=True, **options)
        messages.append({"role": "assistant", "content": text})
