"""`sparsecraft chat`."""

from __future__ import annotations


def test_chat_keeps_the_conversation(run, converted, monkeypatch):
    lines = iter(["say red", "say blue", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen = []
    from sparsecraft.serving import generation

    answer = generation.answer
    monkeypatch.setattr(
        generation,
        "answer",
        lambda model, tokenizer, messages, **k: (
            seen.append(len(messages))
            or answer(model, tokenizer, messages, **{**k, "max_new_tokens": 3})
        ),
    )
    run("chat", converted)
    assert seen == [1, 3]
