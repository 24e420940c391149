"""One canonical row -> token ids and labels: which tokens are trained is decided here alone."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from sparsecraft.data.chat import check_printed, for_template, given_of, render, render_row
from sparsecraft.data.spans import Spans
from sparsecraft.errors import DataError

IGNORED = -100  # the label that torch's cross entropy skips


# ------------------------------------------------------------------ text -> token ids
def prompt_ids(messages: list[dict], tokenizer) -> list[int]:
    """Token ids of a chat that awaits its answer, exactly as `encode` lays them out in training."""
    return _tokenize(render(messages, tokenizer, generate=True), tokenizer)[0]


def row_ids(row: dict, tokenizer, adds_bos_only: bool = True) -> list[int]:
    """Token ids of all the text of a canonical row, a chat by its template.

    Args:
        adds_bos_only: as `encode` lays them out; else with all that the tokenizer adds.
    """
    text = row["text"] if row.get("messages") is None else render_row(row, tokenizer)
    if adds_bos_only:
        return _tokenize(text, tokenizer)[0]
    return list(tokenizer(text, verbose=False)["input_ids"])


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
    added = _with_bos(ids, tokenizer)
    return added, [(0, 0)] * (len(added) - len(ids)) + spans if fast else None


def _with_bos(ids: list[int], tokenizer) -> list[int]:
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


# ------------------------------------------------------------------ canonical row -> ids, labels
def encode(
    row: dict, tokenizer, max_length: int | None = None, overlong: str = "drop"
) -> dict[str, list[int]] | None:
    """{input_ids, labels} of a canonical row for a causal language model, or None if it is dropped.

    Chat: the loss falls on every assistant turn that is to train, its end-of-turn token included,
    and on nothing else; a template that marks what is generated is taken at its word. A row longer
    than `max_length` tokens is dropped, or cut with `overlong="truncate"`. Text: the loss falls on
    every token (EOS appended); it comes back whole, however long, and `prepare` splits it. A row
    without a trainable token is dropped. The first label is always -100: nothing precedes that
    token, and in a pack another document would.

    Raises DataError where the template rewrites earlier turns, so that no span is certain, where it
    leaves out what the row has, and where a content holds a control token.
    """
    if row.get("messages") is not None:
        ids, labels = _encode_chat(row, tokenizer)
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
    trains = row.get("train") is not False and any(label != IGNORED for label in labels)
    return {"input_ids": ids, "labels": labels} if trains else None


def _encode_chat(row: dict, tokenizer) -> tuple[list[int], list[int]]:
    messages, given = for_template(row, tokenizer), given_of(row)
    trains = [m.get("train", True) for m in row["messages"] if m["role"] == "assistant"]
    text = render(messages, tokenizer, given=given)
    check_printed(messages, text)
    if tokenizer.is_fast and MARKS.search(str(getattr(tokenizer, "chat_template", ""))):
        ids, found = _marked(messages, tokenizer, given)
    else:
        ids, spans = _tokenize(text, tokenizer)
        characters = Spans(messages, text, tokenizer, given).find()
        if spans is None:
            found = _without_offsets(text, characters, ids, tokenizer)
        else:
            found = _with_offsets(spans, characters)
    if len(found) != len(trains) and not all(trains):
        raise DataError(
            f"{len(trains)} turns are the assistant's, and the chat template marks {len(found)} as "
            "generated, so that those of weight 0 cannot be found; leave them out"
        )
    labels = [IGNORED] * len(ids)
    for number, (first, last) in enumerate(found):
        if all(trains) or trains[number]:
            labels[first:last] = ids[first:last]
    return ids, labels


# ------------------------------------------------------------------ which tokens the assistant says
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # of a template that says what is generated


def _marked(messages, tokenizer, given) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a chat, and the runs of tokens (first, after the last) that its template marks."""
    try:
        out = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **given
        )
    except Exception as err:  # as in `render`
        raise DataError(f"the tokenizer's chat template refuses the row: {err}") from err
    ids, mask = list(out["input_ids"]), [0, *out["assistant_masks"], 0]
    edges = [at for at, (a, b) in enumerate(pairwise(mask)) if a != b]
    added = _with_bos(ids, tokenizer)
    shift = len(added) - len(ids)
    starts, ends = edges[::2], edges[1::2]
    return added, [(a + shift, b + shift) for a, b in zip(starts, ends, strict=True)]


def _with_offsets(spans, characters) -> list[tuple[int, int]]:
    """Runs of tokens that hold a character of a span: one merged across the boundary trains."""
    found, at = [], 0
    for start, end in characters:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        first = at
        while at < len(spans) and spans[at][0] < end:
            at += 1
        found.append((first, at))
        at = max(first, at - 1)  # a token may hold characters of the next span as well
    return found


def _without_offsets(text, characters, ids, tokenizer) -> list[tuple[int, int]]:
    """The same for tokenizers without offsets: by the pieces between the spans' ends, or, where
    these are other tokens than the whole's, by every prefix."""
    edges = [0, *(at for span in characters for at in span), len(text)]
    pieces = [_pieces(text[a:b], tokenizer, a == 0) for a, b in pairwise(edges)]
    if [token for piece in pieces for token in piece] == ids:
        ends, total = [], 0
        for piece in pieces:
            total += len(piece)
            ends.append(total)
        return list(zip(ends[:-1:2], ends[1::2], strict=True))
    return [tuple(_tokens_before(text, at, ids, tokenizer) for at in span) for span in characters]


def _pieces(text: str, tokenizer, first: bool) -> list[int]:
    if first:
        return _tokenize(text, tokenizer)[0]
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


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
    if not turns or messages[turns[-1]].get("train") is False or row.get("train") is False:
        return None
    prompt, answer = messages[: turns[-1]], messages[turns[-1]]
    target = answer["content"]
    if set(answer) - {"role", "content", "name"}:
        raise DataError(
            "the answer of a sequence-to-sequence row is text, without tool calls or thoughts"
        )
    if not prompt:
        raise DataError("the answer stands first, and there is no prompt to encode before it")
    bare = len(prompt) == 1 and not getattr(tokenizer, "chat_template", None)
    if bare and set(prompt[0]) <= {"role", "content", "name"} and not given_of(row):
        source = prompt[0]["content"]
    else:
        source = render(
            for_template(row | {"messages": prompt}, tokenizer), tokenizer, True, given_of(row)
        )
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
    if row.get("train") is False:
        return None
    cut = {"truncation": True, "max_length": max_length} if overlong == "truncate" else {}
    ids = tokenizer(row["text"], verbose=False, **cut)["input_ids"]
    if not ids or (max_length and len(ids) > max_length):
        return None
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": row["label"]}
