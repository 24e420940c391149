"""Kinds of tokens, and how many experts they have, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import sparsecraft as sc
from sparsecraft.evaluation.analysis.analyze import analyze
from sparsecraft.evaluation.analysis.choices import Choices, LayerChoices
from sparsecraft.evaluation.analysis.figures import kinds as draw
from sparsecraft.evaluation.analysis.kinds import KINDS, experts_by_kind, kinds_of
from tests import tiny


def tokenizer_of(*tokens: str, kind=models.WordLevel) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    plain = Tokenizer(kind(vocabulary, unk_token=tokens[0]))
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token=tokens[0])


def named(tokenizer, numbers, documents) -> list[str]:
    return [KINDS[kind] for kind in kinds_of(tokenizer, np.array(numbers), np.array(documents))]


def test_kinds_where_spaces_are_marked():
    """A vocabulary of bytes may hold ## too."""
    tokens = ["<unk>", "\u0120red", "ness", "12", ",", "\n", "\u01207", "##", "th", "\ufffd"]
    text = [1, 2, 2, 4, 2, 5, 2, 6, 8, 7, 9, 2, 3, 0, 2]
    start, rest = "start of a word", "rest of a word"
    assert named(tokenizer_of(*tokens), [*text, 2], [0] * len(text) + [1]) == [
        start, rest, rest, "punctuation", start, "white space", start, "digits", rest,
        "punctuation", "part of a letter", rest, "digits", "special", start,
        start,
    ]  # fmt: skip


def test_kinds_of_word_pieces():
    tokens = ["[UNK]", "red", "##ness", "##s", "(", "7", "##7"]
    found = named(tokenizer_of(*tokens, kind=models.WordPiece), range(7), [0] * 7)
    rest = "rest of a word"
    assert found == ["special", "start of a word", rest, rest, "punctuation", "digits", "digits"]


def choices_of(sizes: list[int], tokens: list[int], documents: list[int]) -> Choices:
    empty = np.zeros((1, 4))
    layer = LayerChoices(4, empty, np.zeros((4, 4)), None, None)
    layer.sizes.append(np.array(sizes, np.uint16))
    found = Choices(["a"], {"l": layer}, np.zeros(1), np.zeros(1, np.int64))
    found.ids.append(np.array(tokens, np.int32))
    found.of_domain.append(np.zeros(len(tokens), np.uint8))
    found.of_document.append(np.array(documents, np.int32))
    return found


def test_experts_by_kind():
    tokenizer = tokenizer_of("<unk>", "\u0120red", "7")
    choices = choices_of([1, 3, 2, 2, 4, 0], [1, 2, 2, 1, 2, 1], [0, 0, 0, 1, 1, 1])
    digits, words = experts_by_kind(choices, tokenizer)["l"]
    assert (digits["kind"], digits["tokens"], digits["experts"]) == ("digits", 3, 3)
    assert digits["more"] == pytest.approx(((3 + 2) / 2 - 2 + 4 - 2) / 2)
    assert digits["error"] == pytest.approx(abs(0.5 - 2) / 2)
    assert words["more"] == pytest.approx(((1 - 2) + (1 - 2)) / 2)
    assert not experts_by_kind(choices_of([2, 2], [1, 2], [0, 0]), tokenizer)
    assert not experts_by_kind(choices, None)


@pytest.mark.parametrize("recipe", ["moepp", "upcycling"])
def test_of_a_model(recipe, tmp_path):
    model = tiny.llama()
    sc.convert(model, sc.recipes.moepp(4, 2) if recipe == "moepp" else sc.recipes.upcycling(4, 2))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    if recipe == "moepp":
        for layer in model.sparsecraft.layers:
            layer.router.balance = None  # which keeps the others out at the start
    metrics = analyze(model, [rows], tokenizer=tiny.tokenizer(), twin=False, drop=False)
    assert bool(metrics["kinds"]) == (recipe == "moepp")
    assert (draw(metrics) is not None) == (recipe == "moepp")
    for kinds in metrics["kinds"].values():
        assert sum(kind["tokens"] for kind in kinds) == metrics["tokens"]
        assert all(0 <= kind["experts"] <= 2 for kind in kinds)
