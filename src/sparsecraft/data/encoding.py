"""One canonical row -> token ids and labels: which tokens are trained is decided here alone."""

from __future__ import annotations

from typing import Any

from sparsecraft.errors import DataError

IGNORED = -100  # the label that torch's cross entropy skips


# ------------------------------------------------------------------ text -> token ids
def render(messages: list[dict], tokenizer, generate: bool = False) -> str:
    """The text of a chat; `generate` appends the header that invites the assistant's answer.

    The tokenizer's own chat template or, where it has none, `plain_chat`. Raises DataError where
    the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        return plain_chat(messages, tokenizer.eos_token or "", generate)
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
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


def prompt_ids(messages: list[dict], tokenizer) -> list[int]:
    """Token ids of a chat that awaits its answer, exactly as `encode` lays them out in training."""
    return _tokenize(render(messages, tokenizer, generate=True), tokenizer)[0]


def row_ids(row: dict, tokenizer, adds_bos_only: bool = True) -> list[int]:
    """Token ids of all the text of a canonical row, a chat by its template.

    Args:
        adds_bos_only: as `encode` lays them out; else with all that the tokenizer adds.
    """
    chat = row.get("messages")
    text = row["text"] if chat is None else render(chat, tokenizer)
    if adds_bos_only:
        return _tokenize(text, tokenizer)[0]
    return list(tokenizer(text, verbose=False)["input_ids"])


def pad_id(tokenizer) -> int:
    """The id to pad with: the tokenizer's, else its end of text, else 0 (padding is masked)."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)


def _tokenize(text: str, tokenizer) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Ids and character spans, with one BOS where the tokenizer's convention has one.

    Special tokens are not added by the tokenizer but here, because a chat template may have
    written the BOS already (the released PESC code trains on two). Spans are None for a tokenizer
    that cannot give them.
    """
    fast = tokenizer.is_fast
    out = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False
    )  # verbose=False: length is our affair
    ids, spans = list(out["input_ids"]), list(out["offset_mapping"]) if fast else None
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    if adds_bos and ids[:1] != [bos]:
        ids, spans = [bos, *ids], [(0, 0), *spans] if fast else None
    return ids, spans


# ------------------------------------------------------------------ canonical row -> ids, labels
def encode(
    row: dict, tokenizer, max_length: int | None = None, overlong: str = "drop"
) -> dict[str, list[int]] | None:
    """{input_ids, labels} of a canonical row for a causal language model, or None if it is dropped.

    Chat: the loss falls on every assistant turn, its end-of-turn token included, and on nothing
    else. A row longer than `max_length` tokens is dropped, or cut with `overlong="truncate"`.
    Text: the loss falls on every token (EOS appended); it comes back whole, however long, and
    `prepare` splits it. A row without a trainable token is dropped. The first label is always -100:
    nothing precedes that token, and in a pack another document would.

    Raises DataError where the template rewrites earlier turns, so that no span is certain.
    """
    if row.get("messages") is not None:
        ids, labels = _encode_chat(row["messages"], tokenizer)
        if max_length and len(ids) > max_length:
            if overlong == "drop":
                return None
            ids, labels = ids[:max_length], labels[:max_length]
    else:
        ids, _ = _tokenize(row["text"], tokenizer)
        eos = tokenizer.eos_token_id
        if ids and eos is not None and ids[-1] != eos:
            ids.append(eos)
        labels = list(ids)
    labels[:1] = [IGNORED] * len(labels[:1])
    trains = any(label != IGNORED for label in labels)
    return {"input_ids": ids, "labels": labels} if trains else None


def _encode_chat(messages: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    text = render(messages, tokenizer)
    ids, spans = _tokenize(text, tokenizer)
    labels = [IGNORED] * len(ids)
    for start, end in _assistant_spans(messages, text, tokenizer):
        if spans is None:
            first, last = (_tokens_before(text, at, ids, tokenizer) for at in (start, end))
            labels[first:last] = ids[first:last]
            continue
        for at, (left, right) in enumerate(spans):
            # A token merged across the boundary holds a character of the answer: it trains.
            if left < end and right > start:
                labels[at] = ids[at]
    return ids, labels


def _assistant_spans(messages: list[dict], text: str, tokenizer) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns, from the renderings of every prefix."""
    markers = tuple({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:turn], tokenizer, generate=True)
        upto = render(messages[: turn + 1], tokenizer)
        if not text.startswith(before):
            # Some templates write no header for the answer (Llama-2's), some one of their own.
            raise DataError(_rewritten(turn, before, text))
        end = len(upto)
        if not (text.startswith(upto) and end > len(before)):
            # Qwen3's puts an empty <think> block before the last answer only: look for the answer
            # and what closes it. A template that rewrites the answer itself is refused.
            body = message["content"].strip()
            closing = upto[upto.rfind(body) + len(body) :] if body in upto else None
            at = -1 if closing is None else text.find(body + closing, len(before))
            if at < 0 or text[len(before) : at].strip():
                raise DataError(_rewritten(turn, upto, text))
            end = at + len(body) + len(closing)
        # Templates put a newline after the end-of-turn token; generation stops before it.
        spoken = text[len(before) : end].rstrip()
        if markers and spoken.endswith(markers):
            end = len(before) + len(spoken)
        spans.append((len(before), end))
    return spans


def _rewritten(turn: int, part: str, text: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), len(text))
    return (
        f"the chat template renders message {turn + 1} differently within the whole chat "
        f"({part[same : same + 30]!r} becomes {text[same : same + 30]!r}), so its tokens cannot "
        "be found; split the row into one row per answer, or use a template that keeps all turns"
    )


def _tokens_before(text: str, at: int, ids: list[int], tokenizer) -> int:
    """How many of `ids` lie before character `at`, for tokenizers without offsets."""
    part, _ = _tokenize(text[:at], tokenizer)
    if ids[: len(part)] != part:
        raise DataError(
            f"the tokenizer merges characters across the boundary at {text[at - 10 : at + 10]!r} "
            "and reports no offsets; use its fast version"
        )
    return len(part)


def encode_pair(
    row: dict, tokenizer, max_length: int | None = None, overlong: str = "drop"
) -> dict[str, list[int]] | None:
    """{input_ids, attention_mask, labels} of a chat row for an encoder-decoder, or None if dropped.

    The last assistant turn is the target, all before it the source: rendered as in `encode`, or
    the bare text where it is one user message and the tokenizer has no chat template (T5's way).
    `max_length` bounds source and target each; `overlong` is as in `encode`.
    """
    messages = row.get("messages")
    if messages is None:
        raise DataError("a sequence-to-sequence row needs a prompt and a completion, not text")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return None
    prompt, target = messages[: turns[-1]], messages[turns[-1]]["content"]
    bare = len(prompt) == 1 and not getattr(tokenizer, "chat_template", None)
    source = prompt[0]["content"] if bare else render(prompt, tokenizer, generate=True)
    ids = tokenizer(source, verbose=False)["input_ids"]
    labels = tokenizer(text_target=target, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and labels[-1:] != [tokenizer.eos_token_id]:
        labels = [*labels, tokenizer.eos_token_id]
    if max_length and max(len(ids), len(labels)) > max_length:
        if overlong == "drop":
            return None
        ids, labels = ids[:max_length], labels[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode_label(
    row: dict, tokenizer, max_length: int | None = None, overlong: str = "drop"
) -> dict[str, Any] | None:
    """{input_ids, attention_mask, labels: int} of a row of text and label, or None if dropped."""
    if row.get("label") is None:
        raise DataError("a classification row needs text and label")
    cut = {"truncation": True, "max_length": max_length} if overlong == "truncate" else {}
    ids = tokenizer(row["text"], verbose=False, **cut)["input_ids"]
    if not ids or (max_length and len(ids) > max_length):
        return None
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": row["label"]}
